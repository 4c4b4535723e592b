"""JSON that any reader takes, of numbers that JSON has no words for."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

_KEY = "float"
_NAMES = ("nan", "inf", "-inf")


def dumps(value: Any) -> str:
    """`value` as JSON text; NaN and infinity as {"float": "nan"}, {"float": "inf"}, {"float": "-inf"}.

    Numbers and arrays of numpy become plain ones, tuples lists. Raises TypeError for what has no place in JSON.
    """
    return json.dumps(_plain(value), allow_nan=False)


def loads(text: str) -> Any:
    """What `dumps` wrote. Raises ValueError for anything that is no strict JSON."""
    try:
        return json.loads(text, object_hook=_revived, parse_constant=_refused)
    except RecursionError as error:
        raise ValueError("JSON of too many levels") from error


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_KEY: str(float(value))}
    return value


def _revived(found: dict[str, Any]) -> Any:
    return float(found[_KEY]) if len(found) == 1 and found.get(_KEY) in _NAMES else found


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
