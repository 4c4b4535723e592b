"""Which model a pack was made for: what it learned reads hidden states, and those differ between models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .cache import model_hash
from .native import read_header


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """The model a pack is for."""

    sha256: str
    file: str
    name: str
    architecture: str
    n_layer: int
    n_embd: int
    file_bytes: int

    def __str__(self) -> str:
        size = f"{self.file_bytes / 2**20:.0f} MiB"
        return f"{self.name or self.file} ({self.file}, {self.architecture}, {self.n_layer} layers, {size})"


def identify(path: Path) -> ModelIdentity:
    """Identity of the model file at `path`. Raises what `read_header` does."""
    header = read_header(str(path))
    return ModelIdentity(
        sha256=model_hash(path),
        file=path.name,
        name=header.name,
        architecture=header.architecture,
        n_layer=header.n_layer,
        n_embd=header.n_embd,
        file_bytes=header.file_bytes,
    )


def difference(wanted: ModelIdentity, found: ModelIdentity) -> str | None:
    """What `found` is instead of `wanted`, in words; None if it is the same model."""
    if found.sha256 == wanted.sha256:
        return None
    same = ("architecture", "n_layer", "n_embd")
    if any(getattr(found, key) != getattr(wanted, key) for key in same):
        return "another model"
    if found.file_bytes != wanted.file_bytes:
        return "another quantisation or fine-tune of the model"
    return "another version of the model: only the weights differ"
