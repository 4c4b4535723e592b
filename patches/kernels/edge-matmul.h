// Weights × a few columns, on packed tiles. Knows nothing of ggml, so that it can be tested and cross-built alone.
//
// What is computed, for every row r and column c, block b after block b along the row, in this order and with these roundings:
//
//     small blocks:  sum = Σ q[r][b][i] · a[c][b][i]              exact, in int32
//                    acc = fma(float(sum), d_w · d_a, acc)        and, with a minimum, acc = fma(m_w, s_a, acc)
//     K-quants:      sum = Σ_s scale[s] · Σ q · a                 exact, in int32
//                    acc = fma(float(sum), d_w · d_a, acc)        and acc = fma(float(-Σ_s min[s] · Σ a), m_w · d_a, acc)
//
// Nothing in it depends on the other columns, on the thread, or on the instruction set: every kernel gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

enum class EdgeWeight { q4_0, q8_0, q4_K, q6_K, q4_1, q5_K, q5_0, q5_1, count };

struct EdgeKernel {
    int rows;          // of a tile
    int block;         // weights in a block: 32 or 256
    int max_columns;   // of a group
    int column_bytes;  // of one prepared column, per block

    // bytes of a tile of rows with n_blocks blocks each
    int64_t (*tile_size)(int64_t n_blocks);
    // up to `rows` rows of a GGUF tensor, `row_bytes` apart, into a tile
    void (*pack)(const void * source, size_t row_bytes, int n_rows, int64_t n_blocks, void * tile);
    // row r of a tile as floats
    void (*unpack_row)(const void * tile, int r, int64_t n_blocks, float * out);
    // a quantised activation row (block_q8_0, block_q8_1 or block_q8_K) as column c of a group of n columns
    void (*prepare)(const void * activation, int64_t n_blocks, int n, int c, void * group);
    // multiply[n - 1]: tiles × a group of n columns; out[c · stride + r] for the first n_rows rows
    void (*multiply[16])(const void * tiles, int64_t n_rows, int64_t n_blocks, const void * group, float * out, int64_t stride);
};

// Some query rows against one head's keys and values, float16.
struct EdgeAttention {
    static constexpr int max_rows = 16;
    static constexpr int keys_at_once = 32;

    int              n_rows, dk, dv; // dk and dv: multiples of 16
    int64_t          n_keys;
    const uint8_t *  keys;
    const uint8_t *  values;
    size_t           key_stride, value_stride; // bytes
    float            scale;
    const float *    query[max_rows];
    const uint16_t * mask[max_rows]; // float16, added to the scaled scores; null: nothing is hidden
    float *          out[max_rows];

    int64_t work_floats() const { return int64_t(keys_at_once) * (dk + dv); }
};

struct EdgeIsa {
    const char *       name;
    bool (*            runs_here)(); // whether this CPU has the instructions
    const EdgeKernel * kernels[int(EdgeWeight::count)];
    void (*            attend)(const EdgeAttention & job, float * work);
};

// all that were compiled, best first; ends with a null pointer
extern const EdgeIsa * const edge_isas[];
