// Attention of some query rows over one head's keys and values (float16), with sums that depend on nothing but the row.
//
// Keys are taken in blocks of a fixed size at fixed places; a running maximum and sum make the softmax (Milakov and
// Gimelshein 2018, as in FlashAttention). A block in which the mask hides everything changes nothing, exactly, so neither
// the rows beside this one nor the room that the cache has reserved matter.
#pragma once

#include "edge-matmul-loop.h"

#include <cmath>

namespace {

constexpr int kKeys = EdgeAttention::keys_at_once;

// the largest or the sum of a block's values, in an order that vectorises
inline float largest(const float * x) {
    float m[kKeys / 2];
    for (int i = 0; i < kKeys / 2; i++) {
        m[i] = x[i] > x[i + kKeys / 2] ? x[i] : x[i + kKeys / 2];
    }
    for (int n = kKeys / 4; n > 0; n /= 2) {
        for (int i = 0; i < n; i++) {
            m[i] = m[i] > m[i + n] ? m[i] : m[i + n];
        }
    }
    return m[0];
}

inline float total(const float * x) {
    float s[kKeys / 2];
    for (int i = 0; i < kKeys / 2; i++) {
        s[i] = x[i] + x[i + kKeys / 2];
    }
    for (int n = kKeys / 4; n > 0; n /= 2) {
        for (int i = 0; i < n; i++) {
            s[i] += s[i + n];
        }
    }
    return s[0];
}

// e^x for x ≤ 0, to about 2e-7 relative; 0 below -87. 2^n · e^r with |r| ≤ ln 2 / 2 and e^r by its series.
inline float exponential(float x) {
    const float   shifted = __builtin_fmaf(x, 1.44269504f, 12582912.0f); // 1.5 · 2^23: rounds to a whole number
    const float   n       = shifted - 12582912.0f;
    const float   r       = __builtin_fmaf(n, -1.42860677e-6f, __builtin_fmaf(n, -0.693145752f, x)); // ln 2 in two parts
    float         p       = 1.0f / 5040;
    p                     = __builtin_fmaf(p, r, 1.0f / 720);
    p                     = __builtin_fmaf(p, r, 1.0f / 120);
    p                     = __builtin_fmaf(p, r, 1.0f / 24);
    p                     = __builtin_fmaf(p, r, 1.0f / 6);
    p                     = __builtin_fmaf(p, r, 0.5f);
    p                     = __builtin_fmaf(p, r, 1.0f);
    p                     = __builtin_fmaf(p, r, 1.0f);
    uint32_t bits; // unsigned: far below -87 the exponent wraps, and is not used
    memcpy(&bits, &shifted, 4);
    bits = (bits - 0x4b400000u + 127u) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : p * power;
}

template <class Isa> void widen(const uint8_t * halves, size_t stride, int n_rows, int n, float * out) {
    for (int r = 0; r < n_rows; r++) {
        for (int i = 0; i < n; i += Isa::rows) {
            Isa::store(out + r * n + i, Isa::halves(halves + r * stride + i * 2));
        }
    }
}

// scores[i] = q · keys[i]
template <class Isa> EDGE_INLINE void dot_keys(const float * q, const float * keys, int dk, float * scores) {
    for (int i = 0; i < kKeys; i += 4) {
        typename Isa::F sums[4];
        unroll<4>(EDGE_EACH(j) { sums[j] = Isa::broadcast(0.0f); });
        for (int d = 0; d < dk; d += Isa::rows) {
            const auto x = Isa::floats(q + d);
            unroll<4>(EDGE_EACH(j) { sums[j] = Isa::fma(x, Isa::floats(keys + (i + j) * dk + d), sums[j]); });
        }
        unroll<4>(EDGE_EACH(j) { scores[i + j] = Isa::total(sums[j]); });
    }
}

// out = rescale · out + Σ weights[i] · values[i], for n vectors of it
template <class Isa, int n> EDGE_INLINE void add_values(const float * weights, const float * values, int dv, float rescale, float * out) {
    typename Isa::F sums[n];
    unroll<n>(EDGE_EACH(j) { sums[j] = Isa::scale(Isa::floats(out + j * Isa::rows), Isa::broadcast(rescale)); });
    for (int i = 0; i < kKeys; i++) {
        const auto w = Isa::broadcast(weights[i]);
        unroll<n>(EDGE_EACH(j) { sums[j] = Isa::fma(w, Isa::floats(values + i * dv + j * Isa::rows), sums[j]); });
    }
    unroll<n>(EDGE_EACH(j) { Isa::store(out + j * Isa::rows, sums[j]); });
}

template <class Isa> void attend(const EdgeAttention & job, float * work) {
    float * keys   = work;
    float * values = keys + kKeys * job.dk;
    float   biggest[EdgeAttention::max_rows], sum[EdgeAttention::max_rows];
    for (int r = 0; r < job.n_rows; r++) {
        biggest[r] = -INFINITY;
        sum[r]     = 0;
        memset(job.out[r], 0, size_t(job.dv) * 4);
    }
    for (int64_t first = 0; first < job.n_keys; first += kKeys) {
        const int n     = int(job.n_keys - first < kKeys ? job.n_keys - first : kKeys);
        bool      ready = false;
        for (int r = 0; r < job.n_rows; r++) {
            alignas(64) float scores[kKeys], mask[kKeys];
            for (int i = 0; i < kKeys; i++) {
                mask[i] = i < n ? 0.0f : -INFINITY;
            }
            if (job.mask[r]) {
                const uint16_t * hidden = job.mask[r] + first;
                if (n == kKeys) {
                    widen<Isa>(reinterpret_cast<const uint8_t *>(hidden), 0, 1, kKeys, mask);
                } else {
                    for (int i = 0; i < n; i++) {
                        mask[i] = half_to_float(hidden[i]);
                    }
                }
                if (largest(mask) == -INFINITY) {
                    continue;
                }
            }
            if (!ready) { // the first row that sees this block
                memset(keys + n * job.dk, 0, size_t(kKeys - n) * job.dk * 4);
                memset(values + n * job.dv, 0, size_t(kKeys - n) * job.dv * 4);
                widen<Isa>(job.keys + first * job.key_stride, job.key_stride, n, job.dk, keys);
                widen<Isa>(job.values + first * job.value_stride, job.value_stride, n, job.dv, values);
                ready = true;
            }
            dot_keys<Isa>(job.query[r], keys, job.dk, scores);
            for (int i = 0; i < kKeys; i++) {
                scores[i] = __builtin_fmaf(scores[i], job.scale, mask[i]);
            }
            const float found = largest(scores), top = found > biggest[r] ? found : biggest[r];
            const float rescale = biggest[r] == top ? 1.0f : exponential(biggest[r] - top);
            for (int i = 0; i < kKeys; i++) {
                scores[i] = exponential(scores[i] - top);
            }
            sum[r]     = __builtin_fmaf(sum[r], rescale, total(scores));
            biggest[r] = top;
            int d = 0;
            for (; d + 4 * Isa::rows <= job.dv; d += 4 * Isa::rows) {
                add_values<Isa, 4>(scores, values + d, job.dv, rescale, job.out[r] + d);
            }
            for (; d < job.dv; d += Isa::rows) {
                add_values<Isa, 1>(scores, values + d, job.dv, rescale, job.out[r] + d);
            }
        }
    }
    for (int r = 0; r < job.n_rows; r++) {
        const float share = sum[r] > 0 ? 1.0f / sum[r] : 0.0f;
        for (int d = 0; d < job.dv; d++) {
            job.out[r][d] *= share;
        }
    }
}

} // namespace
