// NEON with the dot product of bytes that most cores since ARMv8.2 have.
#include "edge-isa-neon.h"

namespace {

struct Dotprod : NeonBase {
    static constexpr int max_columns = 4;

    template <int> using Dot = NeonDot;

    template <class T, int n, int s> static EDGE_INLINE void dot_columns(const uint8_t * lanes, const Column<T> & columns, I * sums) {
        dot<Dotprod, T, n, s>(lanes, columns, sums);
    }
};

} // namespace

extern const EdgeIsa edge_isa_dotprod;
const EdgeIsa edge_isa_dotprod = isa<Dotprod>("neon-dotprod", has_dotprod);
