"""The patched llama.cpp, seen through numpy: the only package that touches ctypes or llama_cpp's low-level module."""

from __future__ import annotations

from .context import Context, ContextOptions, KvType, Route
from .header import read_header
from .kernels import available_kernels, kernel_weight_types, resolve_kernels
from .library import BINDINGS_VERSION, BUILD_HINT, Api, exit_on_abort, expected_abi, library_hash, load, struct_sizes
from .model import Model
from .sampler import Candidates, SamplerChain
from .tensors import Tensors, read_tensors, weight_bytes

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
    "Tensors",
    "available_kernels",
    "exit_on_abort",
    "expected_abi",
    "kernel_weight_types",
    "library_hash",
    "load",
    "read_header",
    "read_tensors",
    "resolve_kernels",
    "struct_sizes",
    "weight_bytes",
]
