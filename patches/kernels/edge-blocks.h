// The block formats of GGUF that the kernels read, and how sixteen, eight or four rows of them lie side by side in a tile.
//
// A tile holds R rows (the lanes of one accumulator), block after block along the rows:
//
//     [halves: per block R × d, then R × m where the type has one; padded to 64 bytes]
//     [per block: lanes of 4 bytes × R rows]
//
// Lane l of a block is bytes 4l … 4l + 3 of its quants in the file, for each of the R rows: packing is a transposition of
// 32-bit words and nothing else, but for the 6-bit scales of Q4_K and Q5_K, which become bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {  // each instruction set compiles its own copy: a shared one could hold instructions that another CPU lacks

constexpr int kQ = 32;  // weights of a small block
constexpr int kK = 256; // weights of a K-quant's block
constexpr int kSigned = -1; // in place of the largest unsigned weight: these are signed bytes

struct BlockQ4_0 { uint16_t d; uint8_t qs[16]; };
struct BlockQ4_1 { uint16_t d, m; uint8_t qs[16]; };
struct BlockQ5_0 { uint16_t d; uint8_t qh[4]; uint8_t qs[16]; };
struct BlockQ5_1 { uint16_t d, m; uint8_t qh[4]; uint8_t qs[16]; };
struct BlockQ8_0 { uint16_t d; int8_t qs[32]; };
struct BlockQ4_K { uint16_t d, m; uint8_t scales[12]; uint8_t qs[128]; };
struct BlockQ5_K { uint16_t d, m; uint8_t scales[12]; uint8_t qh[32]; uint8_t qs[128]; };
struct BlockQ6_K { uint8_t ql[128]; uint8_t qh[64]; int8_t scales[16]; uint16_t d; };

// activations, as ggml quantises them
struct BlockA8_0 { uint16_t d; int8_t qs[32]; };
struct BlockA8_1 { uint16_t d, s; int8_t qs[32]; };
struct BlockA8_K { float d; int8_t qs[256]; int16_t bsums[16]; };

inline float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
    float          value;
    uint32_t       bits;
    if (exponent == 0) { // zero or subnormal: mantissa × 2^-24, exact
        value = float(mantissa) * 5.9604644775390625e-8f;
        memcpy(&bits, &value, 4);
    } else {
        bits = (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    }
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t word(const void * bytes, int index) {
    uint32_t value;
    memcpy(&value, static_cast<const uint8_t *>(bytes) + 4 * index, 4);
    return value;
}

inline uint32_t word_of(const uint8_t * b) { return word(b, 0); }

constexpr int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// the 6-bit scale and minimum of sub-block j
inline void scale_and_min(const uint8_t * q, int j, uint8_t & scale, uint8_t & min) {
    if (j < 4) {
        scale = q[j] & 63;
        min   = q[j + 4] & 63;
    } else {
        scale = (q[j + 4] & 15) | (q[j - 4] >> 6) << 4;
        min   = (q[j + 4] >> 4) | (q[j] >> 6) << 4;
    }
}

// ── weight types ──────────────────────────────────────────────────────────────────────────────────────────────────────
//
// Each says how a block becomes lanes (`lane`), what the largest unsigned weight is (`max`), how many weights share an
// integer scale (4 × `groups`), and how weight vectors are made from lanes (`weights<Isa, s, g>`: the 4 weights of group g
// in sub-block s, for each row).

struct Q4_0 {
    using Block      = BlockQ4_0;
    using Activation = BlockA8_0;
    static constexpr int  size = kQ, lanes = 4, halves = 1, groups = 8, subs = 1, max = 15, offset = 8;
    static constexpr bool k_quant = false, has_min = false;

    static uint16_t half(const Block & b, int) { return b.d; }
    static uint32_t lane(const Block & b, int l) { return word(b.qs, l); }

    template <class Isa, int s, int g> static typename Isa::I weights(const uint8_t * lanes) {
        return Isa::template bits<(g / 4) * 4, 15>(Isa::load(lanes + (g % 4) * Isa::lane_bytes));
    }
};

struct Q4_1 : Q4_0 {
    using Block      = BlockQ4_1;
    using Activation = BlockA8_1;
    static constexpr int  halves = 2, offset = 0;
    static constexpr bool has_min = true;

    static uint16_t half(const Block & b, int i) { return i ? b.m : b.d; }
    static uint32_t lane(const Block & b, int l) { return word(b.qs, l); }
};

// as Q4_0, and a lane with the fifth bits: bit g of byte i is that of weight 4g + i
struct Q5_0 : Q4_0 {
    using Block = BlockQ5_0;
    static constexpr int lanes = 5, max = 31, offset = 16;

    static uint16_t half(const Block & b, int) { return b.d; }
    template <class B> static uint32_t lane_of(const B & b, int l) {
        if (l < 4) {
            return word(b.qs, l);
        }
        uint32_t bits = 0;
        for (int w = 0; w < 32; w++) {
            bits |= (word(b.qh, 0) >> w & 1) << (w % 4 * 8 + w / 4);
        }
        return bits;
    }
    static uint32_t lane(const Block & b, int l) { return lane_of(b, l); }

    template <class Isa, int s, int g> static typename Isa::I weights(const uint8_t * lanes) {
        const auto high = Isa::template bits<g, 1>(Isa::load(lanes + 4 * Isa::lane_bytes));
        return Isa::either(Q4_0::weights<Isa, s, g>(lanes), Isa::template left<4>(high));
    }
};

struct Q5_1 : Q5_0 {
    using Block      = BlockQ5_1;
    using Activation = BlockA8_1;
    static constexpr int  halves = 2, offset = 0;
    static constexpr bool has_min = true;

    static uint16_t half(const Block & b, int i) { return i ? b.m : b.d; }
    static uint32_t lane(const Block & b, int l) { return lane_of(b, l); }
};

// with 128 added where the instruction set multiplies unsigned by signed bytes
template <bool is_signed> struct Q8_0 {
    using Block      = BlockQ8_0;
    using Activation = BlockA8_0;
    static constexpr int  size = kQ, lanes = 8, halves = 1, groups = 8, subs = 1;
    static constexpr int  max = is_signed ? kSigned : 255, offset = is_signed ? 0 : 128;
    static constexpr bool k_quant = false, has_min = false;

    static uint16_t half(const Block & b, int) { return b.d; }
    static uint32_t lane(const Block & b, int l) { return word(b.qs, l) ^ (is_signed ? 0 : 0x80808080u); }

    template <class Isa, int s, int g> static typename Isa::I weights(const uint8_t * lanes) {
        return Isa::load(lanes + g * Isa::lane_bytes);
    }
};

// lanes: 2 of scales, 2 of minimums, then the quants
struct Q4_K {
    using Block      = BlockQ4_K;
    using Activation = BlockA8_K;
    static constexpr int  size = kK, lanes = 36, halves = 2, groups = 8, subs = 8, max = 15, offset = 0;
    static constexpr int  scale_lane = 0, min_lane = 2;
    static constexpr bool k_quant = true, has_min = true, signed_scales = false;

    static uint16_t half(const Block & b, int i) { return i ? b.m : b.d; }

    template <class B> static uint32_t scale_lane_of(const B & b, int l) {
        uint8_t found[4], other;
        for (int i = 0; i < 4; i++) {
            l < 2 ? scale_and_min(b.scales, 4 * l + i, found[i], other)
                  : scale_and_min(b.scales, 4 * (l - 2) + i, other, found[i]);
        }
        return word_of(found);
    }
    static uint32_t lane(const Block & b, int l) { return l < 4 ? scale_lane_of(b, l) : word(b.qs, l - 4); }

    template <class Isa, int s, int g> static typename Isa::I weights(const uint8_t * lanes) {
        return Isa::template bits<(s % 2) * 4, 15>(Isa::load(lanes + (4 + s / 2 * 8 + g) * Isa::lane_bytes));
    }
};

// as Q4_K, and 8 lanes with the fifth bits after the minimums
struct Q5_K : Q4_K {
    using Block = BlockQ5_K;
    static constexpr int lanes = 44, max = 31;

    static uint16_t half(const Block & b, int i) { return i ? b.m : b.d; }
    static uint32_t lane(const Block & b, int l) {
        return l < 4 ? scale_lane_of(b, l) : l < 12 ? word(b.qh, l - 4) : word(b.qs, l - 12);
    }

    template <class Isa, int s, int g> static typename Isa::I weights(const uint8_t * lanes) {
        const auto low  = Isa::template bits<(s % 2) * 4, 15>(Isa::load(lanes + (12 + s / 2 * 8 + g) * Isa::lane_bytes));
        const auto high = Isa::template bits<s, 1>(Isa::load(lanes + (4 + g) * Isa::lane_bytes));
        return Isa::either(low, Isa::template left<4>(high));
    }
};

// lanes: 4 of signed scales, one for every 16 weights, 32 of low bits, 16 of high bits
struct Q6_K {
    using Block      = BlockQ6_K;
    using Activation = BlockA8_K;
    static constexpr int  size = kK, lanes = 52, halves = 1, groups = 4, subs = 16, max = 63, offset = 32;
    static constexpr int  scale_lane = 0;
    static constexpr bool k_quant = true, has_min = false, signed_scales = true;

    static uint16_t half(const Block & b, int) { return b.d; }
    static uint32_t lane(const Block & b, int l) {
        return l < 4 ? word(b.scales, l) : l < 36 ? word(b.ql, l - 4) : word(b.qh, l - 36);
    }

    template <class Isa, int s, int g> static typename Isa::I weights(const uint8_t * lanes) {
        constexpr int part = s / 8, quarter = s / 2 % 4, at = s % 2 * 4 + g; // 32 weights share a place in ql and qh
        const auto low  = Isa::template bits<(quarter / 2) * 4, 15>(
            Isa::load(lanes + (4 + part * 16 + (quarter % 2) * 8 + at) * Isa::lane_bytes));
        const auto high = Isa::template bits<quarter * 2, 3>(Isa::load(lanes + (36 + part * 8 + at) * Isa::lane_bytes));
        return Isa::either(low, Isa::template left<4>(high));
    }
};

// ── tiles ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

template <class T, int R> struct Tile {
    static constexpr int64_t half_bytes = int64_t(T::halves) * R * 2; // of one block
    static constexpr int64_t lane_bytes = int64_t(T::lanes) * R * 4;  // of one block

    static int64_t halves_size(int64_t n_blocks) { return padded(n_blocks * half_bytes); }
    static int64_t size(int64_t n_blocks) { return halves_size(n_blocks) + n_blocks * lane_bytes; }

    // n_rows ≤ R rows of a file, `row_bytes` apart, into a tile; the other rows become zero
    static void pack(const void * rows, size_t row_bytes, int n_rows, int64_t n_blocks, void * tile) {
        uint8_t * out = static_cast<uint8_t *>(tile);
        memset(out, 0, size(n_blocks));
        uint8_t * body = out + halves_size(n_blocks);
        for (int r = 0; r < n_rows; r++) {
            const auto * blocks = reinterpret_cast<const typename T::Block *>(static_cast<const char *>(rows) + r * row_bytes);
            for (int64_t b = 0; b < n_blocks; b++) {
                typename T::Block block;
                memcpy(&block, blocks + b, sizeof(block));
                for (int i = 0; i < T::halves; i++) {
                    const uint16_t h = T::half(block, i);
                    memcpy(out + b * half_bytes + (i * R + r) * 2, &h, 2);
                }
                for (int l = 0; l < T::lanes; l++) {
                    const uint32_t w = T::lane(block, l);
                    memcpy(body + b * lane_bytes + (l * R + r) * 4, &w, 4);
                }
            }
        }
    }
};

} // namespace
