"""Turns pydantic's findings into one line each: dotted key, what is wrong, what is allowed."""

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

Schema = dict[str, Any]
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
_TYPES = {
    "integer": "an integer",
    "number": "a finite number",
    "boolean": "true or false",
    "string": "a non-empty string",
    "null": "null",
}


def describe_errors(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for each error, in the order of the file's keys."""
    root = model.model_json_schema()
    return [_describe(found["type"], found["loc"], found["input"], root) for found in error.errors()]


def _describe(kind: str, loc: Sequence[int | str], value: Any, root: Schema) -> str:
    key = _dotted(loc)
    # An unknown key has no schema of its own: its parent's tells which keys there are.
    if kind == "extra_forbidden":
        return f"{key}: unknown key; {_suggest_keys(str(loc[-1]), list(_find(root, loc[:-1])['properties']))}"
    schema = _find(root, loc)
    if kind == "missing":
        return f"{key}: missing key; it takes {_allowed(schema, root)}"
    if choices := _choices(schema):
        return f"{key}: {_shown(value)} is not one of: {', '.join(choices)}"
    return f"{key}: {_shown(value)} is not {_allowed(schema, root)}"


def _dotted(loc: Sequence[int | str]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc]
    return "".join(parts).removeprefix(".") or "(whole file)"


def _suggest_keys(key: str, known: list[str]) -> str:
    allowed = f"allowed: {', '.join(known)}"
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]!r}? {allowed}" if near else allowed


def _find(root: Schema, loc: Sequence[int | str]) -> Schema:
    """The part of the JSON schema that describes the value at `loc`."""
    schema = root
    for part in loc:
        schema = _resolve(schema, root)
        schema = schema["items"] if isinstance(part, int) else schema["properties"][part]
    return _resolve(schema, root)


def _resolve(schema: Schema, root: Schema) -> Schema:
    if "$ref" in schema:
        return root["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
    return schema


def _choices(schema: Schema) -> list[str]:
    """The names that a value may take (null among them); empty unless it is a choice of names."""
    if "enum" in schema:
        return schema["enum"]
    branches = schema.get("anyOf", [])
    if any("enum" in branch for branch in branches):
        return [name for branch in branches for name in branch.get("enum", ["null"])]
    return []


def _allowed(schema: Schema, root: Schema) -> str:
    schema = _resolve(schema, root)
    if choices := _choices(schema):
        return f"one of: {', '.join(choices)}"
    if "anyOf" in schema:
        return " or ".join(_allowed(branch, root) for branch in schema["anyOf"])
    if schema["type"] == "object":
        return f"a mapping with the keys {', '.join(schema['properties'])}"
    if schema["type"] == "array":
        return _list_of(schema, root)
    bounds = [f"{sign} {schema[name]}" for name, sign in _BOUNDS.items() if name in schema]
    return f"{_TYPES[schema['type']]} {' and '.join(bounds)}".rstrip()


def _list_of(schema: Schema, root: Schema) -> str:
    """Lists of names, of numbers in a range, of texts."""
    many = "a non-empty list of" if schema.get("minItems") else "a list of"
    items = _resolve(schema["items"], root)
    if choices := _choices(items):
        return f"{many} any of: {', '.join(choices)}"
    if items["type"] == "object":
        return f"{many} {_allowed(items, root).removeprefix('a ').replace('mapping', 'mappings', 1)}"
    one = _allowed(items, root).removeprefix("an ").removeprefix("a ")
    noun, _, bounds = one.partition(" >")
    return f"{many} {noun}s" + (f" >{bounds}" if bounds else "")


def _shown(value: Any) -> str:
    """A value as it stands in the file, or nearly so."""
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
