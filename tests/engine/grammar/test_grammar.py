"""Answers under a grammar, on random weights: in any batch, contrasted, drafted, on any budget."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from engine.decoding.always import AlwaysDrafts

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
NUMBERS = {"type": "array", "items": {"type": "number"}}
SHORT_WORD = {"type": "string", "pattern": "^[a-z]{2,5}$"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": PERSON,
    "free object": {"type": "object"},
    "anything": {"type": "object", "properties": {"x": {}}, "required": ["x"]},
    "map of lists": {"type": "object", "additionalProperties": NUMBERS},
    "words": {"type": "array", "items": SHORT_WORD, "minItems": 2},
    "union": {
        "anyOf": [{"type": "string"}, {"type": "integer"}, {"$ref": "#/$defs/Place"}],
        "$defs": PERSON["$defs"],
    },
    "number": {"type": "number"},
}


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
    base = load_base(folder, device="cpu", dtype="float32")
    engine = Engine(base, EngineOptions(speculation=False))
    yield engine
    engine.close()


def prompt(seed: int, length: int = 12) -> list[int]:
    return torch.randint(3, 380, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def constrained(
    seed: int, grammar: Grammar, adapter: Any = None, max_tokens: int = 400, **sampling: Any
) -> Request:
    settings = Sampling(max_tokens=max_tokens, seed=seed, **{"temperature": 1.0, **sampling})
    return Request(prompt(seed), adapter, Contrast(0.3), settings, grammar=grammar)


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
    user = engine.load_adapter(adapter(folder, seed=1))
    requests = [constrained(seed, grammar, user if seed % 2 else None) for seed in range(12)]
    for answer in engine.generate(requests):
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
    validator = validator(schema, format_checker=validator.FORMAT_CHECKER)
    grammar = Grammar(answer=closed_schema(schema))
    requests = [constrained(seed, grammar, max_tokens=1200) for seed in range(3)]
    for answer in engine.generate(requests):
        validator.validate(json.loads(answer.text))


@pytest.mark.parametrize("budget", [140, 200, 400])
def test_an_answer_closes_before_its_budget_ends(budget: int, engine: Engine) -> None:
    grammar = Grammar(answer=closed_schema(PERSON))
    requests = [constrained(seed, grammar, max_tokens=budget) for seed in range(16)]
    answers = engine.generate(requests)
    for answer in answers:
        checked(answer, PERSON)


def test_an_answer_is_not_hurried_while_there_is_room(engine: Engine) -> None:
    endless = {
        "type": "array",
        "items": {"type": "array", "items": {"type": "string"}, "minItems": 2},
        "minItems": 2,
    }
    grammar = Grammar(answer=closed_schema(endless))
    requests = [constrained(seed, grammar, max_tokens=300) for seed in range(8)]
    answers = engine.generate(requests)
    for answer in answers:
        checked(answer, endless)
    assert max(len(answer.token_ids) for answer in answers) > 260


def test_a_budget_that_no_answer_fits_ends_it_as_such(engine: Engine) -> None:
    grammar = Grammar(answer=closed_schema(PERSON))
    answer = engine.generate([constrained(0, grammar, max_tokens=10)])[0]
    assert answer.finish_reason == "length"


def test_answers_are_the_same_alone_in_a_batch_and_with_drafts(
    folder: Path, engine: Engine, adapter: Tiny
) -> None:
    drafting = Engine(engine.base)
    drafting._batch._speculation = AlwaysDrafts()
    animals = {"type": "array", "items": {"enum": ["dog", "fox"]}, "minItems": 30}
    schemas = [*SCHEMAS.values(), animals, animals]
    grammars = [Grammar(answer=closed_schema(schema)) for schema in schemas]
    grammars.insert(-2, Grammar(calls=(("look", closed_schema(PERSON)),), text=True))

    def requests_for(engine: Engine) -> list[Request]:
        user = engine.load_adapter(adapter(folder, seed=1, scale=0.05))
        requests = []
        for seed, grammar in enumerate(grammars):
            temperature = 0.7 if seed % 2 else 0.0
            requests.append(
                constrained(seed, grammar, user, max_tokens=700, temperature=temperature)
            )
        return requests

    requests = requests_for(engine)
    alone = [engine.generate([request])[0].token_ids for request in requests]
    together = [answer.token_ids for answer in engine.generate(requests)]
    drafted = [answer.token_ids for answer in drafting.generate(requests_for(drafting))]
    assert drafting.statistics().accepted > 20
    drafting.close()
    assert together == alone
    assert drafted == alone


@pytest.mark.parametrize("marks", [(), MARKS], ids=["marks are text", "marks are special tokens"])
def test_forced_calls_are_valid(marks: tuple[str, ...], tiny: Tiny) -> None:
    folder = tiny("llama", context=2048, marks=marks)
    engine = Engine(load_base(folder, device="cpu", dtype="float32"))
    add = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    calls = (("add", closed_schema(add)), ("find_person", closed_schema(PERSON)))
    single, several = Grammar(calls, several=False), Grammar(calls)
    ones = [constrained(seed, single, max_tokens=200) for seed in range(8)]
    many = [constrained(seed, several, max_tokens=600) for seed in range(16)]
    num_calls_of_one = {len(calls_of(answer.text)) for answer in engine.generate(ones)}
    num_calls_of_many = {len(calls_of(answer.text)) for answer in engine.generate(many)}
    engine.close()
    assert num_calls_of_one == {1}
    assert max(num_calls_of_many) > 1


def calls_of(text: str) -> list[Any]:
    """Return the calls in `text`, each of which has to be whole; nothing else may be in it."""
    calls = []
    for part in text.split(f"{CALL_BEGIN}\n")[1:]:
        body, rest = part.split(f"\n{CALL_END}")
        assert rest in ("", "\n")
        call = json.loads(body)
        assert list(call) == ["name", "arguments"]
        schema = PERSON if call["name"] == "find_person" else {"required": ["a"]}
        jsonschema.validate(call["arguments"], schema)
        calls.append(call)
    return calls


def test_free_text_has_one_call_where_several_are_not_allowed(engine: Engine) -> None:
    calls = (("ping", closed_schema({"type": "object", "properties": {}})),)
    call = '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'
    for several, allowed in ((True, 2), (False, 1)):
        grammar = Grammar(calls, several, text=True)
        constraint = compile_grammar(grammar, engine.base.vocabulary, room=500)
        ids = engine.base.tokenizer.encode(f"So {call}\n{call}", add_special_tokens=False)
        valid = ids[: constraint._matcher.validate_tokens(ids)]
        assert engine.base.tokenizer.decode(valid).count("</tool_call>") == allowed


def test_stop_strings_do_not_cut_json(engine: Engine) -> None:
    schema = {"type": "array", "items": {"enum": ["a, b"]}, "minItems": 3, "maxItems": 3}
    grammar = Grammar(answer=closed_schema(schema))
    answer = engine.generate([constrained(0, grammar, stop=(",", "]"))])[0]
    assert json.loads(answer.text) == ["a, b"] * 3


def test_masks_after_a_draft_are_those_after_the_tokens_themselves(engine: Engine) -> None:
    grammar = Grammar(answer=closed_schema(PERSON))
    for seed in range(3):
        answer = engine.generate([constrained(seed, grammar, max_tokens=260)])[0]
        ids = list(answer.token_ids)
        plain = compile_grammar(grammar, engine.base.vocabulary, room=260)
        masks = []
        for token in ids:
            masks.append(plain.mask())
            plain.push(token)
        drafting = compile_grammar(grammar, engine.base.vocabulary, room=260)
        for index, token in enumerate(ids):
            draft = drafting.possible(ids[index : index + 8])
            for size in range(len(draft) + 1):
                if index + size < len(masks):
                    assert torch.equal(drafting.mask(draft[:size]), masks[index + size])
            drafting.push(token)


def test_a_call_that_is_begun_in_free_text_is_valid(tiny: Tiny) -> None:
    """A base that has learnt to begin calls, and nothing of how they go on."""
    base = load_base(tiny("llama", context=1024, marks=MARKS), device="cpu", dtype="float32")
    begin = base.tokenizer.convert_tokens_to_ids(CALL_BEGIN)
    engine = Engine(base)
    with torch.no_grad():
        bias = base.model.lm_head.weight[begin].clone()
        base.model.lm_head.weight[begin] *= 2.5  # far more often than by chance
    grammar = Grammar((("find_person", closed_schema(PERSON)),), text=True)
    requests = [constrained(seed, grammar, max_tokens=300) for seed in range(16)]
    answers = engine.generate(requests)
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


INTEGER_OR_NUMBER = {"oneOf": [{"type": "integer"}, {"type": "number"}]}
ELSEWHERE = {"$ref": "https://example.org/a"}
REFUSED: list[tuple[Any, str]] = [
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"not": {"type": "string"}}, "not"),
    ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
    (INTEGER_OR_NUMBER, "oneOf constraints are not supported. Leave"),
    (json.loads("[" * 300 + "]" * 300), "is an object"),
    (nested(600), "nested too deep"),
    ({"if": {"type": "string"}, "then": {"minLength": 2}}, "if"),
    ({"type": "object", "properties": {"a": ELSEWHERE}}, "example.org"),
    ({"type": "nonsense"}, "nonsense"),
    ({"type": "string", "pattern": "(?=a)b"}, "a"),
]


@pytest.mark.parametrize(("schema", "named"), REFUSED)
def test_an_unsupported_keyword_is_refused_by_name(schema: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        closed_schema(schema)


def test_objects_are_closed_where_that_excludes_nothing_and_numbers_limited() -> None:
    closed = json.loads(closed_schema(PERSON))
    place = closed["$defs"]["Place"]
    assert closed["additionalProperties"] is place["additionalProperties"] is False
    assert closed["properties"]["age"] == PERSON["properties"]["age"]
    assert json.loads(closed_schema({"type": "integer"}))["maximum"] == 2**53 - 1
    assert "additionalProperties" not in json.loads(closed_schema({"type": "object"}))
    a, b = ({"type": "object", "properties": {name: {}}} for name in "ab")
    assert "additionalProperties" not in closed_schema({"allOf": [a, b]})
    keyed = {
        "type": "object",
        "propertyNames": {"enum": ["a"]},
        "additionalProperties": {"type": "null"},
    }
    assert json.loads(closed_schema(keyed))["properties"] == {"a": {"type": "null"}}
    assert "format" not in json.loads(closed_schema({"type": "string", "format": "path"}))
    # Names of properties that are keywords as well.
    inner = {"type": "object", "properties": {}}
    properties = {"properties": inner, "enum": {"type": "string"}}
    closed = json.loads(closed_schema({"type": "object", "properties": properties}))
    assert closed["properties"]["properties"]["additionalProperties"] is False


def test_a_schema_without_a_grammar_fails_where_it_is_asked_for(engine: Engine) -> None:
    with pytest.raises(InputError, match="no grammar"):
        engine.stream(Request(prompt(0), grammar=Grammar(answer='{"not": {}}')))
    for schema in (float("nan"), {"enum": {1, 2}}, [1], "{}"):
        with pytest.raises(InputError):
            closed_schema(schema)  # type: ignore[arg-type]
