"""The libraries that encoders need; each is imported when it is first used."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import EdgeError

USE_HINT = "pip install 'edge-runtime[semantic]'"
BUILD_HINT = "pip install 'edge-runtime[semantic,semantic-build]'"


def need(module: str) -> Any:
    """A library that encoding needs. Raises EdgeError if it cannot be imported."""
    return _import(module, "encoding sentences", USE_HINT)


def need_to_build(module: str) -> Any:
    """A library that building an encoder needs. Raises EdgeError if it cannot be imported."""
    return _import(module, "building an encoder", BUILD_HINT)


def _import(module: str, purpose: str, hint: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise EdgeError(f"{purpose} needs {library}, which cannot be imported ({error})", hint) from None
