"""Where the patched library lies; standard library only, so that importing the package stays cheap."""

from __future__ import annotations

import os
from pathlib import Path

ENV_BINDINGS = "LLAMA_CPP_LIB_PATH"  # read by llama-cpp-python when it is imported
ENV_OURS = "EDGE_RUNTIME_LIB"


def library_dir() -> Path:
    """Directory with libllama: $EDGE_RUNTIME_LIB, else the user's $LLAMA_CPP_LIB_PATH, else this package's own."""
    for name in (ENV_OURS, ENV_BINDINGS):
        value = os.environ.get(name)
        if value:
            return Path(value)
    return Path(__file__).parent / "lib"


def point_bindings() -> None:
    """Let llama-cpp-python load our library, unless the user has pointed it elsewhere."""
    os.environ[ENV_BINDINGS] = str(library_dir())
