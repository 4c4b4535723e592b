// What the kernels must compute, written from the GGUF format and from edge-matmul.h alone: slow, plain, and sharing nothing
// with the code under test.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

enum class Type { q4_0, q8_0, q4_K, q6_K, q4_1, q5_K, q5_0, q5_1, count }; // in the order of EdgeWeight

struct Format {
    const char * name;
    int          weights, bytes;                   // of a block
    int          per_scale;                        // weights that share an integer scale
    bool         k_quant, has_min;
    int          halves[2];                        // where d and m stand in a block, -1 if it has no m
    int          scales, n_scales;                 // where the integer scales stand
    int          a_bytes, a_quants;                // a block of activations, and where its quants stand
};

inline const Format & format(Type type) {
    static const Format formats[] = {
        { "q4_0", 32, 18, 32, false, false, { 0, -1 }, 0, 0, 34, 2 },
        { "q8_0", 32, 34, 32, false, false, { 0, -1 }, 0, 0, 34, 2 },
        { "q4_K", 256, 144, 32, true, true, { 0, 2 }, 4, 12, 292, 4 },
        { "q6_K", 256, 210, 16, true, false, { 208, -1 }, 192, 16, 292, 4 },
        { "q4_1", 32, 20, 32, false, true, { 0, 2 }, 0, 0, 36, 4 },
        { "q5_K", 256, 176, 32, true, true, { 0, 2 }, 4, 12, 292, 4 },
        { "q5_0", 32, 22, 32, false, false, { 0, -1 }, 0, 0, 34, 2 },
        { "q5_1", 32, 24, 32, false, true, { 0, 2 }, 0, 0, 36, 4 },
    };
    return formats[int(type)];
}

template <class V> V read_as(const uint8_t * from) {
    V value;
    memcpy(&value, from, sizeof(value));
    return value;
}

inline double half_value(const uint8_t * from) {
    const int    bits = read_as<uint16_t>(from), exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double size = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    return bits & 0x8000 ? -size : size;
}

// weight i is d · q + m in a small block, d · scale · q - m · min in a K-quant's, without the second term where has_min says so
struct Block {
    double d = 0, m = 0;
    int    q[256] = {}, scale[16], min[16] = {};
};

inline Block decode(Type type, const uint8_t * b) {
    const Format & f = format(type);
    Block          block;
    block.d = half_value(b + f.halves[0]);
    block.m = f.has_min ? half_value(b + f.halves[1]) : 0;
    for (int s = 0; s < 16; s++) {
        block.scale[s] = 1;
    }
    int * q = block.q;
    switch (type) {
        case Type::q8_0:
            for (int i = 0; i < 32; i++) {
                q[i] = int8_t(b[2 + i]);
            }
            break;
        case Type::q4_0:
        case Type::q4_1:
        case Type::q5_0:
        case Type::q5_1: {
            const bool      five = type == Type::q5_0 || type == Type::q5_1;
            const uint8_t * rest = b + (f.has_min ? 4 : 2);
            const uint32_t  high = five ? read_as<uint32_t>(rest) : 0;
            const uint8_t * low  = rest + (five ? 4 : 0);
            const int       zero = f.has_min ? 0 : five ? 16 : 8;
            for (int i = 0; i < 16; i++) {
                q[i]      = int((low[i] & 15) + (high >> i & 1) * 16) - zero;
                q[i + 16] = int((low[i] >> 4) + (high >> (i + 16) & 1) * 16) - zero;
            }
            break;
        }
        case Type::q4_K:
        case Type::q5_K: {
            const uint8_t * six = b + 4; // eight scales and eight minimums of 6 bits
            for (int s = 0; s < 8; s++) {
                block.scale[s] = s < 4 ? six[s] % 64 : six[s + 4] % 16 + six[s - 4] / 64 * 16;
                block.min[s]   = s < 4 ? six[s + 4] % 64 : six[s + 4] / 16 + six[s] / 64 * 16;
            }
            const bool      five = type == Type::q5_K;
            const uint8_t * high = b + 16;
            const uint8_t * low  = b + (five ? 48 : 16);
            for (int i = 0; i < 256; i++) {
                const int s = i / 32, byte = low[s / 2 * 32 + i % 32];
                q[i] = (s % 2 ? byte / 16 : byte % 16) + (five && (high[i % 32] >> s & 1) ? 16 : 0);
            }
            break;
        }
        case Type::q6_K:
            for (int s = 0; s < 16; s++) {
                block.scale[s] = int8_t(b[192 + s]);
            }
            for (int half = 0; half < 2; half++) {
                const uint8_t * low  = b + half * 64;
                const uint8_t * high = b + 128 + half * 32;
                for (int l = 0; l < 32; l++) {
                    int * at = q + half * 128 + l;
                    at[0]    = (low[l] % 16 + (high[l] & 3) * 16) - 32;
                    at[32]   = (low[l + 32] % 16 + (high[l] >> 2 & 3) * 16) - 32;
                    at[64]   = (low[l] / 16 + (high[l] >> 4 & 3) * 16) - 32;
                    at[96]   = (low[l + 32] / 16 + (high[l] >> 6) * 16) - 32;
                }
            }
            break;
        case Type::count: break;
    }
    return block;
}

inline std::vector<Block> decode_row(Type type, const uint8_t * row, int n_blocks) {
    std::vector<Block> blocks;
    for (int b = 0; b < n_blocks; b++) {
        blocks.push_back(decode(type, row + b * format(type).bytes));
    }
    return blocks;
}

inline double weight(const Format & f, const Block & b, int i) {
    const int    s     = i / f.per_scale;
    const double value = b.d * b.scale[s] * b.q[i];
    return !f.has_min ? value : f.k_quant ? value - b.m * b.min[s] : value + b.m;
}

struct Activation {
    double         d;
    double         sum; // q8_1: d · Σ q as the file's half says it
    const int8_t * q;
};

inline Activation activation(const Format & f, const uint8_t * block) {
    const auto * q = reinterpret_cast<const int8_t *>(block + f.a_quants);
    if (f.k_quant) {
        return { read_as<float>(block), 0, q };
    }
    return { half_value(block), f.has_min ? half_value(block + 2) : 0, q };
}

// ── the value, in double ──────────────────────────────────────────────────────────────────────────────────────────────

struct Value {
    double sum = 0, size = 0; // Σ of the terms and of their magnitudes
};

inline Value product(const Format & f, const std::vector<Block> & row, const uint8_t * column) {
    Value value;
    for (const Block & b : row) {
        const Activation a = activation(f, column);
        for (int i = 0; i < f.weights; i++) {
            const int    s    = i / f.per_scale;
            const double term = b.d * b.scale[s] * b.q[i] * a.d * a.q[i];
            const double min  = b.m * b.min[s] * a.d * a.q[i]; // 0 in a small block
            value.sum += term - min;
            value.size += std::fabs(term) + std::fabs(min);
        }
        if (f.has_min && !f.k_quant) {
            value.sum += b.m * a.sum;
            value.size += std::fabs(b.m * a.sum);
        }
        column += f.a_bytes;
    }
    return value;
}

// How far a float result may be from it. The sums of integers are exact; a block then rounds an integer to float, a product of
// scales, and an fma, perhaps twice. Each rounding errs by 2^-24 of what it rounds, which no term exceeds by more than the sum
// of all magnitudes, and the errors of fma add up block by block: (2 · blocks + 2) roundings, of `size` at most. A product that
// is less than a normal float errs by half of the smallest one, times an integer of at most 2^29 (q6_K at its extremes).
inline double tolerance(const Value & value, int n_blocks) {
    return (2 * n_blocks + 4) * std::ldexp(value.size, -24) + n_blocks * std::ldexp(1, 29 - 149);
}

// ── the arithmetic of edge-matmul.h, rounding by rounding ─────────────────────────────────────────────────────────────────

inline float exact_product(const Format & f, const std::vector<Block> & row, const uint8_t * column) {
    float acc = 0;
    for (const Block & b : row) {
        const Activation a = activation(f, column);
        int64_t          sum = 0, mins = 0;
        for (int i = 0; i < f.weights; i++) {
            sum += b.scale[i / f.per_scale] * b.q[i] * a.q[i];
            mins -= b.min[i / f.per_scale] * a.q[i];
        }
        const float d = float(b.d) * float(a.d);
        acc           = std::fma(float(int32_t(sum)), d, acc);
        if (f.k_quant && f.has_min) {
            const float m = float(b.m) * float(a.d);
            acc           = std::fma(float(int32_t(mins)), m, acc);
        } else if (f.has_min) {
            acc = std::fma(float(b.m), float(a.sum), acc);
        }
        column += f.a_bytes;
    }
    return acc;
}
