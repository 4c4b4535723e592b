#include "edge-kernels.h"

#include "edge-matmul.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "traits.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#ifdef __linux__
#    include <sys/mman.h>
#endif

namespace {

struct weight_type {
    ggml_type  type;
    EdgeWeight weight;
};

const weight_type weight_types[] = {
    { GGML_TYPE_Q4_0, EdgeWeight::q4_0 }, { GGML_TYPE_Q4_1, EdgeWeight::q4_1 }, { GGML_TYPE_Q5_0, EdgeWeight::q5_0 },
    { GGML_TYPE_Q5_1, EdgeWeight::q5_1 }, { GGML_TYPE_Q8_0, EdgeWeight::q8_0 }, { GGML_TYPE_Q4_K, EdgeWeight::q4_K },
    { GGML_TYPE_Q5_K, EdgeWeight::q5_K }, { GGML_TYPE_Q6_K, EdgeWeight::q6_K },
};

std::atomic<const EdgeIsa *> selected{ nullptr };

// how many columns are worked through while a chunk of tiles stays in the cache
constexpr int64_t columns_at_once = 64;

int64_t round_up(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
}

void pack_rows(const EdgeKernel & kernel, const char * data, size_t row_bytes, int64_t n_rows, int64_t n_blocks, char * tiles) {
    const int64_t tile_size = kernel.tile_size(n_blocks);
    for (int64_t row = 0; row < n_rows; row += kernel.rows, tiles += tile_size) {
        kernel.pack(data + row * row_bytes, row_bytes, (int) std::min<int64_t>(kernel.rows, n_rows - row), n_blocks, tiles);
    }
}

class traits : public ggml::cpu::tensor_traits {
  public:
    explicit traits(const EdgeKernel & kernel) : kernel(kernel) {}

    const EdgeKernel & kernel;

    int64_t n_blocks(const ggml_tensor * w) const { return w->ne[0] / kernel.block; }
    int64_t alloc_size(const ggml_tensor * w) const {
        return round_up(w->ne[1], kernel.rows) / kernel.rows * kernel.tile_size(n_blocks(w));
    }

    void pack(ggml_tensor * w, const void * data) const {
        const int64_t tile_size = kernel.tile_size(n_blocks(w)), n_tiles = round_up(w->ne[1], kernel.rows) / kernel.rows;
        const auto    some      = [&](int64_t first, int64_t end) {
            const int64_t row = first * kernel.rows;
            pack_rows(kernel, (const char *) data + row * w->nb[1], w->nb[1], std::min(w->ne[1], end * kernel.rows) - row,
                      n_blocks(w), (char *) w->data + first * tile_size);
        };
        // large tensors by two: the time is that of reading the file's pages as much as of packing
        const int64_t half = ggml_nbytes(w) > (1 << 20) && std::thread::hardware_concurrency() > 1 ? n_tiles / 2 : 0;
        std::thread   helper;
        if (half > 0) {
            helper = std::thread(some, 0, half);
        }
        some(half, n_tiles);
        if (helper.joinable()) {
            helper.join();
        }
    }

  private:
    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        if (op->op != GGML_OP_MUL_MAT) {
            size = 0;
            return true;
        }
        const int64_t n_columns = ggml_nrows(op->src[1]);
        size = quantised_size(op) * n_threads + round_up(n_columns * n_blocks(op->src[0]) * kernel.column_bytes, 64);
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        if (op->op == GGML_OP_MUL_MAT) {
            mul_mat(params, op);
        } else {
            get_rows(params, op);
        }
        return true;
    }

    // of one thread's part of a quantised activation row
    size_t quantised_size(const ggml_tensor * op) const {
        return round_up(ggml_row_size(ggml_get_type_traits_cpu(op->src[0]->type)->vec_dot_type, op->src[1]->ne[0]), 64);
    }

    void mul_mat(ggml_compute_params * params, ggml_tensor * dst) const {
        const ggml_tensor * w = dst->src[0];
        const ggml_tensor * x = dst->src[1];
        const int           ith = params->ith, nth = params->nth;
        const int64_t       nb = n_blocks(w), n_columns = ggml_nrows(x), column_size = nb * kernel.column_bytes;
        const ggml_type     quantised = ggml_get_type_traits_cpu(w->type)->vec_dot_type;

        char * own    = (char *) params->wdata + quantised_size(dst) * ith;
        char * groups = (char *) params->wdata + quantised_size(dst) * nth;

        // columns stand in groups of max_columns, a smaller one last; each thread prepares a stretch of every column
        const auto    width = [&](int64_t first) { return (int) std::min<int64_t>(kernel.max_columns, n_columns - first); };
        const int64_t b0 = nb * ith / nth, b1 = nb * (ith + 1) / nth;
        if (b1 > b0) {
            const auto    from_float = ggml_get_type_traits_cpu(quantised)->from_float;
            const int64_t n_values   = (b1 - b0) * kernel.block;
            for (int64_t c = 0; c < n_columns; c++) {
                const int64_t i1 = c % x->ne[1], i2 = c / x->ne[1] % x->ne[2], i3 = c / x->ne[1] / x->ne[2];
                const char *  row   = (const char *) x->data + i1 * x->nb[1] + i2 * x->nb[2] + i3 * x->nb[3];
                const int64_t first = c / kernel.max_columns * kernel.max_columns;
                const int     n     = width(first);
                from_float((const float *) row + b0 * kernel.block, own, n_values);
                kernel.prepare(own, b1 - b0, n, int(c - first), groups + first * column_size + b0 * n * kernel.column_bytes);
            }
        }

        const int64_t tile_size = kernel.tile_size(nb), n_tiles = round_up(w->ne[1], kernel.rows) / kernel.rows;
        const int64_t at_once = columns_at_once / kernel.max_columns * kernel.max_columns; // whole groups
        const int64_t chunk = std::max<int64_t>(1, n_tiles / (nth * 8)), n_chunks = round_up(n_tiles, chunk) / chunk;
        if (ith == 0) {
            ggml_threadpool_chunk_set(params->threadpool, nth);
        }
        ggml_barrier(params->threadpool);

        for (int64_t i = ith; i < n_chunks; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
            const int64_t t0 = i * chunk, t1 = std::min(t0 + chunk, n_tiles);
            for (int64_t c0 = 0; c0 < n_columns; c0 += at_once) {
                const int64_t c1 = std::min(c0 + at_once, n_columns);
                // one group: all its tiles in one call; several: a tile for all of them while it is in the cache
                const int64_t step = c1 - c0 <= kernel.max_columns ? t1 - t0 : 1;
                for (int64_t t = t0; t < t1; t += step) {
                    const int64_t row = t * kernel.rows, n_rows = std::min(step * kernel.rows, w->ne[1] - row);
                    for (int64_t c = c0; c < c1; c += kernel.max_columns) {
                        kernel.multiply[width(c) - 1]((const char *) w->data + t * tile_size, n_rows, nb, groups + c * column_size,
                                                      (float *) ((char *) dst->data + c * dst->nb[1]) + row, dst->nb[1] / 4);
                    }
                }
            }
        }
    }

    void get_rows(ggml_compute_params * params, ggml_tensor * dst) const {
        const ggml_tensor * w   = dst->src[0];
        const ggml_tensor * ids = dst->src[1];
        const int64_t       nb  = n_blocks(w);
        for (int64_t i = params->ith; i < ids->ne[0]; i += params->nth) {
            const int32_t row = *(const int32_t *) ((const char *) ids->data + i * ids->nb[0]);
            GGML_ASSERT(row >= 0 && row < w->ne[1]);
            const char * tile = (const char *) w->data + row / kernel.rows * kernel.tile_size(nb);
            kernel.unpack_row(tile, row % kernel.rows, nb, (float *) ((char *) dst->data + i * dst->nb[1]));
        }
    }
};

// flash attention that edge_slice_mark_attention() has marked, where keys and values are float16
class attention : public ggml::cpu::tensor_traits {
  public:
    static bool takes(const ggml_tensor * op) {
        const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
        return op->op == GGML_OP_FLASH_ATTN_EXT && op->op_params[GGML_MAX_OP_PARAMS / sizeof(int32_t) - 1] && best_isa() &&
               q->type == GGML_TYPE_F32 && k->type == GGML_TYPE_F16 && v->type == GGML_TYPE_F16 &&
               (!mask || mask->type == GGML_TYPE_F16) && k->ne[0] % 16 == 0 && v->ne[0] % 16 == 0 && !op->src[4] &&
               ggml_get_op_params_f32(op, 1) == 0 && ggml_get_op_params_f32(op, 2) == 0; // no ALiBi, no soft cap
    }

    static const EdgeIsa * best_isa() {
        static const EdgeIsa * const best = [] {
            const auto * const * isa = edge_isas;
            while (*isa && !(*isa)->runs_here()) {
                isa++;
            }
            return *isa;
        }();
        return best;
    }

  private:
    static size_t work_bytes(const ggml_tensor * op) {
        return round_up(EdgeAttention::keys_at_once * (op->src[1]->ne[0] + op->src[2]->ne[0]) * sizeof(float), 64);
    }

    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        size = work_bytes(op) * n_threads;
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
        const int64_t      n_tokens = q->ne[1], n_shared = q->ne[2] / k->ne[2]; // query heads per head of keys

        // a job is some rows (tokens × query heads) of one head of keys; with few of them, single rows, to busy all threads
        const int64_t rows = n_tokens * n_shared, n_groups = k->ne[2] * q->ne[3];
        const int64_t fair = rows * n_groups / (4 * params->nth), size = std::clamp<int64_t>(fair, 1, EdgeAttention::max_rows);
        const int64_t jobs = (rows + size - 1) / size;

        EdgeAttention job;
        job.dk           = (int) k->ne[0];
        job.dv           = (int) v->ne[0];
        job.n_keys       = k->ne[1];
        job.key_stride   = k->nb[1];
        job.value_stride = v->nb[1];
        job.scale        = ggml_get_op_params_f32(op, 0);

        if (params->ith == 0) {
            ggml_threadpool_chunk_set(params->threadpool, params->nth);
        }
        ggml_barrier(params->threadpool);
        for (int64_t i = params->ith; i < jobs * n_groups; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
            const int64_t group = i / jobs, seq = group / k->ne[2], head = group % k->ne[2], first = i % jobs * size;
            job.keys   = (const uint8_t *) k->data + head * k->nb[2] + seq / (q->ne[3] / k->ne[3]) * k->nb[3];
            job.values = (const uint8_t *) v->data + head / (k->ne[2] / v->ne[2]) * v->nb[2] + seq / (q->ne[3] / v->ne[3]) * v->nb[3];
            job.n_rows = (int) std::min(size, rows - first);
            for (int r = 0; r < job.n_rows; r++) {
                const int64_t token = (first + r) / n_shared, q_head = head * n_shared + (first + r) % n_shared;
                job.query[r] = (const float *) ((const char *) q->data + token * q->nb[1] + q_head * q->nb[2] + seq * q->nb[3]);
                job.out[r]   = (float *) ((char *) op->data + q_head * op->nb[1] + token * op->nb[2] + seq * op->nb[3]);
                job.mask[r]  = mask ? (const uint16_t *) ((const char *) mask->data + token * mask->nb[1] +
                                                         q_head % mask->ne[2] * mask->nb[2] + seq % mask->ne[3] * mask->nb[3])
                                    : nullptr;
            }
            best_isa()->attend(job, (float *) ((char *) params->wdata + work_bytes(op) * params->ith));
        }
        return true;
    }
};

// the traits of a tensor by the kernel set that is selected, null if it does not take the tensor
traits * selected_traits(const ggml_tensor * w) {
    const EdgeIsa * isa = selected.load();
    if (!isa || w->ne[2] * w->ne[3] != 1) {
        return nullptr;
    }
    for (const auto & known : weight_types) {
        if (known.type == w->type) {
            const EdgeKernel & kernel = *isa->kernels[int(known.weight)];
            if (w->ne[0] % kernel.block != 0) {
                return nullptr;
            }
            static std::vector<traits *> made = [] {
                std::vector<traits *> all;
                for (const auto * const * i = edge_isas; *i; i++) {
                    for (const auto * k : (*i)->kernels) {
                        all.push_back(new traits(*k));
                    }
                }
                return all;
            }();
            for (auto * found : made) {
                if (&found->kernel == &kernel) {
                    return found;
                }
            }
        }
    }
    return nullptr;
}

traits * traits_of(const ggml_tensor * w) {
    return w->extra ? static_cast<traits *>(static_cast<ggml::cpu::tensor_traits *>(w->extra)) : selected_traits(w);
}

// ── buffer type ───────────────────────────────────────────────────────────────────────────────────────────────────────

ggml_status init_tensor(ggml_backend_buffer_t, ggml_tensor * tensor) {
    tensor->extra = static_cast<ggml::cpu::tensor_traits *>(selected_traits(tensor));
    return tensor->extra ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}

void set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    GGML_ASSERT(offset == 0 && size == ggml_nbytes(tensor));
    traits_of(tensor)->pack(tensor, data);
}

const char * get_name(ggml_backend_buffer_type_t) {
    return "CPU_EDGE";
}

size_t get_alignment(ggml_backend_buffer_type_t) {
    return 64;
}

size_t get_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * tensor) {
    const traits * found = traits_of(tensor);
    return found ? found->alloc_size(tensor) : ggml_nbytes(tensor);
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (!buffer) {
        return nullptr;
    }
#ifdef MADV_HUGEPAGE
    // weights are read from end to end for every token: fewer, larger pages
    const uintptr_t page = 4096, base = (uintptr_t) ggml_backend_buffer_get_base(buffer), first = (base + page - 1) / page * page;
    if (base + size > first) {
        madvise((void *) first, (base + size - first) / page * page, MADV_HUGEPAGE);
    }
#endif
    buffer->buft              = buft;
    buffer->iface.init_tensor = init_tensor;
    buffer->iface.set_tensor  = set_tensor;
    buffer->iface.get_tensor  = nullptr;
    buffer->iface.cpy_tensor  = nullptr;
    return buffer;
}

class buffer_type : public ggml::cpu::extra_buffer_type {
    static bool holds(const ggml_tensor * w) { return w && w->buffer && w->buffer->buft == edge_kernels_buffer_type(); }

    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        const ggml_tensor * w = op->src[0];
        if (!holds(w) || w->view_src || !traits_of(w) || (op->src[1]->buffer && !ggml_backend_buft_is_host(op->src[1]->buffer->buft))) {
            return false;
        }
        if (op->op == GGML_OP_GET_ROWS) {
            return op->src[1]->type == GGML_TYPE_I32 && op->src[1]->ne[1] * op->src[1]->ne[2] == 1;
        }
        return op->op == GGML_OP_MUL_MAT && op->src[1]->type == GGML_TYPE_F32;
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        static attention attends;
        if (op->op == GGML_OP_FLASH_ATTN_EXT) {
            return attention::takes(op) ? &attends : nullptr;
        }
        const bool ours = (op->op == GGML_OP_MUL_MAT || op->op == GGML_OP_GET_ROWS) && holds(op->src[0]);
        return ours ? static_cast<ggml::cpu::tensor_traits *>(op->src[0]->extra) : nullptr;
    }
};

} // namespace

ggml_backend_buffer_type_t edge_kernels_buffer_type() {
    static ggml_backend_buffer_type type = {
        /* .iface   = */ { get_name, alloc_buffer, get_alignment, /* .get_max_size = */ nullptr, get_alloc_size, /* .is_host = */ nullptr },
        /* .device  = */ ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
        /* .context = */ new buffer_type(),
    };
    return &type;
}

const char * edge_kernels_available() {
    static const std::string names = [] {
        std::string all;
        for (const auto * const * isa = edge_isas; *isa; isa++) {
            if ((*isa)->runs_here()) {
                all += (all.empty() ? "" : ",") + std::string((*isa)->name);
            }
        }
        return all;
    }();
    return names.c_str();
}

bool edge_kernels_select(const char * name) {
    if (!name) {
        selected = nullptr;
        return true;
    }
    for (const auto * const * isa = edge_isas; *isa; isa++) {
        if (strcmp((*isa)->name, name) == 0 && (*isa)->runs_here()) {
            selected = *isa;
            return true;
        }
    }
    return false;
}

const char * edge_kernels_types() {
    static const std::string names = [] {
        std::string all;
        for (const auto & known : weight_types) {
            all += (all.empty() ? "" : ",") + std::string(ggml_type_name(known.type));
        }
        return all;
    }();
    return names.c_str();
}
