"""Boundary heads: one-layer llama models that read hidden states and speak a shortlist of the vocabulary.

A head is an ordinary GGUF that stock llama.cpp runs: no tokenizer, hidden states in through `embd`, one transformer
block with a KV cache of its own, and an output tied to a table of a few thousand rows. The table is W·A: rows W of the
model's own output matrix, and a learned projection A (n_embd, n_embd), which alone needs keeping; as it starts from a
linear regression onto the last layer's state, an untrained block makes the head a tuned lens (Belrose et al. 2023,
arXiv 2303.08112). The last row stands for every token outside the shortlist: a guess of it is no guess.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..cache import replacing
from ..errors import ModelUnreadableError, UsageError
from ..native import Context, ContextOptions, Model, read_header
from ..slices import default_threads
from ..types import Floats, TokenIds
from .quantised import Quantised, quantise

QUANTISATIONS = ("Q4_0", "Q8_0", "F16")
_BLOCK = 32
_HEAD_SIZE = 64


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Dimensions and constants of a head. `n_rows` counts the shortlist and the row for all other tokens."""

    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_rows: int
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if min(self.n_embd, self.n_head, self.n_head_kv, self.n_ff, self.n_rows) < 1:
            raise UsageError(f"a head cannot have these dimensions: {self}")
        if self.n_embd % (2 * self.n_head) or self.n_head % self.n_head_kv:
            raise UsageError(f"{self.n_embd} values cannot be shared by {self.n_head} and {self.n_head_kv} heads")

    @property
    def n_kv(self) -> int:
        """Width of keys and of values."""
        return self.n_embd // self.n_head * self.n_head_kv

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """GGUF name → (rows, columns) of the block's matrices."""
        d, ff = self.n_embd, self.n_ff
        return {
            "blk.0.attn_q.weight": (d, d),
            "blk.0.attn_k.weight": (self.n_kv, d),
            "blk.0.attn_v.weight": (self.n_kv, d),
            "blk.0.attn_output.weight": (d, d),
            "blk.0.ffn_gate.weight": (ff, d),
            "blk.0.ffn_up.weight": (ff, d),
            "blk.0.ffn_down.weight": (d, ff),
        }

    @property
    def norms(self) -> tuple[str, ...]:
        return ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")


def usual_shape(n_embd: int, n_rows: int) -> HeadShape:
    """A block as the models of this size have them: heads of 64, three queries per key, 8/3 of the width inside."""
    size = _HEAD_SIZE if n_embd % _HEAD_SIZE == 0 else math.gcd(n_embd, _BLOCK)
    n_head = n_embd // size
    n_head_kv = max(n for n in range(1, n_head // 3 + 2) if n_head % n == 0)
    return HeadShape(n_embd, n_head, n_head_kv, -(-8 * n_embd // 3 // _BLOCK) * _BLOCK, n_rows)


def lens_shape(n_embd: int, n_rows: int) -> HeadShape:
    """The smallest block there can be, for a head that is its projection alone."""
    size = math.gcd(n_embd, _BLOCK)
    return HeadShape(n_embd, n_embd // size, 1, _BLOCK, n_rows)


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """What was learned for one boundary, in full precision.

    `tensors` holds the matrices (rows, columns) and norms (n_embd,) of `shape` by their GGUF names, and "other"
    (n_embd,), the table's last row; `projection` is A (n_embd, n_embd) of the table W·A.
    """

    layer: int
    shape: HeadShape
    tensors: dict[str, Floats]
    projection: Floats

    def table(self, output_rows: Floats) -> Floats:
        """Output table (n_rows, n_embd), given the model's output rows (n_rows - 1, n_embd) of the shortlist."""
        table: Floats = np.concatenate([output_rows @ self.projection, self.tensors["other"][None]]).astype(np.float32)
        return table


def output_rows(model_path: Path | str, ids: TokenIds) -> Floats:
    """Rows `ids` (n, n_embd) of a model's output matrix, float32; of its embedding where the two are one.

    Raises ModelUnreadableError if it has none that can be read.
    """
    from gguf import GGUFReader, dequantize

    try:
        tensors = {t.name: t for t in GGUFReader(model_path).tensors}
        found = tensors.get("output.weight") or tensors["token_embd.weight"]
        return np.asarray(dequantize(found.data[ids], found.tensor_type), np.float32)
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise ModelUnreadableError(f"the output matrix of {model_path} cannot be read: {error}") from error


def final_norm(model_path: Path | str) -> Floats:
    """Weight (n_embd,) of the norm before a model's output matrix. Raises ModelUnreadableError without one."""
    from gguf import GGUFReader, dequantize

    try:
        (found,) = (t for t in GGUFReader(model_path).tensors if t.name == "output_norm.weight")
        return np.asarray(dequantize(found.data, found.tensor_type), np.float32)
    except (OSError, ValueError, NotImplementedError) as error:
        raise ModelUnreadableError(f"the output norm of {model_path} cannot be read: {error}") from error


def write_head(
    path: Path, shape: HeadShape, tensors: Mapping[str, Floats | Quantised], table: Floats, quantisation: str
) -> None:
    """Write a head as a GGUF that llama.cpp runs; `table` is (n_rows, n_embd). Raises OSError.

    Matrices of a width that is no multiple of 32 stay F16; those that are quantised already stay as they are.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    staging = path.with_name(f".{path.name}.staging")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(staging, "llama")
    try:
        _write_metadata(writer, shape)
        for name, array in {"token_embd.weight": table, **{n: tensors[n] for n in shape.matrices}}.items():
            matrix = array if isinstance(array, Quantised) else quantise(array, quantisation)
            writer.add_tensor(name, matrix.data, raw_dtype=GGMLQuantizationType[matrix.kind])
        for name in shape.norms:
            writer.add_tensor(name, np.asarray(tensors[name], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _check_whole(staging)
        with replacing(path) as out:
            out.write(staging.read_bytes())
    finally:
        writer.close()
        staging.unlink(missing_ok=True)


def _check_whole(path: Path) -> None:
    """A disk that fills during a tensor's last bytes goes unnoticed by numpy. Raises OSError."""
    try:
        read_header(str(path))
    except ModelUnreadableError as error:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def _write_metadata(writer: object, shape: HeadShape) -> None:
    from gguf import GGUFWriter

    assert isinstance(writer, GGUFWriter)
    writer.add_name("exit head")
    writer.add_block_count(1)
    writer.add_context_length(2**20)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_rope_dimension_count(shape.n_embd // shape.n_head)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_vocab_size(shape.n_rows)
    writer.add_tokenizer_model("none")


class HeadContext:
    """A head, loaded and ready to follow one text, or several, each in a sequence of its own."""

    def __init__(
        self,
        path: Path,
        n_ctx: int,
        n_threads: int,
        n_batch: int = 32,
        n_outputs_max: int = 1,
        kernels: str = "stock",
        n_sequences: int = 1,
    ) -> None:
        """`n_ctx` positions of each sequence. `n_outputs_max` rows of logits can be asked of one batch.

        0 threads: all physical cores.

        Raises a ModelError, MemoryLimitError or LibraryError if it cannot be opened.
        """
        self._model = Model(str(path), kernels=kernels)
        try:
            options = ContextOptions(
                n_ctx=n_sequences * n_ctx,
                n_batch=n_batch,
                n_seq_max=n_sequences,
                n_threads=n_threads or default_threads(),
                kv_unified=n_sequences == 1,
            )
            self._context = Context(self._model, 0, 1, options, n_outputs_max=n_outputs_max)
        except BaseException:
            self._model.close()
            raise
        self.n_batch = self._context.n_batch
        self.n_outputs_max = self._context.n_outputs_max
        self.n_rows, self.n_embd = self._model.n_vocab, self._context.n_embd

    def decode(
        self,
        states: Floats,
        first_pos: int,
        want: Sequence[int] = (),
        sequences: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
    ) -> None:
        """Run states (n, n_embd) of positions first_pos…, at most `n_batch`; rows in `want` get logits.

        Their `sequences` and `positions` can be given row by row, in order of both; else it is sequence 0.
        """
        self._context.decode_states(states, first_pos, want, sequences, positions)

    def logits(self, row: int) -> Floats:
        """Logits (n_rows,) of a wanted row; a view, valid until the next decode."""
        return self._context.logits(row)

    def set_threads(self, n_threads: int) -> None:
        self._context.set_threads(n_threads)

    def forget(self, position: int, sequence: int = 0) -> None:
        """Remove `position` and all later ones."""
        self._context.remove(position, sequence)

    def copy(self, source: int, target: int) -> None:
        """Let an empty sequence hold what another one does."""
        self._context.copy_sequence(source, target)

    def close(self) -> None:
        self._context.close()
        self._model.close()

    def __enter__(self) -> HeadContext:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
