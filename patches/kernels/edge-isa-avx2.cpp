// AVX2 with FMA and F16C: bytes are multiplied into 16-bit sums, which are widened before they can overflow.
#include "edge-isa-avx2.h"

namespace {

struct Avx2 : Avx2Base {
    static constexpr int  max_columns  = 4;
    static constexpr bool signed_bytes = true;

    template <int max> struct Dot {
        static constexpr int adds = 32767 / (2 * 127 * max); // that surely fit 16 bits
        static_assert(adds == 8 || adds == 4 || adds == 2, "the last group of a sub-block must widen");

        I total, part;
        EDGE_INLINE void start(int32_t offset) { total = _mm256_set1_epi32(offset); }
        template <int g> EDGE_INLINE void add(I w, const int8_t * a) {
            const I products = _mm256_maddubs_epi16(w, four(a));
            part             = g % adds == 0 ? products : _mm256_add_epi16(part, products);
            if (g % adds == adds - 1) {
                total = _mm256_add_epi32(total, _mm256_madd_epi16(part, _mm256_set1_epi16(1)));
            }
        }
        EDGE_INLINE I sum() const { return total; }
    };
    template <class T, int n, int s> static EDGE_INLINE void dot_columns(const uint8_t * lanes, const Column<T> & columns, I * sums) {
        dot<Avx2, T, n, s>(lanes, columns, sums);
    }
};

// signed weights: the sign moves to the activations; 2 × 128 × 127 fits 16 bits, a second one would not
template <> struct Avx2::Dot<kSigned> {
    I total;
    EDGE_INLINE void start(int32_t offset) { total = _mm256_set1_epi32(offset); }
    template <int> EDGE_INLINE void add(I w, const int8_t * a) {
        const I products = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(four(a), w));
        total            = _mm256_add_epi32(total, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
    }
    EDGE_INLINE I sum() const { return total; }
};

} // namespace

extern const EdgeIsa edge_isa_avx2;
const EdgeIsa edge_isa_avx2 = isa<Avx2>("avx2", has_avx2);
