#include "edge-slice.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <cstring>
#include <string>
#include <vector>

#ifndef _WIN32
#    include <sys/mman.h>
#    include <unistd.h>
#endif

//
// called from upstream's files
//

namespace {

struct slice_request {
    int32_t il_start    = 0;
    int32_t il_end      = 0;
    bool    want_hidden = false;
    bool    invariant   = false;
};

// llama_context_params is public and mirrored by bindings, so the range travels beside it
thread_local slice_request pending;

const llm_arch supported[] = {
    LLM_ARCH_LLAMA, LLM_ARCH_QWEN2, LLM_ARCH_QWEN3, LLM_ARCH_GEMMA2, LLM_ARCH_GEMMA3, LLM_ARCH_PHI3,
};

bool is_slice(const llm_graph_context & graph) {
    return graph.cparams.il_end > 0;
}

bool ends_model(const llm_graph_context & graph) {
    return graph.n_layer == (int64_t) graph.hparams.n_layer();
}

bool in_edge_buffer(const ggml_tensor * tensor) {
    return tensor->buffer && strcmp(ggml_backend_buffer_name(tensor->buffer), "CPU_EDGE") == 0;
}

bool has_edge_kernels(const llama_model & model) {
    for (const auto & [name, tensor] : model.tensors_by_name) {
        if (in_edge_buffer(tensor)) {
            return true;
        }
    }
    return false;
}

} // namespace

void edge_slice_configure(llama_cparams & cparams, const llama_hparams & hparams) {
    cparams.il_start = pending.il_start;
    cparams.il_end   = pending.il_end;

    cparams.edge_invariant = pending.invariant;

    if (cparams.il_end > 0) {
        const bool partial = cparams.il_end < (int32_t) hparams.n_layer();

        // upstream already carries a hidden state per token (or per output row, "masked") out of a decode
        cparams.embeddings_nextn        = partial || pending.want_hidden;
        cparams.embeddings_nextn_masked = !partial;
    }
}

uint32_t edge_slice_max_nodes(const llama_cparams & cparams, const llama_hparams & hparams, uint32_t n_nodes) {
    if (cparams.il_end == 0) {
        return n_nodes;
    }
    const uint32_t n_slice = cparams.il_end - cparams.il_start;

    return (uint64_t) n_nodes * (n_slice + 2) / (hparams.n_layer() + 2);
}

bool edge_slice_keeps_all_rows(const llm_graph_context & graph) {
    return is_slice(graph) && !ends_model(graph);
}

void edge_slice_mark_attention(const llm_graph_context & graph, ggml_tensor * attention) {
    // the last parameter is not used by upstream; ggml's CPU backend looks at it
    attention->op_params[GGML_MAX_OP_PARAMS / sizeof(int32_t) - 1] = graph.cparams.edge_invariant;
}

void edge_slice_loaded(const ggml_tensor * tensor, void * data, size_t size) {
#ifdef MADV_DONTNEED
    // the file's pages come back when they are touched again; whole pages only, as others have neighbours
    const uintptr_t page = sysconf(_SC_PAGESIZE), first = ((uintptr_t) data + page - 1) / page * page, end = (uintptr_t) data + size;
    if (in_edge_buffer(tensor) && end > first) {
        madvise((void *) first, (end - first) / page * page, MADV_DONTNEED);
    }
#else
    (void) tensor, (void) data, (void) size;
#endif
}

ggml_tensor * edge_slice_boundary(const llm_graph_context & graph, ggml_tensor * cur, int il) {
    if (!is_slice(graph) || il != graph.n_layer - 1) {
        return cur;
    }

    if (graph.cparams.embeddings_nextn) {
        graph.res->t_h_nextn = cur;
    }

    if (ends_model(graph)) {
        return cur; // upstream has left only the output rows
    }

    // the head runs on the requested rows only: none, and it costs nothing
    auto inp = std::make_unique<llm_graph_input_out_ids>(graph.hparams, graph.cparams, graph.n_outputs);

    inp->out_ids = ggml_new_tensor_1d(graph.ctx0, GGML_TYPE_I32, graph.n_outputs);
    ggml_set_input(inp->out_ids);
    ggml_set_name(inp->out_ids, "out_ids");

    ggml_tensor * rows = ggml_get_rows(graph.ctx0, cur, inp->out_ids);
    graph.res->add_input(std::move(inp));

    return rows;
}

//
// C face
//

int32_t edge_abi_version(void) {
    return EDGE_ABI_VERSION;
}

const char * edge_supported_archs(void) {
    static const std::string names = [] {
        std::string res;
        for (const auto arch : supported) {
            res += (res.empty() ? "" : ",") + std::string(llm_arch_name(arch));
        }
        return res;
    }();
    return names.c_str();
}

bool edge_model_supported(const llama_model * model) {
    for (const auto arch : supported) {
        if (model->arch == arch) {
            // a slice feeds its states to the next one, so their widths must agree
            return model->hparams.n_embd_inp() == model->hparams.n_embd && model->hparams.n_embd_out() == model->hparams.n_embd;
        }
    }
    return false;
}

size_t edge_sizeof(const char * struct_name) {
    const struct { const char * name; size_t size; } sizes[] = {
        { "llama_model_params",         sizeof(llama_model_params)         },
        { "llama_context_params",       sizeof(llama_context_params)       },
        { "llama_batch",                sizeof(llama_batch)                },
        { "llama_token_data",           sizeof(llama_token_data)           },
        { "llama_token_data_array",     sizeof(llama_token_data_array)     },
        { "llama_logit_bias",           sizeof(llama_logit_bias)           },
        { "llama_chat_message",         sizeof(llama_chat_message)         },
        { "llama_model_kv_override",    sizeof(llama_model_kv_override)    },
        { "llama_sampler_chain_params", sizeof(llama_sampler_chain_params) },
        { "llama_perf_context_data",    sizeof(llama_perf_context_data)    },
    };
    for (const auto & s : sizes) {
        if (strcmp(s.name, struct_name) == 0) {
            return s.size;
        }
    }
    return 0;
}

llama_context * edge_slice_init(llama_model * model, llama_context_params params, int32_t il_start, int32_t il_end, bool want_hidden) {
    const int32_t n_layer = model->hparams.n_layer();
    if (il_start < 0 || il_end <= il_start || il_end > n_layer) {
        LLAMA_LOG_ERROR("%s: layers [%d, %d) are not within [0, %d)\n", __func__, il_start, il_end, n_layer);
        return nullptr;
    }
    if (!edge_model_supported(model)) {
        LLAMA_LOG_ERROR("%s: architecture '%s' cannot be sliced (supported: %s)\n", __func__, llm_arch_name(model->arch), edge_supported_archs());
        return nullptr;
    }

    pending = { il_start, il_end, want_hidden, has_edge_kernels(*model) };
    llama_context * ctx = llama_init_from_model(model, params);
    pending = {};

    return ctx;
}

int32_t edge_slices_decode(llama_context ** slices, int32_t n_slices, llama_batch batch) {
    int8_t * const want = batch.logits;
    std::vector<int8_t> none(batch.n_tokens, 0);

    for (int32_t i = 0; i < n_slices; ++i) {
        batch.logits = i == n_slices - 1 ? want : none.data();
        const int32_t status = llama_decode(slices[i], batch);
        if (status != 0) {
            return status;
        }
        if (i < n_slices - 1) {
            batch.token = nullptr;
            batch.embd  = edge_slice_hidden(slices[i]);
        }
    }

    return 0;
}

float * edge_slice_hidden(llama_context * ctx) {
    ctx->synchronize();
    return ctx->get_embeddings_nextn();
}
