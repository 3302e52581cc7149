"""Answers held to a grammar: whatever the weights are, in any batch, contrasted or not, drafted or not, on any budget."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from engine.decoding.test_speculation import _Always

from langchain_cope.engine import (
    CALL_BEGIN,
    CALL_END,
    Completion,
    Contrast,
    Engine,
    EngineOptions,
    Grammar,
    Request,
    Sampling,
    closed_schema,
    load_base,
)
from langchain_cope.engine.grammar.constraint import compile_grammar
from langchain_cope.errors import InputError

Tiny = Callable[..., Path]
MARKS = ("<tool_call>", "</tool_call>")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"anyOf": [{"type": "string", "format": "email"}, {"type": "null"}]},
        "tags": {
            "type": "array",
            "items": {"enum": ["a", 'b"c', "ü"]},
            "minItems": 1,
            "maxItems": 4,
        },
        "home": {"$ref": "#/$defs/Place"},
    },
    "required": ["name", "age", "home"],
    "$defs": {
        "Place": {
            "type": "object",
            "properties": {
                "street": {"type": "string", "minLength": 3},
                "size": {"type": "number", "exclusiveMinimum": 0},
                "built": {"type": "string", "format": "date-time"},
                "inside": {"type": "array", "items": {"$ref": "#/$defs/Place"}},
            },
            "required": ["street", "size", "built"],
        }
    },
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": PERSON,
    "free object": {"type": "object"},
    "anything": {"type": "object", "properties": {"x": {}}, "required": ["x"]},
    "map of lists": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "number"}}},
    "words": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,5}$"}, "minItems": 2},
    "union": {"anyOf": [{"type": "string"}, {"type": "integer"}, {"$ref": "#/$defs/Place"}], "$defs": PERSON["$defs"]},
    "number": {"type": "number"},
}  # fmt: skip


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"anyOf": [schema]}
    return schema


@pytest.fixture(scope="module")
def folder(tiny: Tiny) -> Path:
    return tiny("llama", context=2048)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    engine = Engine(
        load_base(folder, device="cpu", dtype="float32"), EngineOptions(speculation=False)
    )
    yield engine
    engine.close()


def prompt(seed: int, length: int = 12) -> list[int]:
    return torch.randint(3, 380, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def held(
    seed: int, grammar: Grammar, adapter: Any = None, max_tokens: int = 400, **sampling: Any
) -> Request:
    settings = Sampling(max_tokens=max_tokens, seed=seed, **{"temperature": 1.0, **sampling})
    return Request(
        prompt(seed), adapter, contrast=Contrast(0.3), sampling=settings, grammar=grammar
    )


def checked(answer: Completion, schema: dict[str, Any]) -> Any:
    assert answer.finish_reason == "stop", answer.text[-200:]
    value = json.loads(answer.text)
    jsonschema.validate(value, schema)
    return value


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_weights_answer_what_fits_the_schema(
    name: str, engine: Engine, folder: Path, adapter: Tiny
) -> None:
    grammar = Grammar(answer=closed_schema(SCHEMAS[name]))
    kept = engine.load_adapter(adapter(folder, seed=1))
    for answer in engine.generate(
        [held(seed, grammar, kept if seed % 2 else None) for seed in range(12)]
    ):
        checked(answer, SCHEMAS[name])


FORMATS = (
    "date-time",
    "date",
    "time",
    "email",
    "uuid",
    "ipv4",
    "ipv6",
    "hostname",
    "uri",
    "duration",
)


def test_formats_are_those_of_the_standard(engine: Engine) -> None:
    schema = {
        "type": "object",
        "properties": {name: {"type": "string", "format": name} for name in FORMATS},
    }
    schema["required"] = list(FORMATS)
    validator = jsonschema.Draft202012Validator
    for answer in engine.generate(
        [held(seed, Grammar(answer=closed_schema(schema)), max_tokens=1200) for seed in range(3)]
    ):
        validator(schema, format_checker=validator.FORMAT_CHECKER).validate(json.loads(answer.text))


@pytest.mark.parametrize("budget", [140, 200, 400])
def test_an_answer_closes_before_its_budget_ends(budget: int, engine: Engine) -> None:
    grammar = Grammar(answer=closed_schema(PERSON))
    answers = engine.generate([held(seed, grammar, max_tokens=budget) for seed in range(16)])
    for answer in answers:
        checked(answer, PERSON)


def test_an_answer_is_not_hurried_while_there_is_room(engine: Engine) -> None:
    endless = {
        "type": "array",
        "items": {"type": "array", "items": {"type": "string"}, "minItems": 2},
        "minItems": 2,
    }
    answers = engine.generate(
        [held(seed, Grammar(answer=closed_schema(endless)), max_tokens=300) for seed in range(8)]
    )
    for answer in answers:
        checked(answer, endless)
    assert max(len(answer.token_ids) for answer in answers) > 260


def test_a_budget_that_no_answer_fits_ends_it_as_such(engine: Engine) -> None:
    answer = engine.generate([held(0, Grammar(answer=closed_schema(PERSON)), max_tokens=10)])[0]
    assert answer.finish_reason == "length"


def test_held_answers_are_the_same_alone_in_a_batch_and_with_drafts(
    folder: Path, engine: Engine, adapter: Tiny
) -> None:
    drafting = Engine(engine.base)
    drafting._batch._speculation = _Always()
    requests = []
    for which in (engine, drafting):
        kept = which.load_adapter(adapter(folder, seed=1, scale=0.05))
        grammars = [Grammar(answer=closed_schema(schema)) for schema in SCHEMAS.values()]
        grammars.append(Grammar(calls=(("look", closed_schema(PERSON)),), text=True))
        grammars += [
            Grammar(
                answer=closed_schema(
                    {"type": "array", "items": {"enum": ["dog", "fox"]}, "minItems": 30}
                )
            )
        ] * 2
        requests.append(
            [
                held(seed, grammar, kept, max_tokens=700, temperature=0.7 if seed % 2 else 0.0)
                for seed, grammar in enumerate(grammars)
            ]
        )
    alone = [engine.generate([request])[0].token_ids for request in requests[0]]
    together = [answer.token_ids for answer in engine.generate(requests[0])]
    drafted = [answer.token_ids for answer in drafting.generate(requests[1])]
    assert drafting.statistics().accepted > 20
    drafting.close()
    assert together == alone
    assert drafted == alone


@pytest.mark.parametrize("marks", [(), MARKS], ids=["marks are text", "marks are special tokens"])
def test_forced_calls_are_valid(marks: tuple[str, ...], tiny: Tiny) -> None:
    engine = Engine(
        load_base(tiny("llama", context=2048, marks=marks), device="cpu", dtype="float32")
    )
    add = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    calls = (("add", closed_schema(add)), ("find_person", closed_schema(PERSON)))
    single, several = set(), set()
    for answer in engine.generate(
        [held(seed, Grammar(calls, several=False), max_tokens=200) for seed in range(8)]
    ):
        single.add(len(calls_of(answer.text)))
    for answer in engine.generate(
        [held(seed, Grammar(calls), max_tokens=600) for seed in range(16)]
    ):
        several.add(len(calls_of(answer.text)))
    engine.close()
    assert single == {1}
    assert max(several) > 1


def calls_of(text: str) -> list[Any]:
    """The calls in ``text``, each of which has to be whole; nothing else may be in it."""
    found = []
    for part in text.split(f"{CALL_BEGIN}\n")[1:]:
        body, rest = part.split(f"\n{CALL_END}")
        assert rest in ("", "\n")
        call = json.loads(body)
        assert list(call) == ["name", "arguments"]
        jsonschema.validate(
            call["arguments"], PERSON if call["name"] == "find_person" else {"required": ["a"]}
        )
        found.append(call)
    return found


def test_one_call_at_most_in_free_text_where_several_are_not_allowed(engine: Engine) -> None:
    calls = (("ping", closed_schema({"type": "object", "properties": {}})),)
    call = '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'
    for several, allowed in ((True, 2), (False, 1)):
        constraint = compile_grammar(Grammar(calls, several, text=True), engine.base, room=500)
        ids = engine.base.tokenizer.encode(f"So {call}\n{call}", add_special_tokens=False)
        kept = ids[: constraint._matcher.validate_tokens(ids)]
        assert engine.base.tokenizer.decode(kept).count("</tool_call>") == allowed


def test_stop_strings_do_not_cut_what_is_held(engine: Engine) -> None:
    schema = {"type": "array", "items": {"enum": ["a, b"]}, "minItems": 3, "maxItems": 3}
    answer = engine.generate([held(0, Grammar(answer=closed_schema(schema)), stop=(",", "]"))])[0]
    assert json.loads(answer.text) == ["a, b"] * 3


def test_masks_after_a_draft_are_those_after_the_tokens_themselves(engine: Engine) -> None:
    grammar = Grammar(answer=closed_schema(PERSON))
    for seed in range(3):
        ids = list(engine.generate([held(seed, grammar, max_tokens=260)])[0].token_ids)
        plain = compile_grammar(grammar, engine.base, room=260)
        masks = []
        for token in ids:
            masks.append(plain.mask())
            plain.push(token)
        drafting = compile_grammar(grammar, engine.base, room=260)
        for place, token in enumerate(ids):
            draft = drafting.possible(ids[place : place + 8])
            for size in range(len(draft) + 1):
                if place + size < len(masks):
                    assert torch.equal(drafting.mask(draft[:size]), masks[place + size])
            drafting.push(token)


def test_in_free_text_a_call_that_is_begun_is_valid(tiny: Tiny) -> None:
    """A base that has learnt to begin calls, and nothing of how they go on."""
    base = load_base(tiny("llama", context=1024, marks=MARKS), device="cpu", dtype="float32")
    begin = base.tokenizer.convert_tokens_to_ids(CALL_BEGIN)
    engine = Engine(base)
    with torch.no_grad():
        bias = base.model.lm_head.weight[begin].clone()
        base.model.lm_head.weight[begin] *= 2.5  # far more often than by chance
    grammar = Grammar((("find_person", closed_schema(PERSON)),), text=True)
    answers = engine.generate([held(seed, grammar, max_tokens=300) for seed in range(16)])
    with torch.no_grad():
        base.model.lm_head.weight[begin] = bias
    engine.close()
    begun = [answer.text for answer in answers if CALL_BEGIN in answer.text]
    assert len(begun) > 3
    for text in begun:
        for part in text.split(CALL_BEGIN)[1:]:
            body = part.split(f"\n{CALL_END}")[0]
            if CALL_END in part:
                jsonschema.validate(json.loads(body)["arguments"], PERSON)
            else:  # cut off by the budget
                assert body.startswith('\n{"name": "find_person", "arguments": {'[: len(body)])


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf constraints are not supported. Leave"),
        (json.loads("[" * 300 + "]" * 300), "is an object"),
        (nested(600), "nested too deep"),
        ({"if": {"type": "string"}, "then": {"minLength": 2}}, "if"),
        ({"type": "object", "properties": {"a": {"$ref": "https://example.org/a"}}}, "example.org"),
        ({"type": "nonsense"}, "nonsense"),
        ({"type": "string", "pattern": "(?=a)b"}, "a"),
    ],
)  # fmt: skip
def test_a_keyword_that_cannot_be_held_is_refused_by_name(
    schema: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        closed_schema(schema)


def test_objects_are_closed_where_that_shuts_nothing_out_and_numbers_have_ends() -> None:
    closed = json.loads(closed_schema(PERSON))
    assert (
        closed["additionalProperties"] is closed["$defs"]["Place"]["additionalProperties"] is False
    )
    assert closed["properties"]["age"] == PERSON["properties"]["age"]
    assert json.loads(closed_schema({"type": "integer"}))["maximum"] == 2**53 - 1
    assert "additionalProperties" not in json.loads(closed_schema({"type": "object"}))
    both = {
        "allOf": [
            {"type": "object", "properties": {"a": {}}},
            {"type": "object", "properties": {"b": {}}},
        ]
    }
    assert "additionalProperties" not in closed_schema(both)
    keyed = {
        "type": "object",
        "propertyNames": {"enum": ["a"]},
        "additionalProperties": {"type": "null"},
    }
    assert json.loads(closed_schema(keyed))["properties"] == {"a": {"type": "null"}}
    assert "format" not in json.loads(closed_schema({"type": "string", "format": "path"}))
    named = {
        "type": "object",
        "properties": {
            "properties": {"type": "object", "properties": {}},
            "enum": {"type": "string"},
        },
    }
    assert (
        json.loads(closed_schema(named))["properties"]["properties"]["additionalProperties"]
        is False
    )


def test_what_no_grammar_can_be_made_of_fails_where_it_is_asked(engine: Engine) -> None:
    with pytest.raises(InputError, match="no grammar"):
        engine.stream(Request(prompt(0), grammar=Grammar(answer='{"not": {}}')))
    for schema in (float("nan"), {"enum": {1, 2}}, [1], "{}"):
        with pytest.raises(InputError):
            closed_schema(schema)  # type: ignore[arg-type]
