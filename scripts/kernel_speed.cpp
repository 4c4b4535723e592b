// How fast every kernel that was compiled and runs here is, on one core; one JSON object per line. See bench_kernels.
//
//     kernel_speed REPEATS
//
// "far" weights (192 MiB) come from memory each time, "near" ones (384 KB) from the second-level cache.
#include "edge-matmul.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#ifdef __linux__
#    include <sys/mman.h>
#endif

namespace {

const char * const weight_names[] = { "q4_0", "q8_0", "q4_K", "q6_K", "q4_1", "q5_K", "q5_0", "q5_1" };
constexpr int64_t  page = 2 << 20, far_bytes = 96 * page, near_bytes = 384000, row_weights = 2048;

double seconds(const std::function<void()> & work) {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void show(const char * what, const char * type, const char * place, int n, int64_t bytes, int64_t products, std::vector<double> times) {
    printf("{\"what\": \"%s\", \"type\": \"%s\", \"place\": \"%s\", \"columns\": %d, \"bytes\": %lld, \"products\": %lld, \"seconds\": [", what,
           type, place, n, (long long) bytes, (long long) products);
    for (size_t i = 0; i < times.size(); i++) {
        printf("%s%.4e", i ? ", " : "", times[i]);
    }
    printf("]}\n");
    fflush(stdout);
}

// rotations that wait for each other take a cycle each
double gigahertz() {
    constexpr int count = 100000000;
    uint64_t      x     = 1;
    const double  time  = seconds([&] {
        for (int i = 0; i < count; i++) {
            x = x << 7 | x >> 57;
            __asm__ volatile("" : "+r"(x));
        }
    });
    return count / time / 1e9;
}

template <int ahead> void read_all(const uint8_t * from, int64_t bytes) {
    typedef uint64_t Two __attribute__((vector_size(16)));
    Two              sums[4] = {};
    for (int64_t at = 0; at + 64 <= bytes; at += 64) {
        if (ahead) {
            __builtin_prefetch(from + at + ahead);
        }
        for (int i = 0; i < 4; i++) {
            Two part;
            memcpy(&part, from + at + 16 * i, 16);
            sums[i] += part;
        }
    }
    for (Two & sum : sums) {
        __asm__ volatile("" : "+m"(sum));
    }
}

void measure(const EdgeIsa & isa, int type, const uint8_t * memory, bool near, int repeats) {
    const EdgeKernel & kernel   = *isa.kernels[type];
    const int64_t      n_blocks = row_weights / kernel.block, tile = kernel.tile_size(n_blocks);
    const int64_t      n_tiles = (near ? near_bytes : far_bytes) / tile, n_rows = n_tiles * kernel.rows;
    const int          turns = near ? 20 : 1;

    const std::vector<uint8_t>       group(size_t(n_blocks * kernel.column_bytes * kernel.max_columns), 0);
    std::vector<float>               out(size_t(n_rows * kernel.max_columns));
    std::vector<std::vector<double>> times(size_t(kernel.max_columns));
    for (int r = 0; r <= repeats; r++) {
        for (int n = 1; n <= kernel.max_columns; n++) {
            const double time = seconds([&] {
                for (int t = 0; t < turns; t++) {
                    kernel.multiply[n - 1](memory, n_rows, n_blocks, group.data(), out.data(), n_rows);
                }
            });
            if (r > 0) { // the first turn warms up
                times[size_t(n - 1)].push_back(time / turns);
            }
        }
    }
    for (int n = 1; n <= kernel.max_columns; n++) {
        show(isa.name, weight_names[type], near ? "near" : "far", n, n_tiles * tile, n_rows * row_weights * n, times[size_t(n - 1)]);
    }
}

} // namespace

int main(int argc, char ** argv) {
    const int  repeats = argc > 1 ? std::max(1, atoi(argv[1])) : 5;
    const auto memory  = static_cast<uint8_t *>(aligned_alloc(page, far_bytes));
    if (!memory) {
        return 1;
    }
#ifdef __linux__
    madvise(memory, far_bytes, MADV_HUGEPAGE); // as ggml's buffer of these kernels has them
#endif
    memset(memory, 0, far_bytes); // what is multiplied does not change the time
    printf("{\"what\": \"clock\", \"gigahertz\": %.3f}\n", gigahertz());
    std::vector<double> plain, ahead;
    for (int r = 0; r <= repeats; r++) {
        plain.push_back(seconds([&] { read_all<0>(memory, far_bytes); }));
        ahead.push_back(seconds([&] { read_all<4096>(memory, far_bytes); }));
    }
    show("read", "", "far", 0, far_bytes, 0, plain);
    show("read ahead", "", "far", 0, far_bytes, 0, ahead);
    for (int i = 0; edge_isas[i]; i++) {
        for (int type = 0; type < int(EdgeWeight::count) && edge_isas[i]->runs_here(); type++) {
            for (bool near : { false, true }) {
                measure(*edge_isas[i], type, memory, near, repeats);
            }
        }
    }
    free(memory);
}
