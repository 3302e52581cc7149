"""Answers under a grammar, on random weights: in any batch, contrasted, drafted, on any budget.

No answer is hurried to its end, so that some of these models' never close: they are cut.
"""

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
from langchain_cope.engine.grammar.patterns import most_patterns
from langchain_cope.errors import InputError

Tiny = Callable[..., Path]
MARKS = ("<tool_call>", "</tool_call>")
CLOSING = '"]}'

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
    return tiny("llama", context=2048, likely=CLOSING)


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


def check_all(answers: list[Completion], schema: dict[str, Any]) -> None:
    """Check those that closed, which most have to."""
    closed = [answer for answer in answers if answer.finish_reason == "stop"]
    assert len(closed) > len(answers) / 2
    for answer in closed:
        jsonschema.validate(json.loads(answer.text), schema)


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_weights_answer_what_fits_the_schema(
    name: str, engine: Engine, folder: Path, adapter: Tiny
) -> None:
    grammar = Grammar(answer=closed_schema(SCHEMAS[name]))
    user = engine.load_adapter(adapter(folder, seed=1))
    requests = [constrained(seed, grammar, user if seed % 2 else None) for seed in range(12)]
    check_all(engine.generate(requests), SCHEMAS[name])


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


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_those_of_the_standard(name: str, engine: Engine) -> None:
    schema = {"type": "string", "format": name}
    validator = jsonschema.Draft202012Validator
    validator = validator(schema, format_checker=validator.FORMAT_CHECKER)
    grammar = Grammar(answer=closed_schema(schema))
    requests = [constrained(seed, grammar, max_tokens=150) for seed in range(6)]
    closed = [each for each in engine.generate(requests) if each.finish_reason == "stop"]
    assert closed
    for answer in closed:
        validator.validate(json.loads(answer.text))


NO_ARGUMENTS = closed_schema({"type": "object", "properties": {}})
ONE_NUMBER = closed_schema(
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
)
BUDGETED: dict[str, Grammar] = {
    "object": Grammar(answer=closed_schema(PERSON)),
    "list": Grammar(answer=closed_schema(NUMBERS)),
    "string": Grammar(answer=closed_schema({"type": "string"})),
    "calls": Grammar((("ping", NO_ARGUMENTS), ("add", ONE_NUMBER))),
    "one call": Grammar((("add", ONE_NUMBER),), several=False),
    "calls in text": Grammar((("add", ONE_NUMBER),), text=True),
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", BUDGETED)
def test_an_answer_on_any_budget_begins_the_whole_one(
    name: str, temperature: float, engine: Engine
) -> None:
    most = 60

    def request(budget: int) -> Request:
        return constrained(3, BUDGETED[name], max_tokens=budget, temperature=temperature)

    whole = engine.generate([request(most)])[0]
    size = len(whole.token_ids)
    answers = engine.generate([request(budget) for budget in range(1, most)])
    for budget, answer in enumerate(answers, start=1):
        assert answer.token_ids == whole.token_ids[:budget]
        assert whole.text.startswith(answer.text.rstrip("\ufffd"))
        assert answer.finish_reason == ("length" if budget < size else whole.finish_reason)


def test_the_end_of_the_context_hurries_no_answer(engine: Engine) -> None:
    grammar = Grammar(answer=closed_schema(PERSON))
    context = engine.base.context
    long = Sampling(max_tokens=400, temperature=1.0, seed=5)
    short = Sampling(max_tokens=20, temperature=1.0, seed=5)
    ids = prompt(0, length=context - 20)
    at_the_end, cut = engine.generate(
        [Request(ids, sampling=each, grammar=grammar) for each in (long, short)]
    )
    assert at_the_end == cut
    assert cut.finish_reason == "length"
    assert len(cut.token_ids) == 20


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
                constrained(seed, grammar, user, max_tokens=250, temperature=temperature)
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
    folder = tiny("llama", context=2048, marks=marks, likely=CLOSING)
    engine = Engine(load_base(folder, device="cpu", dtype="float32"))
    calls = (("add", ONE_NUMBER), ("find_person", closed_schema(PERSON)))
    single, several = Grammar(calls, several=False), Grammar(calls)
    ones = [constrained(seed, single, max_tokens=200) for seed in range(8)]
    many = [constrained(seed, several, max_tokens=250) for seed in range(24)]
    answers = engine.generate([*ones, *many])
    engine.close()
    closed = [each.finish_reason == "stop" for each in answers]
    num_calls = [len(calls_of(answer.text)) for answer in answers]
    assert {
        number for number, is_whole in zip(num_calls[:8], closed, strict=False) if is_whole
    } == {1}
    assert sum(closed[8:]) > 4
    assert max(num_calls[8:]) > 1


def calls_of(text: str) -> list[Any]:
    """Return the whole calls in `text`; nothing else may be in it but one that was cut."""
    calls = []
    for part in text.split(f"{CALL_BEGIN}\n")[1:]:
        if CALL_END not in part:
            break
        body, rest = part.split(f"\n{CALL_END}")
        assert rest in ("", "\n")
        call = json.loads(body)
        assert list(call) == ["name", "arguments"]
        schema = PERSON if call["name"] == "find_person" else {"required": ["a"]}
        jsonschema.validate(call["arguments"], schema)
        calls.append(call)
    return calls


def test_free_text_has_one_call_where_several_are_not_allowed(engine: Engine) -> None:
    calls = (("ping", NO_ARGUMENTS),)
    call = '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'
    for several, allowed in ((True, 2), (False, 1)):
        grammar = Grammar(calls, several, text=True)
        constraint = compile_grammar(grammar, engine.base.vocabulary)
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
        plain = compile_grammar(grammar, engine.base.vocabulary)
        masks = []
        for token in ids:
            masks.append(plain.mask())
            plain.push(token)
        drafting = compile_grammar(grammar, engine.base.vocabulary)
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


def chained(number: int, reference: str) -> dict[str, Any]:
    """Return a schema of a text that has to fit so many patterns, each referring to the next."""
    parts = {
        f"p{index}": {
            "$anchor": f"p{index}",
            "type": "string",
            "pattern": f"a.{{{index}}}b",
            "$ref": f"{reference}p{index + 1}",
        }
        for index in range(number)
    }
    return {"$ref": f"{reference}p0", "$defs": {**parts, f"p{number}": {"$anchor": f"p{number}"}}}


def test_too_many_patterns_for_one_text_are_refused_at_once() -> None:
    search = [{"type": "string", "pattern": f"a.{{{index}}}b"} for index in range(16)]
    either = {"anyOf": [{"type": "null"}, {"allOf": search[8:]}], "allOf": search[:8]}
    for schema in (
        {"allOf": search},
        {"properties": {"name": either}},
        chained(16, "#/$defs/"),
        chained(16, "#"),
    ):
        with pytest.raises(InputError, match="at a time"):
            closed_schema(schema)


def test_patterns_of_many_texts_do_not_count_together() -> None:
    names = {f"name{index}": {"$ref": "#/$defs/name"} for index in range(20)}
    name = {"type": "string", "pattern": "^[a-z]", "allOf": [{"pattern": "[a-z]$"}]}
    recursive = {"type": "array", "items": {"$ref": "#"}}
    closed_schema({"properties": {**names, "pattern": {"type": "string"}}, "$defs": {"name": name}})
    assert most_patterns({"properties": names, "$defs": {"name": name}}) == 2
    assert most_patterns(recursive) == most_patterns({"$ref": "#"}) == 0


def test_a_schema_that_no_answer_can_ever_fit_is_the_callers_error(engine: Engine) -> None:
    endless = Grammar(answer=closed_schema({"$ref": "#"}))
    with pytest.raises(InputError, match=r"held to its schema[^\n]*$"):
        engine.generate([Request(prompt(0), grammar=endless)])


def test_objects_are_closed_where_that_excludes_nothing() -> None:
    closed = json.loads(closed_schema(PERSON))
    place = closed["$defs"]["Place"]
    assert closed["additionalProperties"] is place["additionalProperties"] is False
    assert closed["properties"]["age"] == PERSON["properties"]["age"]
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


CHOSEN: list[tuple[dict[str, Any], str]] = [
    ({"type": "integer"}, "12345678901234567890123"),
    ({"type": "number"}, "6.02e23"),
    ({"type": "number"}, "12345678901234567890123.5"),
    ({"type": ["integer", "null"]}, "-98765432109876543210"),
    ({"type": "string", "format": "date"}, '"2024-02-29"'),
    ({"type": "string", "format": "date"}, '"2000-02-29"'),
    ({"type": "string", "format": "date-time"}, '"2028-02-29T10:00:00Z"'),
    ({"type": "string", "format": "hostname"}, '"ec2-1-2-3-4.eu-west-1.compute.amazonaws.com"'),
    ({"type": "string", "format": "hostname"}, f'"{"a" * 63}.example.org"'),
]
NEVER: list[tuple[dict[str, Any], str]] = [
    ({"type": "string", "format": "date"}, '"2023-02-29"'),
    ({"type": "string", "format": "date"}, '"1900-02-29"'),
    ({"type": "string", "format": "hostname"}, f'"{"a." * 126}aa"'),
]


@pytest.mark.parametrize(("schema", "text"), CHOSEN)
def test_what_the_model_may_choose_is_not_cut_by_us(
    schema: dict[str, Any], text: str, engine: Engine
) -> None:
    assert written(schema, text, engine) == text


@pytest.mark.parametrize(("schema", "text"), NEVER)
def test_days_and_names_that_cannot_be_are_not_written(
    schema: dict[str, Any], text: str, engine: Engine
) -> None:
    assert written(schema, text, engine) != text


def written(schema: dict[str, Any], text: str, engine: Engine) -> str:
    """Return the beginning of `text` that the grammar lets a model write."""
    constraint = compile_grammar(Grammar(answer=closed_schema(schema)), engine.base.vocabulary)
    ids = engine.base.tokenizer.encode(text, add_special_tokens=False)
    return str(engine.base.tokenizer.decode(constraint.possible(ids)))


def test_a_schema_without_a_grammar_fails_where_it_is_asked_for(engine: Engine) -> None:
    with pytest.raises(InputError, match="no grammar"):
        engine.stream(Request(prompt(0), grammar=Grammar(answer='{"not": {}}')))
    for schema in (float("nan"), {"enum": {1, 2}}, [1], "{}"):
        with pytest.raises(InputError):
            closed_schema(schema)  # type: ignore[arg-type]


@pytest.mark.parametrize("speculation", [False, True])
@pytest.mark.parametrize(
    "schema",
    [
        {"enum": ["x<|im_end|>y"]},
        {"enum": ["<|im_start|>a", "<|im_start|>b"]},
        {"type": "string", "pattern": r"^<\|im_end\|>$"},
        {"const": {"</tool_call>": "<tool_call>"}},
    ],
    ids=["enum", "alternatives", "pattern", "marks of calls"],
)
def test_a_control_token_in_a_schema_is_written_as_text(
    schema: dict[str, Any], speculation: bool, tiny: Tiny
) -> None:
    base = load_base(tiny("llama", context=2048, marks=MARKS, likely=CLOSING), dtype="float32")
    engine = Engine(base, EngineOptions(speculation=speculation))
    answer, called = engine.generate(
        [
            constrained(0, Grammar(answer=closed_schema(schema))),
            constrained(0, Grammar((("f", closed_schema(schema)),), several=False)),
        ]
    )
    engine.close()
    jsonschema.validate(json.loads(answer.text), schema)
    call = called.text.removeprefix(f"{CALL_BEGIN}\n").removesuffix(f"\n{CALL_END}")
    jsonschema.validate(json.loads(call)["arguments"], schema)
