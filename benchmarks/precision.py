"""What the dtype of training costs in what is learnt: held-out NLL against float32.

    python benchmarks/precision.py USERS.jsonl [--users 6] [--items 40] [--queries 12]

The first users of the file (`{"user_id", "history": […], "queries": […]}`), the newest items of
each, are trained on twice (SFT, negatives, DPO): in the dtype that the machine takes by itself, and
in float32. The NLL of their queries, in nats a token, the
mean over queries, is that of each adapter on its own base.
`nll_vs_float32` is the mean over users of the ratio, for the base and for SFT's and DPO's adapter;
`worst` is the ratio farthest from 1. A table, then one JSON object.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from chain import as_items, whole_chain

from langchain_cope.engine import Engine, load_base
from langchain_cope.evaluation.evaluate import item_nll
from langchain_cope.training.pipeline import train_user

STAGES = ("base", "sft", "dpo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("users", type=Path, help="a JSONL of users")
    parser.add_argument("--users", dest="num_users", type=int, default=6)
    parser.add_argument("--items", type=int, default=40, help="newest items of each user")
    parser.add_argument("--queries", type=int, default=12, help="queries of each user")
    parser.add_argument("--model", default="smollm2")
    options = parser.parse_args()
    with options.users.open(encoding="utf-8") as file:
        users = [json.loads(line) for line, _ in zip(file, range(options.num_users), strict=False)]
    figures: dict[str, list[dict[str, float]]] = {}
    for dtype in (None, "float32"):
        engine = Engine(load_base(options.model, dtype=dtype))
        name = str(engine.base.dtype).removeprefix("torch.")
        figures[name] = [_nll(engine, user, options) for user in users]
        engine.close()
    if len(figures) < 2:
        parser.error("this machine trains in float32 by itself: there is nothing to compare")
    (own, reference) = figures.values()
    ratios = {
        f"{stage}_nll_vs_float32": [
            a[stage] / b[stage] for a, b in zip(own, reference, strict=True)
        ]
        for stage in STAGES
    }
    print(f"{'NLL':<24}" + "".join(f"{name} {stage:<8}" for name in figures for stage in STAGES))
    for index, user in enumerate(users):
        cells = [
            f"{of_users[index][stage]:<17.4f}" for of_users in figures.values() for stage in STAGES
        ]
        print(f"{user['user_id']:<24}" + "".join(cells))
    summary = {name: round(statistics.mean(each), 5) for name, each in ratios.items()}
    summary |= {
        f"worst_{name}": round(max(each, key=lambda ratio: abs(ratio - 1)), 5)
        for name, each in ratios.items()
    }
    print(json.dumps({"model": options.model, "nll": figures, "ratios": summary}))


def _nll(engine: Engine, user: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """Return the NLL of a user's queries under the adapters of both stages."""
    items = as_items(user["history"])[-options.items :]
    queries = as_items(user["queries"])[: options.queries]
    with tempfile.TemporaryDirectory() as folder:
        result = train_user(engine, items, whole_chain(engine.base, items), Path(folder))
        adapters = [None, engine.load_adapter(result.sft), engine.load_adapter(result.dpo)]
        return {
            stage: statistics.mean(item_nll(engine, queries, result.recipe, adapter))
            for stage, adapter in zip(STAGES, adapters, strict=True)
        }


if __name__ == "__main__":
    main()
