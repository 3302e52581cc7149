"""Base, SFT, DPO and CoPe side by side."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

WAYS = ("base", "sft", "dpo", "cope")
MEASURES = {"nll": "NLL ↓", "rouge1": "ROUGE-1 ↑", "rougeL": "ROUGE-L ↑"}
Metrics = dict[str, dict[str, float]]


def metrics_table(metrics: Metrics, first: str = "") -> "Table":
    """One row a way, one column a measure; the best figure of each column is bold."""
    from cope_lc.screen import cell, table

    rows = table(first, *MEASURES.values(), right=tuple(MEASURES.values()))
    for way in WAYS:
        figures = [cell(*_figure(metrics, way, measure)) for measure in MEASURES]
        rows.add_row(cell(way), *figures)
    return rows


def mean_metrics(users: "list[Metrics]") -> Metrics:
    """The mean over users of every figure, each user counting the same."""
    return {
        way: {
            measure: sum(user[way][measure] for user in users) / len(users)
            for measure in users[0][way]
        }
        for way in WAYS
    }


def relative_change(metrics: Metrics, way: str) -> float:
    """By what share the NLL of ``way`` is above (below: negative) the base's."""
    return metrics[way]["nll"] / metrics["base"]["nll"] - 1


def _figure(metrics: Metrics, way: str, measure: str) -> tuple[str, str]:
    from cope_lc.screen import number

    value: Any = metrics[way].get(measure)
    present = [metrics[other][measure] for other in WAYS if measure in metrics[other]]
    best = min(present, default=None) if measure == "nll" else max(present, default=None)
    return number(value), "bold" if value is not None and value == best else ""
