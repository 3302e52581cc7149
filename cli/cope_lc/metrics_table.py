"""The ways of answering side by side: a table of their figures, and means over users."""

from typing import TYPE_CHECKING, Any

from cope_lc.screen import cell, number, table
from langchain_cope.evaluation.ways import BASE, WAYS, Way

if TYPE_CHECKING:
    from rich.table import Table

MEASURES = {"nll": "NLL ↓", "rouge1": "ROUGE-1 ↑", "rougeL": "ROUGE-L ↑"}
Metrics = dict[str, dict[str, float]]


def metrics_table(metrics: Metrics, first: str = "") -> "Table":
    """Return a row for each way and a column for each measure, the best figure of each column bold.

    `first` is the heading of the column that names the ways.
    """
    rows = table(first, *MEASURES.values(), right=tuple(MEASURES.values()))
    for way in WAYS:
        figures = [_figure(metrics, way, measure) for measure in MEASURES]
        rows.add_row(cell(way.name), *figures)
    return rows


def mean_metrics(users: "list[Metrics]") -> Metrics:
    """Return the mean over users of every figure, each user counting the same."""
    means: Metrics = {}
    for way in WAYS:
        means[way.name] = {
            measure: sum(metrics[way.name][measure] for metrics in users) / len(users)
            for measure in users[0][way.name]
        }
    return means


def relative_change(metrics: Metrics, way: Way) -> float:
    """Return by what share the NLL of `way` is above (below: negative) the base's."""
    return metrics[way.name]["nll"] / metrics[BASE.name]["nll"] - 1


def _figure(metrics: Metrics, way: Way, measure: str) -> Any:
    """Return one figure as a table cell, bold where it is the best of all ways."""
    value = metrics[way.name].get(measure)
    if value is None:
        return cell(number(None))
    column = [figures[measure] for figures in metrics.values() if measure in figures]
    best = min(column) if measure == "nll" else max(column)
    return cell(number(value), "bold" if value == best else "")
