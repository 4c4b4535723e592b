"""An ONNX sentence encoder, running: texts in, vectors out."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DecodeError, ModelNotFoundError, ModelUnreadableError, UnsupportedModelError
from .libraries import need
from .recipes import TOKENIZER, find_encoder

DEFAULT_ENCODER = "minilm-l6"
_REQUIRED, _OPTIONAL = ("input_ids", "attention_mask"), ("token_type_ids",)
_OUTPUTS = ("sentence_embedding", "last_hidden_state")  # the first that is there counts
_INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
_MAX_TOKENS = 512  # where no file says how many
_CHARACTERS_PER_TOKEN = 16  # of a long text, at first


class SentenceEncoder:
    """Texts to vectors of unit length, whose inner products say how alike the texts are.

    `encoder` is a name, a folder that `edge-run models build` wrote, or the path of any .onnx file with a
    tokenizer.json beside it. Its inputs are input_ids, attention_mask and, where it has one, token_type_ids; its output
    is sentence_embedding (n, d), or last_hidden_state (n, n_tokens, d), of which the mean over tokens is taken.

    Raises ModelNotFoundError, ModelUnreadableError and UnsupportedModelError for what it was given, DecodeError if that
    fails on an empty text, EdgeError without onnxruntime or tokenizers.
    """

    def __init__(self, encoder: str | os.PathLike[str] = DEFAULT_ENCODER, n_threads: int = 1) -> None:
        if n_threads < 1:
            raise ValueError(f"n_threads is {n_threads}, not at least 1")
        self.path = find_encoder(encoder)
        self.max_tokens = 0  # of a text, with the special ones; what is beyond is cut off
        self._tokenizer = self._open_tokenizer()
        self._session = _open_session(self.path, n_threads)
        self._inputs = _checked_inputs(self._session, self.path)
        self._output = _checked_output(self._session, self.path)
        self.n_embd: int = self._embed([self._token_ids("")]).shape[1]

    def encode(self, texts: Sequence[str], batch_size: int = 1) -> NDArray[np.float32]:
        """The vectors (n_texts, n_embd) of texts, each of unit length.

        Texts of the same number of tokens can be computed together, `batch_size` at a time. By default each is
        computed alone: int8 rounds by the largest value in a batch, so a text's vector would depend on its neighbours.

        Raises DecodeError if the encoder fails.
        """
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts, not one text")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, not at least 1")
        ids = [self._token_ids(text) for text in texts]
        vectors = np.empty((len(ids), self.n_embd), np.float32)
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for _, alike in itertools.groupby(by_length, key=lambda i: len(ids[i])):
            group = list(alike)
            for start in range(0, len(group), batch_size):
                batch = group[start : start + batch_size]
                vectors[batch] = self._embed([ids[i] for i in batch])
        return vectors

    def _embed(self, ids: list[list[int]]) -> NDArray[np.float32]:
        """(n, n_embd) of unit length, for n texts of the same number of tokens."""
        tokens = np.array(ids, np.int64)
        values = {
            "input_ids": tokens,
            "attention_mask": np.ones_like(tokens),
            "token_type_ids": np.zeros_like(tokens),
        }
        feed = {name: values[name].astype(kind, copy=False) for name, kind in self._inputs.items()}
        try:
            (found,) = self._session.run([self._output], feed)
        except Exception as error:  # onnxruntime's own classes share no other parent
            what = f"{self.path} failed on {tokens.shape[0]} x {tokens.shape[1]} tokens: {_first_line(error)}"
            raise DecodeError(what, f"it may not be a sentence encoder, or not take {self.max_tokens} tokens") from None
        vectors = np.asarray(found, np.float32)
        if vectors.ndim == 3:
            vectors = vectors.mean(1)  # nothing is padded, so every token counts
        if vectors.ndim != 2 or len(vectors) != len(ids):
            raise DecodeError(
                f"{self.path} gave an array {np.shape(found)} for {len(ids)} texts", "it is not a sentence encoder"
            )
        if not np.isfinite(vectors).all():
            raise DecodeError(f"{self.path} gave values that are not finite", "the file may be damaged")
        unit: NDArray[np.float32] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return unit

    def _token_ids(self, text: str) -> list[int]:
        """The ids of a text, at most max_tokens.

        Of a very long text only as much is read as it takes to be sure of these: until there are three times as many.
        """
        text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair becomes a question mark
        length = self.max_tokens * _CHARACTERS_PER_TOKEN
        while True:
            encoding = self._tokenizer.encode(text[:length])
            if length >= len(text) or len(encoding.overflowing) >= 2:
                return list(encoding.ids) or [0]  # a tokenizer without special tokens has none for an empty text
            length *= 4

    def _open_tokenizer(self) -> Any:
        path = self.path.with_name(TOKENIZER)
        library = need("tokenizers")
        if not path.is_file():
            raise ModelNotFoundError(f"there is no {path}", f"{self.path.name} needs its {TOKENIZER} beside it")
        try:
            tokenizer = library.Tokenizer.from_file(str(path))
            tokenizer.no_padding()
            self.max_tokens = _limit(path.parent, tokenizer)
            tokenizer.enable_truncation(self.max_tokens)
        except Exception as error:  # the library raises Exception itself
            hint = "it must be a file of the library tokenizers"
            raise ModelUnreadableError(f"{path} cannot be read: {_first_line(error)}", hint) from None
        return tokenizer


def _limit(folder: Path, tokenizer: Any) -> int:
    """How many tokens the encoder takes, by sentence_bert_config.json, else by tokenizer.json."""
    beside = folder / "sentence_bert_config.json"
    if beside.is_file():
        said = json.loads(beside.read_text("utf-8")).get("max_seq_length")
        if said is not None:
            return int(said)
    return int(tokenizer.truncation["max_length"]) if tokenizer.truncation else _MAX_TOKENS


def _open_session(path: Path, n_threads: int) -> Any:
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what matters is raised
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or waiting threads would burn power
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes share no other parent
        hint = "if `edge-run models build` wrote it, the same command repairs it"
        raise ModelUnreadableError(f"{path} cannot be loaded: {_first_line(error)}", hint) from None


def _checked_inputs(session: Any, path: Path) -> dict[str, Any]:
    """The inputs to be given, with their types."""
    found = {one.name: one for one in session.get_inputs()}
    expected = f"{', '.join(_REQUIRED)} and possibly {', '.join(_OPTIONAL)}"
    if not set(_REQUIRED) <= set(found) <= {*_REQUIRED, *_OPTIONAL}:
        what = f"{path} has the inputs {', '.join(found) or 'none'}"
        raise UnsupportedModelError(what, f"a sentence encoder has the inputs {expected}")
    for one in found.values():
        if one.type not in _INTEGERS or any(isinstance(size, int) for size in one.shape) or len(one.shape) != 2:
            what = f"the input {one.name} of {path} is {one.type} of the sizes {one.shape}"
            raise UnsupportedModelError(what, "it must be int64 or int32 of any number of texts and tokens")
    return {name: _INTEGERS[one.type] for name, one in found.items()}


def _checked_output(session: Any, path: Path) -> str:
    found = [one.name for one in session.get_outputs()]
    for name in _OUTPUTS:
        if name in found:
            return name
    what = f"{path} has the outputs {', '.join(found)}"
    raise UnsupportedModelError(what, f"a sentence encoder has the output {' or '.join(_OUTPUTS)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
