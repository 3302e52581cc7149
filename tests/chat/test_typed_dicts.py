"""TypedDicts and schemas with null: what is typed is what an answer may be."""

import json
import typing
from typing import Annotated, Any, Literal, NotRequired, Optional, Required, TypedDict

import jsonschema
import pytest
import typing_extensions
from pydantic import BaseModel, Field

from langchain_cope.chat.tools import ToolUse, described_tool, json_schema
from langchain_cope.engine import closed_schema
from langchain_cope.errors import InputError


class Trip(TypedDict):
    """A journey."""

    place: str
    days: NotRequired[int]
    note: Annotated[NotRequired[str], ..., "what to bring"]
    guide: Optional[str]  # noqa: UP045 - as people write it
    back: int | None


class Loose(TypedDict, total=False):
    place: Required[str]
    days: int


class Derived(Loose):
    guide: str


class Described(typing_extensions.TypedDict):
    place: Annotated[str, "where to"]
    days: Annotated[int, 3, "how many"]
    kind: typing_extensions.ReadOnly[Literal["walk", "ride"]]
    stars: Annotated[int, Field(ge=1, le=5)]


class Tree(TypedDict):
    value: int
    children: "list[Tree]"


class Nested(TypedDict):
    trip: Trip
    others: list[Loose] | None
    by_name: dict[str, Described]


class Odd(TypedDict("Keys", {"json": int, "model_config": int, "_x": int, "a b": int})):  # type: ignore[misc]
    """Names that a class of pydantic has itself, or could not have."""


class OfPydantic(BaseModel):
    place: str
    guide: str | None
    days: Optional[int] = None  # noqa: UP045


WALK = {"place": "x", "days": 1, "kind": "walk", "stars": 5}
INTEGER_OR_NULL = {"type": "integer", "nullable": True}
FITTING: list[tuple[Any, Any]] = [
    (Trip, {"place": "x", "guide": None, "back": None}),
    (Trip, {"place": "x", "days": 1, "note": "y", "guide": "z", "back": 2}),
    (Loose, {"place": "x"}),
    (Loose, {"place": "x", "days": 1}),
    (Derived, {"place": "x", "guide": "y"}),
    (Described, WALK),
    (Described, {"place": "x", "kind": "ride", "stars": 1}),
    (Tree, {"value": 1, "children": [{"value": 2, "children": []}]}),
    (
        Nested,
        {"trip": {"place": "x", "guide": None, "back": 1}, "others": None, "by_name": {"a": WALK}},
    ),
    (Odd, {"json": 1, "model_config": 2, "_x": 3, "a b": 4}),
    (OfPydantic, {"place": "x", "guide": None}),
    (OfPydantic, {"place": "x", "guide": None, "days": None}),
    (INTEGER_OR_NULL, None),
    (INTEGER_OR_NULL, 1),
    ({"type": "string", "enum": ["a"], "nullable": True}, None),
    ({"type": "array", "items": INTEGER_OR_NULL, "nullable": False}, [None, 1]),
    ({"type": "object", "properties": {"nullable": {"type": "integer"}}}, {"nullable": 1}),
    (
        {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/A", "nullable": True}},
            "$defs": {"A": {"type": "object", "properties": {"b": INTEGER_OR_NULL}}},
        },
        {"a": None},
    ),
]
WRONG: list[tuple[Any, Any]] = [
    (Trip, {"place": "x", "guide": None}),
    (Trip, {"place": "x", "days": None, "guide": None, "back": None}),
    (Loose, {"days": 1}),
    (Described, {**WALK, "stars": 6}),
    (Described, {**WALK, "place": None}),
    (OfPydantic, {"place": "x"}),
    ({"type": "integer", "nullable": False}, None),
    (INTEGER_OR_NULL, "a"),
]


def accepts(schema: Any, value: Any) -> bool:
    """Return whether the grammar lets a model write `value`."""
    from llguidance import LLMatcher, LLTokenizer

    grammar = LLMatcher.grammar_from_json_schema(closed_schema(json_schema(schema)))
    matcher = LLMatcher(LLTokenizer("byte"), grammar)
    text = json.dumps(value)
    return bool(matcher.consume_tokens(list(text.encode())) and matcher.is_accepting())


@pytest.mark.parametrize(("schema", "value"), FITTING)
def test_what_is_typed_may_be_answered(schema: Any, value: Any) -> None:
    if isinstance(schema, type):
        jsonschema.validate(value, json_schema(schema))
    assert accepts(schema, value)


@pytest.mark.parametrize(("schema", "value"), WRONG)
def test_what_is_not_typed_may_not_be_answered(schema: Any, value: Any) -> None:
    assert not accepts(schema, value)


def test_a_typed_dict_as_a_tool_has_its_name_and_descriptions() -> None:
    function = described_tool(Trip)["function"]
    assert (function["name"], function["description"]) == ("Trip", "A journey.")
    assert function["parameters"]["required"] == ["place", "guide", "back"]
    assert function["parameters"]["properties"]["note"]["description"] == "what to bring"
    described = described_tool(Described)["function"]["parameters"]["properties"]
    assert described["place"]["description"] == "where to"
    assert described["days"] == {"default": 3, "description": "how many", "type": "integer"}
    assert ToolUse.of({"tools": [Tree], "tool_choice": "any"}).grammar() is not None


def test_annotations_as_text_are_resolved() -> None:
    late = TypedDict("late", {"days": "NotRequired[int]", "place": "str"})  # noqa: UP013
    assert json_schema(late)["required"] == ["place"]


def test_a_typed_dict_that_has_no_schema_is_refused_with_its_reason() -> None:
    strange = typing.TypedDict("strange", {"when": "Nowhere"})  # type: ignore[name-defined]  # noqa: UP013, F821
    with pytest.raises(InputError, match="Nowhere"):
        json_schema(strange)
    plain = TypedDict("plain", {"call": ToolUse.of.__class__})  # type: ignore[misc]  # noqa: UP013
    with pytest.raises(InputError, match="a schema is a Pydantic class, a TypedDict"):
        json_schema(plain)
