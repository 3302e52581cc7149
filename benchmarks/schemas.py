"""Structured output on random weights: random JSON schemas, every answer checked, and what the grammar costs a token.

Schemas are drawn by Hypothesis from the features that people use: enums, nested objects, optional properties, arrays with bounds,
string lengths, number ranges, formats, references to one another and alternatives. Of those that `closed_schema` accepts, each is
answered by a random tiny Llama, sampled at temperature 1.5, with ``--tokens`` as the budget. An answer is valid, cut (an explicit
length error), or wrong. The last line is one JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import make_model

from langchain_cope.engine import Engine, Grammar, Request, Sampling, closed_schema, load_base
from langchain_cope.engine.grammar.constraint import Constraint
from langchain_cope.errors import InputError

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
NAMES = st.from_regex(r"[a-zA-Zäöü_][a-zA-Z0-9_ \"-]{0,9}", fullmatch=True)
TOGETHER = 16


def ranged(
    low: str, high: str, bounds: st.SearchStrategy[tuple[Any, Any]]
) -> st.SearchStrategy[dict[str, Any]]:
    """Either bound, both or none."""
    return st.builds(
        lambda pair, keep: {
            k: v for k, v in zip((low, high), sorted(pair), strict=True) if k in keep
        },
        bounds,
        st.sets(st.sampled_from((low, high))),
    )


def leaves() -> st.SearchStrategy[dict[str, Any]]:
    """Schemas without parts."""
    sizes = st.tuples(st.integers(0, 30), st.integers(0, 30))
    whole = st.tuples(st.integers(-1000, 1000), st.integers(-1000, 1000))
    values = st.one_of(st.text(max_size=8), st.integers(-99, 99), st.none(), st.booleans())
    floats = st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda value: round(value, 3))
    return st.one_of(
        ranged("minLength", "maxLength", sizes).map(lambda r: {"type": "string", **r}),
        ranged("minimum", "maximum", whole).map(lambda r: {"type": "integer", **r}),
        ranged("minimum", "maximum", st.tuples(floats, floats)).map(lambda r: {"type": "number", **r}),
        st.sampled_from(FORMATS).map(lambda name: {"type": "string", "format": name}),
        st.lists(values, min_size=1, max_size=5, unique_by=repr).map(lambda several: {"enum": several}),
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
    )  # fmt: skip


def objects(parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects of such properties, each required or not."""
    return st.dictionaries(NAMES, st.tuples(parts, st.booleans()), max_size=6).map(
        lambda drawn: {
            "type": "object",
            "properties": {name: part for name, (part, _) in drawn.items()},
            "required": [name for name, (_, required) in drawn.items() if required],
        }
    )


def wider(parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Schemas of parts."""
    lists = st.tuples(
        parts, ranged("minItems", "maxItems", st.tuples(st.integers(0, 5), st.integers(0, 5)))
    ).map(lambda pair: {"type": "array", "items": pair[0], **pair[1]})
    alternatives = st.lists(parts, min_size=2, max_size=3).map(lambda several: {"anyOf": several})
    optional = parts.map(lambda part: {"anyOf": [part, {"type": "null"}]})
    return st.one_of(objects(parts), lists, alternatives, optional)


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Objects, now and then with a tree of themselves inside."""
    whole = objects(st.recursive(leaves(), wider, max_leaves=8))
    tree = whole.map(
        lambda s: {
            "type": "object",
            "properties": {
                "value": s,
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value"],
        }
    )
    return st.one_of(
        whole,
        whole,
        whole,
        tree.map(lambda node: {"$ref": "#/$defs/node", "$defs": {"node": node}}),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemas", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=1024, help="budget of an answer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    drawn = _draw(options.schemas, options.seed)
    accepted, refused = _accepted(drawn)
    masks = _timed_masks()
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine.of(
            load_base(make_model(Path(folder), context=4096), device="cpu", dtype="float32")
        )
        found: Counter[str] = Counter()
        lengths: list[int] = []
        for start in range(0, len(accepted), TOGETHER):
            _check(engine, accepted[start : start + TOGETHER], options.tokens, found, lengths)
            print(
                f"\r{min(start + TOGETHER, len(accepted))} of {len(accepted)}  {dict(found)}",
                end="",
                file=sys.stderr,
            )
        engine.close()
    print(file=sys.stderr)
    answered = sum(found.values())
    figures = {
        "schemas": len(drawn),
        "accepted": len(accepted),
        "valid": found["valid"],
        "cut": found["cut"],
        "wrong": found["wrong"],
        "tokens_median": statistics.median(lengths),
        "tokens_most": max(lengths),
        "mask_microseconds_median": round(1e6 * statistics.median(masks), 1),
        "mask_microseconds_p99": round(1e6 * sorted(masks)[int(0.99 * len(masks))], 1),
    }
    for name, value in figures.items():
        print(f"{name:<28}{value:>10}")
    for reason, count in refused.most_common(8):
        print(f"refused {count:>4}: {reason}")
    ratios = {
        "accepted": round(len(accepted) / len(drawn), 4),
        "valid": round(found["valid"] / answered, 4),
        "cut": round(found["cut"] / answered, 4),
    }
    print(
        json.dumps(
            {"benchmark": "schemas", "options": vars(options), "figures": figures, "ratios": ratios}
        )
    )


def _draw(count: int, number: int) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}

    @seed(number)
    @settings(
        max_examples=count * 2,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    @given(schemas())
    def draw(schema: dict[str, Any]) -> None:
        found.setdefault(json.dumps(schema), schema)

    draw()
    return list(found.values())[-count:]  # the first ones are the simplest


def _accepted(drawn: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Counter[str]]:
    accepted, refused = [], Counter[str]()
    for schema in drawn:
        try:
            closed_schema(schema)
            accepted.append(schema)
        except InputError as error:
            refused[str(error).split(": ", 1)[1][:60]] += 1
    return accepted, refused


def _timed_masks() -> list[float]:
    """Seconds of every mask that is made from now on."""
    seconds: list[float] = []
    mask = Constraint.mask

    def timed(self: Constraint, drafted: Any = ()) -> Any:
        started = time.perf_counter()
        found = mask(self, drafted)
        seconds.append(time.perf_counter() - started)
        return found

    Constraint.mask = timed  # type: ignore[method-assign]
    return seconds


def _check(
    engine: Engine,
    group: list[dict[str, Any]],
    budget: int,
    found: Counter[str],
    lengths: list[int],
) -> None:
    prompt = engine.base.prompt_ids([{"role": "user", "content": "Answer."}])
    requests = [
        Request(
            prompt,
            sampling=Sampling(max_tokens=budget, temperature=1.5, seed=index),
            grammar=Grammar(answer=closed_schema(schema)),
        )
        for index, schema in enumerate(group)
    ]
    for schema, answer in zip(group, engine.generate(requests), strict=True):
        lengths.append(len(answer.token_ids))
        if answer.finish_reason == "length":
            found["cut"] += 1
            continue
        try:
            validator = jsonschema.Draft202012Validator
            validator(schema, format_checker=validator.FORMAT_CHECKER).validate(
                json.loads(answer.text)
            )
            found["valid"] += 1
        except (ValueError, jsonschema.ValidationError) as error:
            found["wrong"] += 1
            print(
                f"\nwrong: {json.dumps(schema)[:300]}\n{answer.text[:300]}\n{str(error).splitlines()[0]}",
                file=sys.stderr,
            )


if __name__ == "__main__":
    main()
