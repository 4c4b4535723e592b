"""The document of the interface: requests drawn from it are answered as it says, and never with a server's error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from .serving_helpers import MODEL, OPEN, PATIENCE_S, rig

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    pytest.param("POST", "/v1/moderations", marks=pytest.mark.model),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def document(tiny_path: Callable[..., Path]) -> Any:
    with rig(tiny_path(tokenizer=True), rules=replace(OPEN, local_names_only=False)) as made:
        yield schemathesis.openapi.from_asgi("/openapi.json", made.app)


def test_all_operations_are_there(document: Any) -> None:
    found = {(o.ok().method.upper(), o.ok().path) for o in document.get_all_operations()}
    assert found == {tuple(getattr(operation, "values", operation)) for operation in OPERATIONS}


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_an_operation_keeps_to_the_document(document: Any, method: str, path: str) -> None:
    operation = document[path][method]

    @settings(
        max_examples=8 if "moderations" in path else 25,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def check(case: Any) -> None:
        if isinstance(case.body, dict) and case.body.get("model") is not None and "input" not in case.body:
            case.body["model"] = MODEL  # by any other name, nothing behind it would be looked at
        case.call_and_validate(checks=CHECKS, timeout=PATIENCE_S)

    check()
