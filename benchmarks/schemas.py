"""Structured output on random weights: random JSON schemas, every answer checked, cost of a mask.

Schemas are drawn by Hypothesis from the features that people use: enums, nested objects, optional
properties, arrays with bounds, string lengths, number ranges, formats, references to one another
and alternatives. Of those that `closed_schema` accepts, each is answered by a random tiny Llama,
sampled at temperature 1.5, with `--tokens` as the budget. An answer is valid, cut (an explicit
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


Schemas = st.SearchStrategy[dict[str, Any]]


def ranged(low: str, high: str, bounds: st.SearchStrategy[tuple[Any, Any]]) -> Schemas:
    """Return either bound, both or none."""

    def limits(pair: tuple[Any, Any], present: set[str]) -> dict[str, Any]:
        both = zip((low, high), sorted(pair), strict=True)
        return {name: value for name, value in both if name in present}

    return st.builds(limits, bounds, st.sets(st.sampled_from((low, high))))


def leaves() -> Schemas:
    """Return schemas without parts."""
    sizes = st.tuples(st.integers(0, 30), st.integers(0, 30))
    whole = st.tuples(st.integers(-1000, 1000), st.integers(-1000, 1000))
    values = st.one_of(st.text(max_size=8), st.integers(-99, 99), st.none(), st.booleans())
    floats = st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda value: round(value, 3))
    enums = st.lists(values, min_size=1, max_size=5, unique_by=repr)
    numbers = ranged("minimum", "maximum", st.tuples(floats, floats))
    return st.one_of(
        ranged("minLength", "maxLength", sizes).map(lambda r: {"type": "string", **r}),
        ranged("minimum", "maximum", whole).map(lambda r: {"type": "integer", **r}),
        numbers.map(lambda r: {"type": "number", **r}),
        st.sampled_from(FORMATS).map(lambda name: {"type": "string", "format": name}),
        enums.map(lambda several: {"enum": several}),
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
    )


def objects(parts: Schemas) -> Schemas:
    """Return objects of such properties, each required or not."""

    def as_object(drawn: dict[str, tuple[Any, bool]]) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {name: part for name, (part, _) in drawn.items()},
            "required": [name for name, (_, required) in drawn.items() if required],
        }

    return st.dictionaries(NAMES, st.tuples(parts, st.booleans()), max_size=6).map(as_object)


def wider(parts: Schemas) -> Schemas:
    """Return schemas of parts."""
    sizes = ranged("minItems", "maxItems", st.tuples(st.integers(0, 5), st.integers(0, 5)))
    lists = st.tuples(parts, sizes).map(lambda pair: {"type": "array", "items": pair[0], **pair[1]})
    alternatives = st.lists(parts, min_size=2, max_size=3).map(lambda several: {"anyOf": several})
    optional = parts.map(lambda part: {"anyOf": [part, {"type": "null"}]})
    return st.one_of(objects(parts), lists, alternatives, optional)


def schemas() -> Schemas:
    """Return objects, now and then with a tree of themselves inside."""

    def tree(value: dict[str, Any]) -> dict[str, Any]:
        children = {"type": "array", "items": {"$ref": "#/$defs/node"}}
        properties = {"value": value, "children": children}
        node = {"type": "object", "properties": properties, "required": ["value"]}
        return {"$ref": "#/$defs/node", "$defs": {"node": node}}

    flat = objects(st.recursive(leaves(), wider, max_leaves=8))
    return st.one_of(flat, flat, flat, flat.map(tree))


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
    outcomes: Counter[str] = Counter()
    lengths: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        base = load_base(make_model(Path(folder), context=4096), device="cpu", dtype="float32")
        engine = Engine.of(base)
        for start in range(0, len(accepted), TOGETHER):
            group = accepted[start : start + TOGETHER]
            _check(engine, group, options.tokens, outcomes, lengths)
            progress = f"{start + len(group)} of {len(accepted)}  {dict(outcomes)}"
            print(f"\r{progress}", end="", file=sys.stderr)
        engine.close()
    print(file=sys.stderr)
    answered = sum(outcomes.values())
    figures = {
        "schemas": len(drawn),
        "accepted": len(accepted),
        "valid": outcomes["valid"],
        "cut": outcomes["cut"],
        "wrong": outcomes["wrong"],
        "tokens_median": statistics.median(lengths),
        "tokens_most": max(lengths),
        "mask_microseconds_median": round(1e6 * statistics.median(masks), 1),
        "mask_microseconds_p99": round(1e6 * sorted(masks)[int(0.99 * len(masks))], 1),
    }
    ratios = {
        "accepted": round(len(accepted) / len(drawn), 4),
        "valid": round(outcomes["valid"] / answered, 4),
        "cut": round(outcomes["cut"] / answered, 4),
    }
    for name, value in figures.items():
        print(f"{name:<28}{value:>10}")
    for reason, count in refused.most_common(8):
        print(f"refused {count:>4}: {reason}")
    report = {"benchmark": "schemas", "options": vars(options), "figures": figures}
    print(json.dumps({**report, "ratios": ratios}))


def _draw(count: int, number: int) -> list[dict[str, Any]]:
    drawn: dict[str, dict[str, Any]] = {}

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
        drawn.setdefault(json.dumps(schema), schema)

    draw()
    return list(drawn.values())[-count:]  # the first ones are the simplest


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
    """Return the seconds of every mask that is made from now on."""
    seconds: list[float] = []
    make_mask = Constraint.mask

    def timed(self: Constraint, drafted: Any = ()) -> Any:
        started = time.perf_counter()
        mask = make_mask(self, drafted)
        seconds.append(time.perf_counter() - started)
        return mask

    Constraint.mask = timed  # type: ignore[method-assign]
    return seconds


def _check(
    engine: Engine,
    group: list[dict[str, Any]],
    budget: int,
    outcomes: Counter[str],
    lengths: list[int],
) -> None:
    """Answer every schema of the group; count the outcomes and note the lengths."""
    prompt = engine.base.prompt_ids([{"role": "user", "content": "Answer."}])
    requests = []
    for index, schema in enumerate(group):
        sampling = Sampling(max_tokens=budget, temperature=1.5, seed=index)
        grammar = Grammar(answer=closed_schema(schema))
        requests.append(Request(prompt, sampling=sampling, grammar=grammar))
    validator = jsonschema.Draft202012Validator
    for schema, answer in zip(group, engine.generate(requests), strict=True):
        lengths.append(len(answer.token_ids))
        if answer.finish_reason == "length":
            outcomes["cut"] += 1
            continue
        checker = validator(schema, format_checker=validator.FORMAT_CHECKER)
        try:
            checker.validate(json.loads(answer.text))
            outcomes["valid"] += 1
        except (ValueError, jsonschema.ValidationError) as error:
            outcomes["wrong"] += 1
            lines = (json.dumps(schema)[:300], answer.text[:300], str(error).splitlines()[0])
            print("\nwrong: " + "\n".join(lines), file=sys.stderr)


if __name__ == "__main__":
    main()
