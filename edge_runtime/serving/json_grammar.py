"""JSON Schema → GBNF, the grammars of llama.cpp: an answer that follows the grammar is JSON of that schema.

A grammar says less than a schema does. What it cannot say (ranges of numbers, patterns, formats) is refused where the
schema is to be held strictly, and left out where it is not. Properties come in the schema's order, and none but those
that it names, which every schema allows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_MAX_PARTS = 2000  # schemas within the schema
_MAX_DEPTH = 48
_MAX_REPEATS = 1000  # llama.cpp writes repetitions out

_JSON = r"""value ::= (object | array | string | number | "true" | "false" | "null")
object ::= "{" ws (pair ("," ws pair)*)? "}"
pair ::= string ws ":" ws value ws
array ::= "[" ws (value ws ("," ws value ws)*)? "]"
string ::= "\"" char* "\""
char ::= [^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" hex hex hex hex)
hex ::= [0-9a-fA-F]
integer ::= "-"? ("0" | [1-9] [0-9]{0,15})
number ::= integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,3})?
boolean ::= "true" | "false"
null ::= "null"
ws ::= | " " | "\n" [ \t]{0,20}
"""
JSON_OBJECT = f"root ::= object\n{_JSON}"

_TYPES = ("string", "number", "integer", "boolean", "null", "object", "array")
# keywords that say nothing of what is valid, or stand where `$ref` finds them
_ANNOTATIONS = {
    *("title", "description", "default", "examples", "example", "$schema", "$id", "$comment", "$defs", "definitions"),
    *("deprecated", "readOnly", "writeOnly", "discriminator"),
}
_NARROWING = {  # a grammar cannot say these
    *("pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "uniqueItems"),
    *("minProperties", "maxProperties", "contentEncoding", "contentMediaType"),
}
_SAID = {  # by keyword, the types that it speaks of
    "properties": "object",
    "required": "object",
    "additionalProperties": "object",
    "items": "array",
    "minItems": "array",
    "maxItems": "array",
    "minLength": "string",
    "maxLength": "string",
}


class SchemaError(ValueError):
    """The schema is none, or says what cannot be held; the text names the place."""


def grammar_of(schema: Mapping[str, Any], *, strict: bool = False) -> str:
    """GBNF of all JSON that `schema` allows. Raises SchemaError."""
    return _Converter(schema, strict).grammar()


class _Converter:
    def __init__(self, schema: Mapping[str, Any], strict: bool) -> None:
        self._schema, self._strict = schema, strict
        self._rules: list[str] = []
        self._of_ref: dict[str, str] = {}
        self._n_parts = 0

    def grammar(self) -> str:
        root = self._visit(self._schema, "", 0)
        return "\n".join([f"root ::= {root} ws", *self._rules, _JSON])

    def _rule(self, body: str) -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name} ::= {body}")
        return name

    def _visit(self, schema: Any, at: str, depth: int) -> str:
        """The name of a rule, or an expression in brackets, for what `schema` allows."""
        self._n_parts += 1
        if self._n_parts > _MAX_PARTS or depth > _MAX_DEPTH:
            raise SchemaError("the schema is too large")
        if schema is True:
            return "value"
        if not isinstance(schema, dict):
            raise SchemaError(f"{_place(at)} is no schema")
        self._check_keywords(schema, at)
        if "$ref" in schema:
            return self._ref(schema["$ref"], at, depth)
        for name in ("anyOf", "oneOf", "allOf"):
            if name in schema:
                return self._alternatives(schema, name, at, depth)
        if "const" in schema:
            return f"({_literal(schema['const'])})"
        if "enum" in schema:
            values = schema["enum"]
            if not isinstance(values, list) or not values:
                raise SchemaError(f"{_place(at)}: enum is no list of values")
            return f"({' | '.join(map(_literal, values))})"
        return self._of_types(schema, at, depth)

    def _check_keywords(self, schema: Mapping[str, Any], at: str) -> None:
        known = _ANNOTATIONS | set(_SAID) | {"type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf"}
        for name in schema:
            if name in known or (name in _NARROWING and not self._strict):
                continue
            raise SchemaError(f"{_place(at)}: {name[:60]!r} is not supported{' with strict' * (name in _NARROWING)}")

    def _ref(self, ref: Any, at: str, depth: int) -> str:
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise SchemaError(f"{_place(at)}: $ref must begin with #/")
        if ref in self._of_ref:
            return self._of_ref[ref]
        found: Any = self._schema
        for part in ref.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or part not in found:
                raise SchemaError(f"{_place(at)}: there is nothing at {ref[:100]!r}")
            found = found[part]
        name = self._of_ref[ref] = f"ref{len(self._of_ref)}"
        body = self._visit(found, ref[1:], depth + 1)
        self._rules.append(f"{name} ::= {body}")
        return name

    def _alternatives(self, schema: Mapping[str, Any], name: str, at: str, depth: int) -> str:
        parts = schema[name]
        if not isinstance(parts, list) or not parts:
            raise SchemaError(f"{_place(at)}: {name} is no list of schemas")
        if name == "allOf" and len(parts) > 1:
            raise SchemaError(f"{_place(at)}: allOf of several schemas is not supported")
        if any(keyword in schema for keyword in (*_SAID, "enum", "const")):
            raise SchemaError(f"{_place(at)}: {name} beside other keywords is not supported")
        found = [self._visit(part, f"{at}/{name}/{i}", depth + 1) for i, part in enumerate(parts)]
        return f"({' | '.join(found)})"

    def _of_types(self, schema: Mapping[str, Any], at: str, depth: int) -> str:
        types = schema.get("type")
        if types is None:  # of the one type that its keywords speak of, as is nearly always meant
            types = list(dict.fromkeys(_SAID[name] for name in schema if name in _SAID))
            if not types:
                return "value"
        types = types if isinstance(types, list) else [types]
        if not types or not all(kind in _TYPES for kind in types):
            raise SchemaError(f"{_place(at)}: type is none of {', '.join(_TYPES)}")
        found = [self._of_type(kind, schema, at, depth) for kind in types]
        return found[0] if len(found) == 1 else f"({' | '.join(found)})"

    def _of_type(self, kind: str, schema: Mapping[str, Any], at: str, depth: int) -> str:
        if kind == "object":
            return self._object(schema, at, depth)
        if kind == "array":
            item = self._visit(schema.get("items", True), f"{at}/items", depth + 1)
            low, high = _bounds(schema, "Items", at)
            if high == 0:
                return '("[" ws "]")'
            more = _repetition(f'("," ws {item} ws)', max(low - 1, 0), None if high is None else high - 1)
            some = f"{item} ws {more}"
            return self._rule(f'"[" ws {some if low else f"({some})?"} "]"')
        if kind == "string":
            low, high = _bounds(schema, "Length", at)
            if low or high is not None:
                return self._rule(f'"\\"" {_repetition("char", low, high)} "\\""')
        return kind

    def _object(self, schema: Mapping[str, Any], at: str, depth: int) -> str:
        properties, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        required = schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise SchemaError(f"{_place(at)}: properties or required is not what it should be")
        missing = [name for name in required if name not in properties]
        if missing:
            raise SchemaError(f"{_place(at)}: a required property is not among its properties")
        if not properties:
            return self._map(more, at, depth)
        pairs = [
            (
                f'{_literal(name)} ws ":" ws {self._visit(part, f"{at}/properties/{name}", depth + 1)} ws',
                name in required,
            )
            for name, part in properties.items()
        ]
        return self._rule(f'"{{" ws {self._members(pairs)} "}}"')

    def _map(self, values: Any, at: str, depth: int) -> str:
        """An object whose keys are free."""
        if values is True:
            return "object"
        if values is False:
            return '("{" ws "}")'
        value = self._visit(values, f"{at}/additionalProperties", depth + 1)
        pair = self._rule(f'string ws ":" ws {value} ws')
        return self._rule(f'"{{" ws ({pair} ("," ws {pair})*)? "}}"')

    def _members(self, pairs: list[tuple[str, bool]]) -> str:
        """Pairs in order, each there if it is required and perhaps if it is not, with commas between them."""
        first, further = '""', '""'
        for pair, is_required in reversed(pairs):
            named = self._rule(pair)
            begun = f"{named} {further}"
            first = self._rule(begun if is_required else f"{begun} | {first}")
            further = self._rule(f'"," ws {begun}' if is_required else f'("," ws {named})? {further}')
        return first


def _bounds(schema: Mapping[str, Any], what: str, at: str) -> tuple[int, int | None]:
    low, high = schema.get(f"min{what}", 0), schema.get(f"max{what}")
    for value in (low, 0 if high is None else high):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_REPEATS:
            raise SchemaError(f"{_place(at)}: min{what} and max{what} must be whole numbers up to {_MAX_REPEATS}")
    if high is not None and high < low:
        raise SchemaError(f"{_place(at)}: max{what} is less than min{what}")
    return low, high


def _repetition(expression: str, low: int, high: int | None) -> str:
    return f"{expression}{{{low},{'' if high is None else high}}}"


def _literal(value: Any) -> str:
    """A JSON value as a terminal."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()
    except (ValueError, RecursionError):
        raise SchemaError("a value of the schema cannot be written as JSON") from None
    return f'"{_escaped(text)}"'


def _escaped(text: str) -> str:
    """As it stands between quotes; JSON has no other control character."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\x7f", "\\x7F")


def _place(at: str) -> str:
    return f"the schema at {at[:200]}" if at else "the schema"
