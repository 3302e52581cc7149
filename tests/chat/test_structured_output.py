"""Structured output: every answer of any weights is an object of the schema."""

import json
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import jsonschema
import pytest
from langchain_core.exceptions import OutputParserException
from pydantic import BaseModel, Field
from pydantic.v1 import BaseModel as BaseModelV1

from langchain_cope import ChatCoPe
from langchain_cope.errors import InputError


class Kind(Enum):
    BOOK = "book"
    FILM = "film"


class Tag(BaseModel):
    name: str = Field(max_length=10)
    weight: float = Field(ge=0, le=1)


class Item(BaseModel):
    """Something to read or see."""

    title: str = Field(min_length=1, max_length=30)
    kind: Kind
    year: int | None = Field(default=None, ge=1800, le=2100)
    mood: Literal["light", "dark"]
    tags: list[Tag] = Field(max_length=3)


class ItemV1(BaseModelV1):
    """Something to read or see."""

    title: str
    stars: int


class ItemDict(TypedDict):
    """Something to read or see."""

    title: Annotated[str, ..., "what it is called"]
    stars: int


JSON_SCHEMA = {
    "title": "item",
    "description": "Something.",
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 9},
        "day": {"type": "string", "format": "date"},
    },
    "required": ["title", "day"],
}


@pytest.fixture(scope="module")
def chat(tiny: Callable[..., Path]) -> ChatCoPe:
    base = tiny("llama", context=4096, likely='"]}')  # so that its random JSON closes
    return ChatCoPe(
        model=str(base),
        store="memory://structured",
        max_tokens=500,
        temperature=1.0,
        seed=0,
        device="cpu",
    )


def ask(chat: ChatCoPe, schema: Any, question: str = "A film", **options: Any) -> Any:
    """Return the first answer that closes: random weights do not always find an end."""
    for seed in range(20):
        seeded = chat.model_copy(update={"seed": seed})
        with suppress(OutputParserException):
            return seeded.with_structured_output(schema, **options).invoke(question)
    raise AssertionError("no answer closed")


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_pydantic_classes_come_back_as_instances(chat: ChatCoPe, method: Any) -> None:
    assert isinstance(ask(chat, Item, method=method), Item)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_every_way_to_give_a_schema(chat: ChatCoPe, method: Any) -> None:
    old = ask(chat, ItemV1, method=method)
    assert isinstance(old, ItemV1)
    typed = ask(chat, ItemDict, method=method)
    assert isinstance(typed, dict)
    assert typed.keys() == {"title", "stars"}
    plain = ask(chat, JSON_SCHEMA, method=method)
    jsonschema.validate(plain, JSON_SCHEMA)


async def test_asynchronously_and_with_the_raw_message(chat: ChatCoPe) -> None:
    answer = await chat.with_structured_output(Item, include_raw=True).ainvoke("A film")
    assert isinstance(answer["parsed"], Item)
    assert answer["raw"].response_metadata["finish_reason"] == "stop"
    assert answer["parsing_error"] is None


def test_json_mode_gives_some_object(chat: ChatCoPe) -> None:
    assert isinstance(ask(chat, None, method="json_mode"), dict)


def test_partial_objects_stream(chat: ChatCoPe) -> None:
    states = list(chat.with_structured_output(JSON_SCHEMA).stream("A film"))
    assert len(states) > 2
    jsonschema.validate(states[-1], JSON_SCHEMA)
    assert [len(state) for state in states] == sorted(len(state) for state in states)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("schema", [Item, JSON_SCHEMA])
def test_an_answer_that_was_cut_says_so(chat: ChatCoPe, schema: Any, method: Any) -> None:
    short = chat.model_copy(update={"max_tokens": 5})
    with pytest.raises(OutputParserException, match="cut at max_tokens"):
        short.with_structured_output(schema, method=method).invoke("A film")
    bound = short.with_structured_output(schema, method=method, include_raw=True)
    answer = bound.invoke("A film")
    assert answer["parsed"] is None
    assert "cut at max_tokens" in str(answer["parsing_error"])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_an_object_is_whole_or_refused_on_any_budget(chat: ChatCoPe, method: Any) -> None:
    def answer(seed: int, budget: int) -> dict[str, Any]:
        short = chat.model_copy(update={"max_tokens": budget, "seed": seed})
        bound = short.with_structured_output(JSON_SCHEMA, method=method, include_raw=True)
        given: dict[str, Any] = bound.invoke("A film")
        return given

    tried = ((seed, answer(seed, 100)) for seed in range(20))
    seed, whole = next(pair for pair in tried if pair[1]["parsed"])
    size = whole["raw"].usage_metadata["output_tokens"]
    for budget in [*range(1, size, 4), size - 1, size, size + 1]:
        given = answer(seed, budget)
        assert given["parsed"] == (whole["parsed"] if budget >= size else None)
        assert (given["parsing_error"] is None) == (budget >= size)
        finish = given["raw"].response_metadata["finish_reason"]
        assert (finish == "length") == (budget < size)


class Node(BaseModel):
    """A tree."""

    value: int
    children: list["Node"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_classes_that_refer_to_themselves(chat: ChatCoPe, method: Any) -> None:
    assert isinstance(ask(chat, Node, method=method), Node)


def test_json_schemas_are_taken_as_they_are(chat: ChatCoPe) -> None:
    two = {"type": "array", "items": {"enum": [7]}, "minItems": 2, "maxItems": 2}
    assert chat.with_structured_output(two).invoke("Two") == [7, 7]


def test_a_stop_string_cuts_no_object(chat: ChatCoPe) -> None:
    stopped = chat.model_copy(update={"stop": [",", "\n"]})
    assert isinstance(ask(stopped, Item), Item)


def test_what_cannot_be_held_to_is_refused_when_it_is_bound(chat: ChatCoPe) -> None:
    class Unique(BaseModel):
        names: set[str]

    with pytest.raises(InputError, match="uniqueItems"):
        chat.with_structured_output(Unique)
    with pytest.raises(InputError, match="uniqueItems"):
        chat.with_structured_output(Unique, method="function_calling")
    with pytest.raises(InputError, match="json_schema, function_calling, json_mode"):
        chat.with_structured_output(Item, method="magic")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs a schema"):
        chat.with_structured_output()
    with pytest.raises(InputError, match="has no option colour"):
        chat.with_structured_output(Item, colour="red")


def test_a_response_format_may_be_given_with_the_call(chat: ChatCoPe) -> None:
    given = {"type": "json_schema", "json_schema": {"name": "item", "schema": JSON_SCHEMA}}
    jsonschema.validate(
        json.loads(str(chat.invoke("A film", response_format=given).content)), JSON_SCHEMA
    )
    with pytest.raises(InputError, match="response_format"):
        chat.invoke("A film", response_format=3)
