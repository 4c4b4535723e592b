// AVX-VNNI: AVX2 with a dot product of bytes. Where a compiler is told of AVX-512 VNNI instead, its 256-bit form of the same
// instruction is used: so the kernels can be tested on a CPU that has only that.
#include "edge-isa-avx2.h"

namespace {

struct AvxVnni : Avx2Base {
    static constexpr int  max_columns  = 6;
    static constexpr bool signed_bytes = false;

    template <int> struct Dot {
        I total;
        EDGE_INLINE void start(int32_t offset) { total = _mm256_set1_epi32(offset); }
        template <int> EDGE_INLINE void add(I w, const int8_t * a) {
#ifdef __AVXVNNI__
            total = _mm256_dpbusd_avx_epi32(total, w, four(a));
#else
            total = _mm256_dpbusd_epi32(total, w, four(a));
#endif
        }
        EDGE_INLINE I sum() const { return total; }
    };
    template <class T, int n, int s> static EDGE_INLINE void dot_columns(const uint8_t * lanes, const Column<T> & columns, I * sums) {
        dot<AvxVnni, T, n, s>(lanes, columns, sums);
    }
};

bool runs_here() {
#ifdef __AVXVNNI__
    return has_avx2() && __builtin_cpu_supports("avxvnni");
#else
    return has_avx2() && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
}

} // namespace

extern const EdgeIsa edge_isa_avxvnni;
const EdgeIsa edge_isa_avxvnni = isa<AvxVnni>("avx-vnni", runs_here);
