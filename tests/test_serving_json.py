"""Grammars of JSON schemas: whatever a model of noise says, the answer is JSON of the schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.errors import UsageError
from edge_runtime.native import Model
from edge_runtime.native.guided import Guidance, check_grammar
from edge_runtime.serving.json_grammar import JSON_OBJECT, SchemaError, grammar_of
from edge_runtime.serving.sampling import GuidedSampler
from edge_runtime.types import SamplingSettings

TREE = {
    "$defs": {
        "node": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}
    },
    "$ref": "#/$defs/node",
}


@pytest.fixture(scope="module")
def model(tiny_path: Callable[..., Path]) -> Iterator[Model]:
    with Model(str(tiny_path(tokenizer=True))) as made:
        yield made


def write(model: Model, grammar: str, seed: int, n_tokens: int = 400, haste: float = 4.0) -> tuple[str, bool]:
    """What random logits write in ASCII by a grammar, and whether they came to its end."""
    noise = np.random.default_rng(seed)
    settings = SamplingSettings(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed)
    data = b""
    with closing(GuidedSampler(settings, Guidance(grammar), model, n_tokens)) as sampler:
        sampler.rewind([5, 6, 7])
        for _ in range(n_tokens):
            logits = noise.standard_normal(model.n_vocab).astype(np.float32)
            logits[[5 + ord(c) for c in '"}]']] += haste
            logits[5 + 0x80 : 5 + 0x100] -= 30
            token = sampler.sample(logits)
            sampler.accept(token)
            if model.is_end(token):
                return data.decode(), True
            data += model.piece(token)
    return data.decode(errors="replace"), False


def is_tree(value: Any) -> bool:
    return isinstance(value, dict) and set(value) <= {"next"} and (value.get("next") is None or is_tree(value["next"]))


CASES: list[tuple[Any, Callable[[Any], bool]]] = [
    ({"type": "string", "minLength": 2, "maxLength": 4}, lambda v: isinstance(v, str) and 2 <= len(v) <= 4),
    ({"type": "integer"}, lambda v: isinstance(v, int) and not isinstance(v, bool)),
    ({"type": ["boolean", "null"]}, lambda v: v is None or isinstance(v, bool)),
    ({"enum": ['a"b\\', 1.5, None, {"x": [1]}, "ü\n\x7f"]}, lambda v: v in ['a"b\\', 1.5, None, {"x": [1]}, "ü\n\x7f"]),
    ({"const": []}, lambda v: v == []),
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}, lambda v: 2 <= len(v) <= 3),
    ({"type": "array", "maxItems": 0}, lambda v: v == []),
    ({"type": "array", "items": {"const": 1}, "maxItems": 1}, lambda v: v in ([], [1])),
    ({"type": "object", "additionalProperties": {"type": "null"}}, lambda v: all(x is None for x in v.values())),
    ({"type": "object", "additionalProperties": False}, lambda v: v == {}),
    (
        {"properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}, "d": {"const": 4}}, "required": ["b"]},
        lambda v: v.get("b") == 2 and set(v) <= set("abcd") and list(v) == sorted(v),
    ),
    ({"properties": {"a": True, "b": {"const": 1}}}, lambda v: set(v) <= set("ab")),
    ({"oneOf": [{"const": "x"}, {"allOf": [{"const": "y"}]}]}, lambda v: v in ("x", "y")),
    ({"type": "number", "minimum": 3, "title": "n"}, lambda v: isinstance(v, int | float)),
    (TREE, is_tree),
]


@pytest.mark.parametrize(("schema", "holds"), CASES)
def test_what_is_written_is_of_the_schema(model: Model, schema: Any, holds: Callable[[Any], bool]) -> None:
    grammar = grammar_of(schema)
    written = [write(model, grammar, seed) for seed in range(12)]
    ended = [json.loads(text) for text, at_end in written if at_end]
    assert len(ended) >= 6
    assert all(map(holds, ended))


def test_both_ways_are_taken(model: Model) -> None:
    """A property that is not required is there at times, and at times not."""
    grammar = grammar_of({"properties": {"a": {"const": 1}, "b": {"const": 2}}})
    found = {
        tuple(json.loads(text))
        for text, at_end in (write(model, grammar, seed, haste=0.0) for seed in range(60))
        if at_end
    }
    assert found == {(), ("a",), ("b",), ("a", "b")}


def test_any_object(model: Model) -> None:
    written = [write(model, JSON_OBJECT, seed, 1500) for seed in range(20)]
    ended = [json.loads(text) for text, at_end in written if at_end]
    assert len(ended) >= 5
    assert all(isinstance(value, dict) for value in ended)
    assert any(ended)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "cat"}, "type is none of"),
        ({"enum": []}, "enum"),
        ({"anyOf": {}}, "anyOf"),
        ({"colour": 1}, "'colour'"),
        ({"$ref": "http://example.org/x"}, "must begin with #/"),
        ({"$ref": "#/$defs/none"}, "there is nothing"),
        ({"type": "string", "maxLength": 10**9}, "whole numbers"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "less than"),
        ({"properties": {"a": {"type": "cat"}}}, "/properties/a"),
        ({"properties": {}, "required": ["x"]}, "not among"),
        ({"properties": []}, "properties"),
        ({"items": 3}, "/items is no schema"),
        ({"allOf": [{}, {}]}, "several"),
        ({"anyOf": [{}], "type": "string"}, None),
        ({"anyOf": [{}], "minLength": 3}, "beside"),
        ({"const": float("nan")}, "cannot be written"),
        ({"const": "\ud800"}, "cannot be written"),
    ],
)
def test_what_cannot_be_held_is_refused(schema: Any, words: str | None) -> None:
    if words is None:
        grammar_of(schema)
        return
    with pytest.raises(SchemaError, match=words):
        grammar_of(schema)


@pytest.mark.parametrize("keyword", ["pattern", "minimum", "format", "uniqueItems"])
def test_what_grammars_cannot_say_is_refused_only_where_it_is_to_be_held(keyword: str) -> None:
    schema = {"type": "string", keyword: "1"}
    assert grammar_of(schema)
    with pytest.raises(SchemaError, match=f"'{keyword}' is not supported with strict"):
        grammar_of(schema, strict=True)


def test_schemas_without_end_are_refused(model: Model) -> None:
    deep: Any = True
    for _ in range(100):
        deep = {"items": deep}
    with pytest.raises(SchemaError, match="too large"):
        grammar_of(deep)
    with pytest.raises(SchemaError, match="too large"):
        grammar_of({"anyOf": [{"type": "string"}] * 5000})
    with pytest.raises(UsageError, match="left recursion"):
        check_grammar(grammar_of({"$ref": "#"}), model)


@pytest.mark.parametrize("grammar", ["root ::= (", 'other ::= "x"', "root ::= missing"])
def test_what_is_no_grammar_is_refused(model: Model, grammar: str) -> None:
    with pytest.raises(UsageError, match="the grammar cannot be used"):
        check_grammar(grammar, model)
