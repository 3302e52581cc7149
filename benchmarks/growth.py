"""How cost grows: a training with its items, a decoding step with its prompt and with its rows.

    python benchmarks/growth.py users.jsonl [--items 20 80 320] [--plot docs/growth.svg]

    items    the seconds of SFT, negatives and DPO, without loading and evaluation. The items are
             those of the file's first user, then of the next one, and so on
             (`{"user_id", "history": [{"prompt", "completion"}]}` a line). The recipe is the
             default for the base and so many items: a short history gets more epochs. Each size is
             trained once, after a short training to warm up
    prompt   a step of one user (two rows) with 128 to 2048 tokens behind them
    rows     a step of 1 to 64 rows, 64 tokens behind them: two a user, one without contrast

Steps are those of the default options, the median over the rounds. An exponent is the slope of the
logarithms by least squares: 1 is in proportion, 0 is the same for all; of the steps, the median of
the rounds' slopes. The last line is one JSON object; its `exponents` are `training_in_items`,
`step_in_prompt_length` and `step_in_rows`. `--plot FILE` draws all three (needs matplotlib).
"""

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from worker import (
    Setting,
    Worker,
    alternate,
    machine,
    option_parser,
    prepared,
    print_figures,
    print_report,
    print_table,
    read_items,
)

ITEMS = (20, 80, 320)
PROMPTS = (128, 512, 2048)
ROWS = (1, 2, 4, 8, 16, 32, 64)
SHORT = 64  # tokens of prompt where rows are compared
WARM_UP = 4  # items

Curve = Mapping[int, list[float]]
"""Figures by size, one a round."""


def main() -> None:
    options = _options()
    needed = read_items(options.users, max(options.items))
    state = {**machine("growth", options), "model": options.model}
    print(json.dumps(state), flush=True)
    with prepared(options.device, max(options.rows) // 2 or 1, options.model) as (setting, _):
        stages = _trainings(setting, needed, options.items)
        prompts, rows = _steps(setting, options)
    curves = {
        "training_in_items": {n: [sum(spent.values())] for n, spent in stages.items()},
        "step_in_prompt_length": prompts,
        "step_in_rows": rows,
    }
    exponents = print_figures(
        "exponent", {name: _exponents(curve) for name, curve in curves.items()}, digits=2
    )
    _print_trainings(stages)
    _print_curve("Step of 1 user, tokens before it", prompts)
    _print_curve(f"Step, {SHORT} tokens before it, rows", rows)
    print_report(
        state,
        training_seconds=stages,
        step_milliseconds={"prompt": _medians(prompts), "rows": _medians(rows)},
        exponents=exponents,
    )
    if options.plot:
        _plot(curves, exponents, options.model, options.plot)


def _options() -> argparse.Namespace:
    parser = option_parser(__doc__.splitlines()[0], rounds=3, tokens=13)
    parser.add_argument("users", type=Path, help="a JSONL of users with their histories")
    parser.add_argument("--model", default="smollm2")
    for name, sizes in (("items", ITEMS), ("prompts", PROMPTS), ("rows", ROWS)):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=list(sizes))
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the three curves, as .svg or .png"
    )
    options = parser.parse_args()
    if any(rows > 1 and rows % 2 for rows in options.rows):
        parser.error("--rows takes 1 and even numbers: a contrastive user has two")
    if options.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("--plot needs matplotlib: pip install matplotlib")
    return options


def _trainings(
    setting: Setting, items: Sequence[Mapping[str, str]], sizes: Sequence[int]
) -> dict[int, dict[str, float]]:
    """Return the seconds of each stage by the number of items."""
    with Worker("chain:Training", setting) as training:
        training.run("train", rows=items[:WARM_UP])
        return {size: training.run("train", rows=items[:size]) for size in sizes}


def _steps(setting: Setting, options: argparse.Namespace) -> tuple[Curve, Curve]:
    """Return milliseconds by tokens of prompt, and by rows."""
    with Worker("ours:Ours", setting, num_users=setting.num_users) as ours:
        step = partial(ours.run, "step_milliseconds", num_tokens=options.tokens)
        by_prompt = {
            tokens: partial(step, num_users=1, prompt_tokens=tokens) for tokens in options.prompts
        }
        by_rows = {
            rows: partial(step, num_users=rows // 2 or 1, prompt_tokens=SHORT, contrast=rows > 1)
            for rows in options.rows
        }
        return alternate(by_prompt, options.rounds), alternate(by_rows, options.rounds)


def _exponents(curve: Curve) -> list[float]:
    """Return the slope of the logarithms in each round."""
    sizes = [math.log(size) for size in curve]
    return [
        statistics.linear_regression(sizes, [math.log(figure) for figure in figures]).slope
        for figures in zip(*curve.values(), strict=True)
    ]


def _medians(curve: Curve) -> dict[int, float]:
    return {size: round(statistics.median(figures), 3) for size, figures in curve.items()}


def _print_trainings(stages: Mapping[int, Mapping[str, float]]) -> None:
    names = list(next(iter(stages.values())))
    rows = [
        [str(size), *(f"{spent[name]:.1f}" for name in names), f"{sum(spent.values()):.1f}"]
        for size, spent in stages.items()
    ]
    print_table(["Items", *(f"{name}, s" for name in names), "all, s"], rows)


def _print_curve(what: str, curve: Curve) -> None:
    medians = _medians(curve)
    figures = [f"{milliseconds:.1f}" for milliseconds in medians.values()]
    print_table([what, *map(str, medians)], [["ms", *figures]])


def _plot(
    curves: Mapping[str, Curve], exponents: Mapping[str, float], model: str, file: Path
) -> None:
    """Draw three small panels with logarithmic axes, each beside growth in proportion."""
    from matplotlib.figure import Figure

    labels = {
        "training_in_items": ("items", "training, s"),
        "step_in_prompt_length": ("tokens before the step", "step of 1 user, ms"),
        "step_in_rows": ("rows", "step, ms"),
    }
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, (name, curve) in zip(figure.subplots(1, 3), curves.items(), strict=True):
        medians = _medians(curve)
        sizes, values = list(medians), list(medians.values())
        proportional = [values[0] * size / sizes[0] for size in sizes]
        axes.loglog(sizes, values, "o-")
        axes.loglog(sizes, proportional, "--", color="grey", linewidth=1)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        ticks = [values[0], values[-1], proportional[-1]]
        axes.set_yticks(ticks, [f"{tick:.0f}" if tick >= 100 else f"{tick:.1f}" for tick in ticks])
        axes.set_xlabel(labels[name][0])
        axes.set_ylabel(labels[name][1])
        axes.set_title(f"exponent {exponents[name]:.2f}", fontsize="medium")
        axes.grid(alpha=0.3)
    figure.suptitle(f"{model} (dashed: in proportion)")
    figure.savefig(file)


if __name__ == "__main__":
    main()
