// Which instruction sets were compiled, best first.
#include "edge-matmul.h"

#define EDGE_ISA(name) extern const EdgeIsa edge_isa_##name
EDGE_ISA(avx512);
EDGE_ISA(avxvnni);
EDGE_ISA(avx2);
EDGE_ISA(i8mm);
EDGE_ISA(dotprod);
EDGE_ISA(neon);

const EdgeIsa * const edge_isas[] = {
#ifdef EDGE_AVX512
    &edge_isa_avx512,
#endif
#ifdef EDGE_AVXVNNI
    &edge_isa_avxvnni,
#endif
#ifdef EDGE_AVX2
    &edge_isa_avx2,
#endif
#ifdef EDGE_I8MM
    &edge_isa_i8mm,
#endif
#ifdef EDGE_DOTPROD
    &edge_isa_dotprod,
#endif
#ifdef EDGE_NEON
    &edge_isa_neon,
#endif
    nullptr,
};
