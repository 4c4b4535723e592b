// What every instruction set's file ends with: its kernels in a table.
#pragma once

#include "edge-attention.h"
#include "edge-matmul-loop.h"

namespace {

template <class Isa> constexpr EdgeIsa isa(const char * name, bool (*runs_here)()) {
    return { name,
             runs_here,
             { &kernel<Isa, Q4_0>, &kernel<Isa, Q8_0<Isa::signed_bytes>>, &kernel<Isa, Q4_K>, &kernel<Isa, Q6_K>,
               &kernel<Isa, Q4_1>, &kernel<Isa, Q5_K>, &kernel<Isa, Q5_0>, &kernel<Isa, Q5_1> },
             attend<Isa> };
}

} // namespace
