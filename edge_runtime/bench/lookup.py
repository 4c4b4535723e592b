"""llama-cpp-python's own prompt lookup decoding, on the stock library, in a process of its own.

Driven by `StockProcess(library, worker="edge_runtime.bench.lookup")`; `open` and `greedy` are as on the stock side.
"""

from __future__ import annotations

import time
from typing import Any

from .stock import serve


class _Worker:
    """The child's side: `llama_cpp.Llama` as its manual shows it, with a `LlamaPromptLookupDecoding`."""

    def __init__(self) -> None:
        self.llama: Any = None

    def open(
        self, model: str, n_ctx: int, n_batch: int, n_threads: int, n_gram: int = 2, n_draft: int = 10
    ) -> dict[str, int]:
        """Open a model; n_gram and n_draft are the constructor's max_ngram_size and num_pred_tokens."""
        import llama_cpp
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        if self.llama is not None:
            self.llama.close()
        self.llama = llama_cpp.Llama(
            model,
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=n_batch,
            n_threads=n_threads,
            n_threads_batch=n_threads,
            flash_attn=True,
            draft_model=LlamaPromptLookupDecoding(n_gram, n_draft),
            logits_all=True,  # implied by a draft model, but without it there is room for one batch's logits only
            no_perf=True,
            verbose=False,
        )
        return {"n_vocab": self.llama.n_vocab()}

    def greedy(self, prompt: list[int], n: int) -> dict[str, Any]:
        """n greedy tokens from an empty context, and the seconds of each, the first with the prefill."""
        self.llama.reset()
        tokens: list[int] = []
        seconds: list[float] = []
        before = time.perf_counter()
        for token in self.llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
            now = time.perf_counter()
            tokens.append(int(token))
            seconds.append(now - before)
            before = now
            if len(tokens) == n:
                break
        return {"tokens": tokens, "seconds": seconds}


if __name__ == "__main__":
    serve(_Worker())
