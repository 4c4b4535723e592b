"""Heads as packs hold them: quantised once, and never again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..types import Floats
from .head import HeadShape, HeadWeights, write_head
from .quantised import Quantised, quantise

# a table in 4 bits loses what the block does not: measured on SmolLM2-135M, boundaries 16, 20 and 24, agreement 0.03 to
# 0.04 lower with it, 0.004 lower with the block in 4 bits; columns weighed by activations win back half of that at most
_OF_TABLE = {"Q4_0": "Q8_0"}


@dataclass(frozen=True, slots=True, eq=False)
class PackedHead:
    """A head whose matrices are quantised; see `HeadWeights`.

    `tensors` holds the matrices of `shape` as Quantised, its norms and "other" (n_embd,) as float32; `projection`
    (n_embd, n_embd) is float16.
    """

    layer: int
    shape: HeadShape
    quantisation: str  # of the matrices
    tensors: dict[str, Quantised | Floats]
    projection: NDArray[np.float16]

    @classmethod
    def of(cls, weights: HeadWeights, quantisation: str) -> PackedHead:
        """`weights` rounded to "Q4_0", "Q8_0" or "F16"; norms, "other" and projection stay finer."""
        tensors: dict[str, Quantised | Floats] = {
            name: quantise(array, quantisation) if name in weights.shape.matrices else array.astype(np.float32)
            for name, array in weights.tensors.items()
        }
        return cls(weights.layer, weights.shape, quantisation, tensors, weights.projection.astype(np.float16))

    @property
    def weights(self) -> HeadWeights:
        """What the rounded numbers stand for, in full precision."""
        tensors = {key: found.floats if isinstance(found, Quantised) else found for key, found in self.tensors.items()}
        return HeadWeights(self.layer, self.shape, tensors, self.projection.astype(np.float32))

    def write(self, path: Path, output_rows: Floats) -> None:
        """Write the head for llama.cpp, given the model's output rows (n_rows - 1, n_embd) of the shortlist.

        The matrices pass through unchanged; the table, which no pack holds, has 8 bits where they have fewer.
        Raises OSError.
        """
        other = np.asarray(self.tensors["other"])
        table = np.concatenate([output_rows @ self.projection.astype(np.float32), other[None]]).astype(np.float32)
        write_head(path, self.shape, self.tensors, table, _OF_TABLE.get(self.quantisation, self.quantisation))
