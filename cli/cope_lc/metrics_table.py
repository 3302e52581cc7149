"""The ways of answering side by side: a table of their figures, and means over users."""

from typing import TYPE_CHECKING, Any

from cope_lc.screen import cell, number, table
from langchain_cope.evaluation.ways import BASE, WAYS, Way

if TYPE_CHECKING:
    from rich.table import Table

MEASURES = {"nll": "NLL ↓", "rouge1": "ROUGE-1 ↑", "rougeL": "ROUGE-L ↑"}
WITH_NLL = [way for way in WAYS if way.has_nll]
LEARNT = [way for way in WITH_NLL if way.adapter is not None]
_BY_ROUGE = [BASE, *[way for way in WAYS if way.contrastive]]  # shown for each user
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


def user_table(users: "list[tuple[str, Metrics]]") -> "Table":
    """Return a row for each user, given as (name, metrics): NLL, its changes, and ROUGE-L."""
    nll_columns = [way.name for way in WITH_NLL]
    nll_columns[0] = f"NLL {nll_columns[0]}"
    change_columns = [f"{way.name} %" for way in LEARNT]
    rouge_columns = [way.name for way in _BY_ROUGE]
    rouge_columns[0] = f"ROUGE-L {rouge_columns[0]}"
    columns = (*nll_columns, *change_columns, *rouge_columns)
    rows = table("user", *columns, right=columns)
    for name, metrics in users:
        nll = [number(metrics[way.name]["nll"]) for way in WITH_NLL]
        changes = [f"{change:+.2%}" for change in nll_changes(metrics).values()]
        rouge = [number(metrics[way.name].get("rougeL")) for way in _BY_ROUGE]
        rows.add_row(cell(name), *nll, *changes, *rouge)
    return rows


def mean_metrics(users: "list[Metrics]") -> Metrics:
    """Return the mean over users of every figure that all have, each user counting the same."""
    means: Metrics = {}
    for way in WAYS:
        means[way.name] = {
            measure: sum(metrics[way.name][measure] for metrics in users) / len(users)
            for measure in users[0][way.name]
            if all(measure in metrics[way.name] for metrics in users)
        }
    return means


def nll_changes(metrics: Metrics) -> dict[str, float]:
    """Return by what share the NLL of each trained way is above (below: negative) the base's."""
    base = metrics[BASE.name]["nll"]
    return {way.name: metrics[way.name]["nll"] / base - 1 for way in LEARNT}


def _figure(metrics: Metrics, way: Way, measure: str) -> Any:
    """Return one figure as a table cell, bold where it is the best of all ways."""
    value = metrics[way.name].get(measure)
    if value is None:
        return cell(number(None))
    column = [figures[measure] for figures in metrics.values() if measure in figures]
    best = min(column) if measure == "nll" else max(column)
    return cell(number(value), "bold" if value == best else "")
