// What AVX2 and AVX-VNNI share: 8 rows in a register. They differ in how bytes are multiplied.
#pragma once

#include "edge-isa.h"

#include <immintrin.h>

namespace {

struct Avx2Base {
    using I = __m256i;
    using F = __m256;
    static constexpr int rows = 8, lane_bytes = 32;

    static EDGE_INLINE I zero() { return _mm256_setzero_si256(); }
    static EDGE_INLINE I load(const uint8_t * at) { return _mm256_loadu_si256(reinterpret_cast<const I *>(at)); }
    static EDGE_INLINE I four(const int8_t * a) { return _mm256_set1_epi32(int(word(a, 0))); }
    template <int shift, int mask> static EDGE_INLINE I bits(I v) {
        return _mm256_and_si256(shift ? _mm256_srli_epi16(v, shift) : v, _mm256_set1_epi8(mask));
    }
    template <int by> static EDGE_INLINE I left(I v) { return _mm256_slli_epi16(v, by); }
    static EDGE_INLINE I either(I a, I b) { return _mm256_or_si256(a, b); }

    template <int i, bool is_signed> static EDGE_INLINE I byte(I v) {
        if (is_signed) {
            return _mm256_srai_epi32(_mm256_slli_epi32(v, 24 - 8 * i), 24);
        }
        return _mm256_and_si256(_mm256_srli_epi32(v, 8 * i), _mm256_set1_epi32(255));
    }
    template <int odd> static EDGE_INLINE I pairs(I v) {
        return odd ? _mm256_srli_epi16(v, 8) : _mm256_and_si256(v, _mm256_set1_epi16(255));
    }
    static EDGE_INLINE I dot_pairs(I sum, I pair, const uint8_t * a) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pair, _mm256_set1_epi32(int(word(a, 0)))));
    }
    static EDGE_INLINE I multiply(I a, I b) { return _mm256_mullo_epi32(a, b); }
    static EDGE_INLINE I add(I a, I b) { return _mm256_add_epi32(a, b); }

    static EDGE_INLINE F halves(const uint8_t * at) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at)));
    }
    static EDGE_INLINE F floats(const float * at) { return _mm256_loadu_ps(at); }
    static EDGE_INLINE float total(F v) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two  = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    static EDGE_INLINE F broadcast(float v) { return _mm256_set1_ps(v); }
    static EDGE_INLINE F to_float(I v) { return _mm256_cvtepi32_ps(v); }
    static EDGE_INLINE F scale(F a, F b) { return _mm256_mul_ps(a, b); }
    static EDGE_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static EDGE_INLINE void store(float * at, F v) { _mm256_storeu_ps(at, v); }
};

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

} // namespace
