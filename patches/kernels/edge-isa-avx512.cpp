// AVX-512 with VNNI: 16 rows in a register.
#include "edge-isa.h"

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // in GCC 12's own intrinsics
#include <immintrin.h>

namespace {

struct Avx512 {
    using I = __m512i;
    using F = __m512;
    static constexpr int  rows = 16, lane_bytes = 64, max_columns = 8;
    static constexpr bool signed_bytes = false;

    static EDGE_INLINE I zero() { return _mm512_setzero_si512(); }
    static EDGE_INLINE I load(const uint8_t * at) { return _mm512_loadu_si512(at); }
    template <int shift, int mask> static EDGE_INLINE I bits(I v) {
        return _mm512_and_si512(shift ? _mm512_srli_epi16(v, shift) : v, _mm512_set1_epi8(mask));
    }
    template <int by> static EDGE_INLINE I left(I v) { return _mm512_slli_epi16(v, by); }
    static EDGE_INLINE I either(I a, I b) { return _mm512_or_si512(a, b); }

    template <int> struct Dot {
        I total;
        EDGE_INLINE void start(int32_t offset) { total = _mm512_set1_epi32(offset); }
        template <int> EDGE_INLINE void add(I w, const int8_t * a) {
            total = _mm512_dpbusd_epi32(total, w, _mm512_set1_epi32(int(word(a, 0))));
        }
        EDGE_INLINE I sum() const { return total; }
    };
    template <class T, int n, int s> static EDGE_INLINE void dot_columns(const uint8_t * lanes, const Column<T> & columns, I * sums) {
        dot<Avx512, T, n, s>(lanes, columns, sums);
    }

    template <int i, bool is_signed> static EDGE_INLINE I byte(I v) {
        if (is_signed) {
            return _mm512_srai_epi32(_mm512_slli_epi32(v, 24 - 8 * i), 24);
        }
        return _mm512_and_si512(_mm512_srli_epi32(v, 8 * i), _mm512_set1_epi32(255));
    }
    template <int odd> static EDGE_INLINE I pairs(I v) {
        return odd ? _mm512_srli_epi16(v, 8) : _mm512_and_si512(v, _mm512_set1_epi16(255));
    }
    static EDGE_INLINE I dot_pairs(I sum, I pair, const uint8_t * a) {
        return _mm512_dpwssd_epi32(sum, pair, _mm512_set1_epi32(int(word(a, 0))));
    }
    static EDGE_INLINE I multiply(I a, I b) { return _mm512_mullo_epi32(a, b); }
    static EDGE_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }

    static EDGE_INLINE F halves(const uint8_t * at) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(at)));
    }
    static EDGE_INLINE F floats(const float * at) { return _mm512_loadu_ps(at); }
    static EDGE_INLINE float total(F v) { return _mm512_reduce_add_ps(v); }
    static EDGE_INLINE F broadcast(float v) { return _mm512_set1_ps(v); }
    static EDGE_INLINE F to_float(I v) { return _mm512_cvtepi32_ps(v); }
    static EDGE_INLINE F scale(F a, F b) { return _mm512_mul_ps(a, b); }
    static EDGE_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static EDGE_INLINE void store(float * at, F v) { _mm512_storeu_ps(at, v); }
};

bool runs_here() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni");
}

} // namespace

extern const EdgeIsa edge_isa_avx512;
const EdgeIsa edge_isa_avx512 = isa<Avx512>("avx512-vnni", runs_here);
