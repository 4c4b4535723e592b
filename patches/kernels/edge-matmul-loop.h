// The loop, once for every weight type and width. An instruction set gives the primitives as a struct Isa:
//
//     rows, lane_bytes                 lanes of an accumulator, and 4 × rows
//     signed_bytes                     its dot product takes signed weights
//     max_columns                      columns whose sums fit its registers
//     I, F                             a vector of rows × int32 (or × 4 bytes), and of rows × float
//     load, bits<shift, mask>, left<n>, either                    bytes
//     Dot<max>: start(int32), add<g>(weights, 4 activations), sum()   Σ of 4 × bytes, for each row; max: the largest weight
//     byte<i, is_signed>, pairs<odd>, dot_pairs, multiply, add    integers
//     halves, floats, broadcast, to_float, scale, fma, store, total     floats; total: the sum of the lanes
#pragma once

#include "edge-blocks.h"
#include "edge-matmul.h"

#include <type_traits>
#include <utility>

#define EDGE_INLINE inline __attribute__((always_inline))

namespace {

// f(0), f(1), …, as compile-time constants
template <class F, int... i> EDGE_INLINE void unroll_(F && f, std::integer_sequence<int, i...>) {
    (f(std::integral_constant<int, i>{}), ...);
}
template <int n, class F> EDGE_INLINE void unroll(F && f) { unroll_(f, std::make_integer_sequence<int, n>{}); }

#define EDGE_EACH(name) [&](auto name) __attribute__((always_inline))

// Bytes by which weights are asked for before they are used. Processors do it by themselves only while the loop is short:
// with several columns, half the bandwidth was lost without (4 KiB measured better than 1; it may run into the next tile,
// and past the last one, where nothing comes of it).
constexpr int64_t kAhead = 4096;

// One block of n prepared columns: their quants, their scales, and what the weights' offset or minimum is multiplied with.
template <class T> struct Column {
    static constexpr int side_bytes = T::k_quant && T::has_min ? 2 * T::subs : 4 * T::subs;
    static constexpr int bytes      = T::size + 4 + side_bytes; // per block

    const uint8_t * block;
    int             n;

    const int8_t * quants(int c) const { return reinterpret_cast<const int8_t *>(block) + c * T::size; }
    float          scale(int c) const { return read<float>(block + n * T::size + c * 4); }
    const uint8_t * side(int c) const { return block + n * (T::size + 4) + c * side_bytes; }

    // where the sum of sub-block s starts: minus what was added to its weights to make them unsigned
    int32_t        offset(int c, int s) const { return T::has_min ? 0 : read<int32_t>(side(c) + s * 4); }

    template <class V> static V read(const uint8_t * from) {
        V value;
        memcpy(&value, from, sizeof(value));
        return value;
    }
};

template <class T> void prepare(const void * activation, int64_t n_blocks, int n, int c, void * group) {
    const auto * blocks = static_cast<const typename T::Activation *>(activation);
    uint8_t *    out    = static_cast<uint8_t *>(group);
    for (int64_t b = 0; b < n_blocks; b++, out += int64_t(n) * Column<T>::bytes) {
        const auto & a    = blocks[b];
        uint8_t *    side = out + n * (T::size + 4) + c * Column<T>::side_bytes;
        float        d;
        if constexpr (T::k_quant) {
            d = a.d;
            if constexpr (T::has_min) {
                // minus the sums of each sub-block, four by four in the order 0, 2, 1, 3: as `pairs` takes minimums apart
                int16_t sums[T::subs];
                for (int s = 0; s < T::subs; s++) {
                    const int sum = a.bsums[2 * s] + a.bsums[2 * s + 1];
                    sums[s / 4 * 4 + (s % 4 == 1 ? 2 : s % 4 == 2 ? 1 : s % 4)] = int16_t(-sum);
                }
                memcpy(side, sums, sizeof(sums));
            } else {
                int32_t sums[T::subs];
                for (int s = 0; s < T::subs; s++) {
                    sums[s] = -T::offset * a.bsums[s];
                }
                memcpy(side, sums, sizeof(sums));
            }
        } else {
            d = half_to_float(a.d);
            if constexpr (T::has_min) {
                const float s = half_to_float(a.s);
                memcpy(side, &s, 4);
            } else {
                int32_t sum = 0;
                for (int i = 0; i < kQ; i++) {
                    sum += a.qs[i];
                }
                sum *= -T::offset;
                memcpy(side, &sum, 4);
            }
        }
        memcpy(out + c * T::size, a.qs, T::size);
        memcpy(out + n * T::size + c * 4, &d, 4);
    }
}

// the n sums of sub-block s; an instruction set that multiplies several columns at once brings its own
template <class Isa, class T, int n, int s> EDGE_INLINE void dot(const uint8_t * lanes, const Column<T> & columns, typename Isa::I * sums) {
    typename Isa::template Dot<T::max> dots[n];
    unroll<n>(EDGE_EACH(c) {
        dots[c].start(columns.offset(c, s));
    });
    unroll<T::groups>(EDGE_EACH(g) {
        const auto w = T::template weights<Isa, s, g>(lanes);
        unroll<n>(EDGE_EACH(c) { dots[c].template add<g>(w, columns.quants(c) + (s * T::groups + g) * 4); });
    });
    unroll<n>(EDGE_EACH(c) { sums[c] = dots[c].sum(); });
}

template <class Isa, class T, int n>
EDGE_INLINE void add_block(const uint8_t * halves, const uint8_t * lanes, const Column<T> & columns, typename Isa::F * acc) {
    using I = typename Isa::I;
    I sums[n];
    if constexpr (!T::k_quant) {
        Isa::template dot_columns<T, n, 0>(lanes, columns, sums);
    } else {
        unroll<T::subs>(EDGE_EACH(s) {
            I part[n];
            Isa::template dot_columns<T, n, s>(lanes, columns, part);
            const I scale = Isa::template byte<s % 4, T::signed_scales>(Isa::load(lanes + (T::scale_lane + s / 4) * Isa::lane_bytes));
            unroll<n>(EDGE_EACH(c) {
                const I scaled = Isa::multiply(part[c], scale);
                sums[c]        = s == 0 ? scaled : Isa::add(sums[c], scaled);
            });
        });
    }
    const auto d = Isa::halves(halves);
    unroll<n>(EDGE_EACH(c) {
        acc[c] = Isa::fma(Isa::to_float(sums[c]), Isa::scale(d, Isa::broadcast(columns.scale(c))), acc[c]);
    });
    if constexpr (T::has_min) {
        const auto m = Isa::halves(halves + Isa::rows * 2);
        if constexpr (T::k_quant) {
            I mins[n];
            unroll<T::subs / 4>(EDGE_EACH(l) {
                const I four = Isa::load(lanes + (T::min_lane + l) * Isa::lane_bytes);
                const I even = Isa::template pairs<0>(four), odd = Isa::template pairs<1>(four);
                unroll<n>(EDGE_EACH(c) {
                    const I first = l == 0 ? Isa::zero() : mins[c];
                    mins[c] = Isa::dot_pairs(Isa::dot_pairs(first, even, columns.side(c) + l * 8), odd, columns.side(c) + l * 8 + 4);
                });
            });
            unroll<n>(EDGE_EACH(c) {
                acc[c] = Isa::fma(Isa::to_float(mins[c]), Isa::scale(m, Isa::broadcast(columns.scale(c))), acc[c]);
            });
        } else {
            unroll<n>(EDGE_EACH(c) {
                acc[c] = Isa::fma(m, Isa::broadcast(Column<T>::template read<float>(columns.side(c))), acc[c]);
            });
        }
    }
}

template <class Isa, class T, int n>
void multiply(const void * tiles, int64_t n_rows, int64_t n_blocks, const void * group, float * out, int64_t stride) {
    using Layout = Tile<T, Isa::rows>;
    const uint8_t * tile = static_cast<const uint8_t *>(tiles);
    for (int64_t row = 0; row < n_rows; row += Isa::rows, tile += Layout::size(n_blocks)) {
        typename Isa::F acc[n];
        unroll<n>(EDGE_EACH(c) { acc[c] = Isa::broadcast(0.0f); });
        const uint8_t * halves = tile;
        const uint8_t * lanes  = tile + Layout::halves_size(n_blocks);
        Column<T>       columns{ static_cast<const uint8_t *>(group), n };
        for (int64_t b = 0; b < n_blocks; b++) {
            for (int64_t at = 0; at < Layout::lane_bytes; at += 64) {
                __builtin_prefetch(lanes + kAhead + at);
            }
            add_block<Isa, T, n>(halves, lanes, columns, acc);
            halves += Layout::half_bytes;
            lanes += Layout::lane_bytes;
            columns.block += n * Column<T>::bytes;
        }
        if (n_rows - row >= Isa::rows) {
            unroll<n>(EDGE_EACH(c) { Isa::store(out + c * stride + row, acc[c]); });
        } else {
            unroll<n>(EDGE_EACH(c) {
                float last[Isa::rows];
                Isa::store(last, acc[c]);
                memcpy(out + c * stride + row, last, size_t(n_rows - row) * 4);
            });
        }
    }
}

// ── one row of a tile, in plain C++ ───────────────────────────────────────────────────────────────────────────────────

template <int R> struct OneRow {
    using I = uint32_t;
    static constexpr int lane_bytes = R * 4;

    static I load(const uint8_t * at) { return word(at, 0); }
    template <int shift, int mask> static I bits(I v) { return v >> shift & mask * 0x01010101u; }
    template <int by> static I left(I v) { return v << by; }
    static I either(I a, I b) { return a | b; }
};

template <class T, int R> void unpack_row(const void * tile, int r, int64_t n_blocks, float * out) {
    using Layout = Tile<T, R>;
    const uint8_t * halves = static_cast<const uint8_t *>(tile) + r * 2;
    const uint8_t * lanes  = static_cast<const uint8_t *>(tile) + Layout::halves_size(n_blocks) + r * 4;
    for (int64_t b = 0; b < n_blocks; b++, halves += Layout::half_bytes, lanes += Layout::lane_bytes) {
        const float d = half_to_float(Column<T>::template read<uint16_t>(halves));
        float       m = 0;
        if constexpr (T::has_min) {
            m = half_to_float(Column<T>::template read<uint16_t>(halves + R * 2));
        }
        unroll<T::subs>(EDGE_EACH(s) {
            float scale = d, min = m;
            if constexpr (T::k_quant) {
                const uint8_t found = lanes[(T::scale_lane + s / 4) * R * 4 + s % 4];
                scale               = d * (T::signed_scales ? float(int8_t(found)) : float(found));
                if constexpr (T::has_min) {
                    min = -m * float(lanes[(T::min_lane + s / 4) * R * 4 + s % 4]);
                }
            }
            unroll<T::groups>(EDGE_EACH(g) {
                const uint32_t four = T::template weights<OneRow<R>, s, g>(lanes);
                for (int i = 0; i < 4; i++) {
                    const int byte = four >> (8 * i) & 255;
                    const int q    = T::max == kSigned ? int8_t(byte) : byte - T::offset;
                    *out++         = T::has_min ? scale * float(q) + min : scale * float(q);
                }
            });
        });
    }
}

// ── tables ────────────────────────────────────────────────────────────────────────────────────────────────────────────

template <class Isa, class T, int... i> constexpr EdgeKernel kernel_(std::integer_sequence<int, i...>) {
    return { Isa::rows, T::size, Isa::max_columns, Column<T>::bytes, Tile<T, Isa::rows>::size, Tile<T, Isa::rows>::pack,
             unpack_row<T, Isa::rows>, prepare<T>, { multiply<Isa, T, i + 1>... } };
}

template <class Isa, class T> constexpr EdgeKernel kernel = kernel_<Isa, T>(std::make_integer_sequence<int, Isa::max_columns>{});

} // namespace
