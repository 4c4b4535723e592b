// Layer slices: a llama_context that runs layers [il_start, il_end) of its model.
//
// The upper half is called from upstream's files, the lower half is the C face for the bindings.
#pragma once

#include "llama.h"

#include <cstddef>
#include <cstdint>

struct llama_cparams;
struct llama_hparams;
struct llm_graph_context;

// sets the slice that edge_slice_init() asked for; leaves any other context as it is
void edge_slice_configure(llama_cparams & cparams, const llama_hparams & hparams);

// the share of `n_nodes` graph nodes that a slice needs: those of its layers, and of a model's ends
uint32_t edge_slice_max_nodes(const llama_cparams & cparams, const llama_hparams & hparams, uint32_t n_nodes);

// true for a slice that ends before the last layer: the next slice needs every row
bool edge_slice_keeps_all_rows(const llm_graph_context & graph);

// at the end of layer il: hands out the hidden states of a slice's last layer and
// returns the rows that the output head shall see
ggml_tensor * edge_slice_boundary(const llm_graph_context & graph, ggml_tensor * cur, int il);

// makes attention take the same path, whatever the batch width and the number of threads, where the weights' kernels do
void edge_slice_mark_attention(const llm_graph_context & graph, ggml_tensor * attention);

// gives back the pages of a mapped file that a tensor was loaded from, where edge-kernels.h's buffers hold it in another form
void edge_slice_loaded(const ggml_tensor * tensor, void * data, size_t size);

#define EDGE_ABI_VERSION 2

extern "C" {
    LLAMA_API int32_t edge_abi_version(void);

    // comma-separated names of the architectures that can be sliced
    LLAMA_API const char * edge_supported_archs(void);

    // true if the model's architecture can be sliced
    LLAMA_API bool edge_model_supported(const struct llama_model * model);

    // sizeof() of a public struct by name, 0 if unknown: lets the bindings check their mirrors
    LLAMA_API size_t edge_sizeof(const char * struct_name);

    // A context for layers [il_start, il_end) that holds the KV cache of those layers only.
    // want_hidden: also hand out the last layer's states (of the output rows) where il_end is the model's end.
    // Returns NULL on a bad range, an unsupported architecture, or where llama_init_from_model() would.
    LLAMA_API struct llama_context * edge_slice_init(
            struct llama_model * model, struct llama_context_params params,
            int32_t il_start, int32_t il_end, bool want_hidden);

    // llama_decode() through consecutive slices: the batch enters the first, each one's hidden states enter the next, and
    // the rows of logits that the batch asks for come from the last. Ends at the first failure with its status; slices
    // before it then hold positions that later ones do not.
    LLAMA_API int32_t edge_slices_decode(struct llama_context ** slices, int32_t n_slices, struct llama_batch batch);

    // Hidden states after the slice's last layer, before the final norm, float [n_rows][n_embd], of the latest decode.
    // A slice that ends before the last layer has a row for every token of the batch, in batch order;
    // the last slice one for every output. Valid until the next decode.
    LLAMA_API float * edge_slice_hidden(struct llama_context * ctx);
}
