"""edge_runtime: layer-sliced llama.cpp with early exits that are verified or audited.

Importing this package points llama-cpp-python at the patched library before anything can import `llama_cpp`;
the heavy parts load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _library

if TYPE_CHECKING:
    from .llama import EdgeLlama as EdgeLlama

__version__ = "0.1.0"

_library.point_bindings()


def __getattr__(name: str) -> Any:
    if name == "EdgeLlama":
        from .llama import EdgeLlama

        return EdgeLlama
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
