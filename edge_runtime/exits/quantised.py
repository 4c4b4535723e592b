"""Matrices as GGUF files hold them: in blocks of 32 values with a scale each, or as 16-bit numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..types import Floats

BLOCK = 32
_BLOCK_BYTES = {"Q4_0": 18, "Q8_0": 34}  # a 16-bit scale, then 32 numbers of 4 or 8 bits


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A matrix (rows, columns) of type `kind`; `data` is (rows, bytes of a row) uint8, or float16 for F16."""

    kind: str  # "Q4_0", "Q8_0" or "F16"
    data: NDArray[Any]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, width = self.data.shape
        return rows, width if self.kind == "F16" else width // _BLOCK_BYTES[self.kind] * BLOCK

    @property
    def floats(self) -> Floats:
        """(rows, columns), what the blocks stand for."""
        from gguf import GGMLQuantizationType, dequantize

        if self.kind == "F16":
            return np.asarray(self.data, np.float32)
        return np.asarray(dequantize(self.data, GGMLQuantizationType[self.kind]), np.float32)

    @property
    def is_finite(self) -> bool:
        """Whether every scale is a number, and so every value."""
        if self.kind == "F16":
            return bool(np.isfinite(self.data).all())
        blocks = self.data.reshape(-1, _BLOCK_BYTES[self.kind])
        return bool(np.isfinite(np.ascontiguousarray(blocks[:, :2]).view("<f2")).all())


def quantise(matrix: Floats, quantisation: str) -> Quantised:
    """Round `matrix` (rows, columns) to "Q4_0", "Q8_0" or "F16"; F16 in any case if no blocks of 32 fill its rows."""
    from gguf import GGMLQuantizationType
    from gguf import quantize as to_blocks

    kind = kind_of(matrix.shape[1], quantisation)
    if kind == "F16":
        return Quantised(kind, matrix.astype(np.float16))
    return Quantised(kind, to_blocks(np.ascontiguousarray(matrix, np.float32), GGMLQuantizationType[kind]))


def kind_of(columns: int, quantisation: str) -> str:
    """What a matrix of so many columns becomes where `quantisation` is asked for."""
    return quantisation if columns % BLOCK == 0 else "F16"


def row_bytes(columns: int, kind: str) -> int:
    """Bytes of a row of `columns` values in blocks of `kind`, which is not F16."""
    return columns // BLOCK * _BLOCK_BYTES[kind]
