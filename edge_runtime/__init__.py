"""edge_runtime: layer-sliced llama.cpp with early exits that are verified or audited.

Importing this package points llama-cpp-python at the patched library before anything can import `llama_cpp`;
the heavy parts load on first use.
"""

from __future__ import annotations

from . import _library

__version__ = "0.1.0"

_library.point_bindings()
