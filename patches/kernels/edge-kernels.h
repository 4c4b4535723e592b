// A buffer type of ggml's CPU backend that keeps weights in the tiles of edge-matmul.h and multiplies them there.
//
// The upper half is called from upstream's files, the lower half is the C face for the bindings.
#pragma once

#include "ggml-backend.h"

#ifdef __cplusplus
ggml_backend_buffer_type_t edge_kernels_buffer_type();

extern "C" {
#endif
    // names of the kernel sets that were built and run on this CPU, best first, separated by commas
    GGML_BACKEND_API const char * edge_kernels_available(void);

    // The kernel set for models that are loaded from now on: a name of the above, or NULL for none, which is how a process
    // starts. Models that are loaded already keep theirs. Returns false for a name that is not available.
    GGML_BACKEND_API bool edge_kernels_select(const char * name);

    // comma-separated names of the weight types that the kernels take
    GGML_BACKEND_API const char * edge_kernels_types(void);
#ifdef __cplusplus
}
#endif
