"""The patched llama.cpp, seen through numpy: the only package that touches ctypes or llama_cpp's low-level module."""

from __future__ import annotations

from .context import Context, ContextOptions, KvType, Route
from .header import read_header
from .library import BINDINGS_VERSION, BUILD_HINT, Api, exit_on_abort, expected_abi, load, struct_sizes
from .model import Model
from .sampler import Candidates, SamplerChain

__all__ = [
    "BINDINGS_VERSION",
    "BUILD_HINT",
    "Api",
    "Candidates",
    "Context",
    "ContextOptions",
    "KvType",
    "Model",
    "Route",
    "SamplerChain",
    "exit_on_abort",
    "expected_abi",
    "load",
    "read_header",
    "struct_sizes",
]
