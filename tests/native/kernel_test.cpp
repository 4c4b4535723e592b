// Every kernel that was compiled and runs here, on random and on hostile blocks, against the two references of
// kernel_reference.h: the arithmetic that edge-matmul.h promises, bit for bit, and the value in double. Attention likewise.
//
//     kernel_test [--isa NAME] [--seed N] [--rounds N]
//
// Exit status: 0 passed, 1 a kernel failed or none ran, 2 wrong usage.
#include "edge-matmul.h"
#include "attention_check.h"
#include "kernel_reference.h"
#include "tools.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

// ── blocks ────────────────────────────────────────────────────────────────────────────────────────────────────────────

void put_half(Random & random, bool hostile, uint8_t * at) {
    // zero, smallest and largest subnormal, smallest normal, one, largest
    static const uint16_t extremes[] = { 0x0000, 0x0001, 0x03ff, 0x0400, 0x3c00, 0x7bff };
    uint16_t              bits       = uint16_t(0x2000 + random.below(0x1000)); // 0.008 … 0.5
    if (hostile) {
        bits = random.once_in(2) ? extremes[random.below(6)] : uint16_t(random.below(0x7c00)); // any finite
    }
    bits |= uint16_t(random.below(2) << 15);
    memcpy(at, &bits, 2);
}

// bytes that all are at an extreme, or of some extremes, or any
void put_bytes(Random & random, int kind, uint8_t * at, int n) {
    static const uint8_t extremes[] = { 0x00, 0xff, 0x80, 0x7f, 0x0f, 0xf0, 0x81, 0x01 };
    for (int i = 0; i < n; i++) {
        at[i] = kind < 8 ? extremes[kind] : kind < 10 ? extremes[random.below(8)] : uint8_t(random.next());
    }
}

void put_weights(Random & random, const Format & f, bool hostile, int n_blocks, uint8_t * row) {
    const bool alike = hostile && random.once_in(2); // extremes in every block
    const int  kinds[2] = { random.below(8), random.below(8) };
    for (int b = 0; b < n_blocks; b++, row += f.bytes) {
        put_bytes(random, alike ? kinds[0] : hostile ? random.below(16) : 10, row, f.bytes);
        put_bytes(random, alike ? kinds[1] : hostile ? random.below(16) : 10, row + f.scales, f.n_scales);
        for (int half : f.halves) {
            if (half >= 0) {
                put_half(random, hostile, row + half);
            }
        }
    }
}

int8_t any_quant(Random & random, int kind) { // -127 … 127, as ggml makes them
    return int8_t(kind == 0 ? 127 : kind == 1 ? -127 : kind == 2 ? 127 - 254 * random.below(2) : kind == 3 ? 0 : random.below(255) - 127);
}

void put_activations(Random & random, const Format & f, bool hostile, int n_blocks, uint8_t * column) {
    static const float scales[] = { 0, 1e-40f, 1e-38f, 1e-20f, 1, 65504 };
    const bool         alike    = hostile && random.once_in(2);
    const int          one_kind = random.below(3);
    for (int b = 0; b < n_blocks; b++, column += f.a_bytes) {
        const int kind = alike ? one_kind : hostile ? random.below(8) : 4;
        int       sums[16] = {};
        for (int i = 0; i < f.weights; i++) {
            const int8_t q          = any_quant(random, kind);
            column[f.a_quants + i]  = uint8_t(q);
            sums[i / 16] += q;
        }
        if (f.k_quant) {
            const float d = (hostile ? scales[random.below(6)] : float(1 + random.below(1000)) / 1024) * (random.once_in(2) ? -1 : 1);
            memcpy(column, &d, 4);
            for (int s = 0; s < 16; s++) {
                const int16_t sum = int16_t(sums[s]);
                memcpy(column + 260 + s * 2, &sum, 2);
            }
        } else {
            put_half(random, hostile, column);
            if (f.has_min) {
                put_half(random, hostile, column + 2); // the kernels take it as it is
            }
        }
    }
}

// ── one shape ─────────────────────────────────────────────────────────────────────────────────────────────────────────

uint32_t bits_of(float value) { return read_as<uint32_t>(reinterpret_cast<const uint8_t *>(&value)); }

struct Shape {
    int  n_rows, n_blocks;
    bool hostile;
};

Shape shape_of(Random & random, int round, const EdgeKernel & kernel) {
    if (round == 0) {
        return { 1, 1, false };
    }
    if (round == 1) {
        return { kernel.rows, 40, true };
    }
    // few rows or few blocks: a large product costs time and shows nothing new
    const int n_blocks = 1 + random.below(1 + random.below(40));
    const int n_rows   = 1 + random.below(n_blocks > 10 ? kernel.rows + 1 : 3 * kernel.rows);
    return { n_rows, n_blocks, round % 3 != 0 };
}

void check_unpack(const EdgeKernel & kernel, const Format & f, const std::vector<Block> & row, const uint8_t * tile, int r) {
    const int n_blocks = int(row.size());
    Buffer    out(int64_t(n_blocks) * f.weights * 4);
    kernel.unpack_row(tile, r, n_blocks, reinterpret_cast<float *>(out.data()));
    out.check("unpack_row");
    for (int i = 0; i < n_blocks * f.weights; i++) {
        // d · scale · q has at most 24 bits, so that float rounds once, where the minimum is added; double is exact
        const float expected = float(weight(f, row[size_t(i / f.weights)], i % f.weights)), found = read_as<float>(out.data() + i * 4);
        if (bits_of(found) != bits_of(expected)) {
            fail("unpack_row of row %d, weight %d: %.9g instead of %.9g", r, i, double(found), double(expected));
        }
    }
}

// one group of n columns, the first of them activation `first`: every result, and that nothing else is written
void check_group(const EdgeKernel & kernel, const Shape & shape, Buffer & tiles, std::vector<Buffer> & columns, int n, int first,
                 const std::vector<float> & expected) {
    const int n_columns = int(columns.size()), stride = shape.n_rows + first % 3;
    Buffer    group(int64_t(kernel.column_bytes) * n * shape.n_blocks);
    for (int c = n - 1; c >= 0; c--) {
        kernel.prepare(columns[size_t((first + c) % n_columns)].data(), shape.n_blocks, n, c, group.data());
        group.check("prepare");
    }
    Buffer     out((int64_t(n - 1) * stride + shape.n_rows) * 4), untouched((int64_t(n - 1) * stride + shape.n_rows) * 4);
    const auto number = [&](int c, int r) { return (c * stride + r) * 4; };
    kernel.multiply[n - 1](tiles.data(), shape.n_rows, shape.n_blocks, group.data(), reinterpret_cast<float *>(out.data()), stride);
    out.check("multiply");
    for (int c = 0; c < n; c++) {
        const int a = (first + c) % n_columns;
        for (int r = 0; r < shape.n_rows; r++) {
            const float found = read_as<float>(out.data() + number(c, r)), right = expected[size_t(a * shape.n_rows + r)];
            if (bits_of(found) != bits_of(right)) {
                fail("row %d of %d, column %d of %d (activation %d), %d blocks: %.9g (0x%08x), edge-matmul.h says %.9g (0x%08x)", r,
                     shape.n_rows, c, n, a, shape.n_blocks, double(found), bits_of(found), double(right), bits_of(right));
            }
        }
        for (int r = shape.n_rows; c < n - 1 && r < stride; r++) {
            if (memcmp(out.data() + number(c, r), untouched.data() + number(c, r), 4) != 0) {
                fail("multiply wrote behind row %d of column %d", shape.n_rows, c);
            }
        }
    }
}

// returns how many results it compared
int64_t check_shape(const EdgeKernel & kernel, Type type, const Shape & shape, Random & random) {
    const Format & f         = format(type);
    const int      n_columns = kernel.max_columns + 1;
    const size_t   row_bytes = size_t(shape.n_blocks * f.bytes + random.below(2) * 32); // rows of a view lie further apart

    Buffer source(int64_t(row_bytes) * (shape.n_rows - 1) + shape.n_blocks * f.bytes);
    std::vector<std::vector<Block>> rows;
    for (int r = 0; r < shape.n_rows; r++) {
        uint8_t * row = source.data() + size_t(r) * row_bytes;
        put_weights(random, f, shape.hostile, shape.n_blocks, row);
        rows.push_back(decode_row(type, row, shape.n_blocks));
    }
    std::vector<Buffer> columns;
    for (int c = 0; c < n_columns; c++) {
        columns.emplace_back(int64_t(shape.n_blocks) * f.a_bytes);
        put_activations(random, f, shape.hostile, shape.n_blocks, columns.back().data());
    }

    const int64_t tile_size = kernel.tile_size(shape.n_blocks);
    const int     n_tiles   = (shape.n_rows + kernel.rows - 1) / kernel.rows;
    Buffer        tiles(tile_size * n_tiles);
    for (int t = 0; t < n_tiles; t++) {
        const int first = t * kernel.rows, n = std::min(kernel.rows, shape.n_rows - first);
        Buffer    tile(tile_size);
        kernel.pack(source.data() + size_t(first) * row_bytes, row_bytes, n, shape.n_blocks, tile.data());
        tile.check("pack");
        memcpy(tiles.data() + t * tile_size, tile.data(), size_t(tile_size));
        for (int r = 0; r < n; r++) {
            check_unpack(kernel, f, rows[size_t(first + r)], tile.data(), r);
        }
    }

    std::vector<float> expected;
    for (int c = 0; c < n_columns; c++) {
        for (int r = 0; r < shape.n_rows; r++) {
            const uint8_t * column = columns[size_t(c)].data();
            expected.push_back(exact_product(f, rows[size_t(r)], column));
            const Value  value = product(f, rows[size_t(r)], column);
            const double error = std::fabs(value.sum - double(expected.back())), allowed = tolerance(value, shape.n_blocks);
            if (!(error <= allowed)) {
                fail("the arithmetic itself is off: %.9g for %.17g, %g allowed", double(expected.back()), value.sum, allowed);
            }
        }
    }

    int64_t compared = 0;
    for (int n = 1; n <= kernel.max_columns; n++) { // each activation comes to stand in other places of other groups
        check_group(kernel, shape, tiles, columns, n, random.below(n_columns), expected);
        compared += int64_t(n) * shape.n_rows;
    }
    return compared;
}

// ── all of them ───────────────────────────────────────────────────────────────────────────────────────────────────────

void check_isa(const EdgeIsa & isa, uint64_t seed, int n_rounds) {
    for (int t = 0; t < int(Type::count); t++) {
        const Format &     f      = format(Type(t));
        const EdgeKernel & kernel = *isa.kernels[t];
        where                     = std::string(isa.name) + " " + f.name;
        if (kernel.block != f.weights || kernel.max_columns < 1 || kernel.max_columns > 16) {
            fail("its table says blocks of %d and %d columns", kernel.block, kernel.max_columns);
        }
        int64_t compared = 0;
        for (int round = 0; round < n_rounds; round++) {
            Random      random{ seed * 1000003 + uint64_t(round) * 101 + uint64_t(t) };
            const Shape shape = shape_of(random, round, kernel);
            where             = std::string(isa.name) + " " + f.name + " (seed " + std::to_string(seed) + ", round " + std::to_string(round) + ")";
            compared += check_shape(kernel, Type(t), shape, random);
        }
        printf("%-13s %-5s %d shapes, %lld results equal bit for bit\n", isa.name, f.name, n_rounds, static_cast<long long>(compared));
        fflush(stdout);
    }
    where = std::string(isa.name) + " attention (seed " + std::to_string(seed) + ")";
    Random random{ seed };
    for (int round = 0; round < n_rounds; round++) {
        check_attention(isa, random);
    }
    printf("%-13s attention: %d shapes within rounding, rows independent bit for bit\n", isa.name, n_rounds);
}

[[noreturn]] void usage(const char * what) {
    fprintf(stderr, "%s\nusage: kernel_test [--isa NAME] [--seed N] [--rounds N]\n", what);
    exit(2);
}

} // namespace

static_assert(int(Type::count) == int(EdgeWeight::count), "a weight type that the reference does not know");

int main(int argc, char ** argv) {
    std::string only;
    uint64_t    seed     = 1;
    int         n_rounds = 100;
    for (int i = 1; i < argc; i += 2) {
        const std::string option = argv[i];
        if (i + 1 == argc) {
            usage(("no value for " + option).c_str());
        } else if (option == "--isa") {
            only = argv[i + 1];
        } else if (option == "--seed") {
            seed = strtoull(argv[i + 1], nullptr, 10);
        } else if (option == "--rounds") {
            n_rounds = std::max(1, atoi(argv[i + 1]));
        } else {
            usage(("unknown option " + option).c_str());
        }
    }
    printf("seed %llu\n", static_cast<unsigned long long>(seed));
    bool known = only.empty(), ran = false;
    for (const EdgeIsa * const * isa = edge_isas; *isa; isa++) {
        if (!only.empty() && only != (*isa)->name) {
            continue;
        }
        known = true;
        if ((*isa)->runs_here()) {
            check_isa(**isa, seed, n_rounds);
            ran = true;
        } else {
            printf("%-13s skipped: this CPU lacks its instructions\n", (*isa)->name);
        }
    }
    if (!known) {
        usage(("not compiled: " + only).c_str());
    }
    printf(ran ? "passed\n" : "FAILED: no kernel ran\n");
    return ran ? 0 : 1;
}
