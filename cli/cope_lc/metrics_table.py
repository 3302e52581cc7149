"""The ways of answering side by side: tables of their figures."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cope_lc.screen import cell, number, table
from langchain_cope.evaluation.ways import BASE, Way

if TYPE_CHECKING:
    from rich.table import Table

    from langchain_cope.evaluation.adapter_matrix import AdapterMatrix
    from langchain_cope.evaluation.grid import Cell
    from langchain_cope.evaluation.over_users import Difference, Estimate

_ALWAYS = {"nll": "NLL ↓", "rouge1": "ROUGE-1 ↑", "rougeL": "ROUGE-L ↑"}
MEASURES = {
    **_ALWAYS,
    "meteor": "METEOR ↑",
    "voice": "voice → 1",
    "style": "style → 1",
    "copied": "copied ↓",
    "distinct1": "dist-1",
    "distinct2": "dist-2",
    "words": "words",
}
COMPARED = ("nll", "rougeL", "voice", "style", "copied")
"""Measures whose differences are shown."""
_LOWER_IS_BETTER = {"nll", "copied"}
_HAS_BEST = {"nll", "rouge1", "rougeL", "meteor"}
Metrics = Mapping[str, Mapping[str, float]]


def metrics_table(metrics: Metrics, first: str = "") -> "Table":
    """Return a row for each way and a column for each measure that any has, the best figure bold.

    `first` is the heading of the column that names the ways.
    """
    had = {measure for figures in metrics.values() for measure in figures}
    measures = [name for name in MEASURES if name in had or name in _ALWAYS]
    columns = tuple(MEASURES[name] for name in measures)
    rows = table(first, *columns, right=columns)
    for way in metrics:
        rows.add_row(cell(way), *(_figure(metrics, way, measure) for measure in measures))
    return rows


def user_table(users: "Sequence[tuple[str, Metrics]]", ways: Sequence[Way]) -> "Table":
    """Return a row for each user, given as (name, metrics): changes of NLL, and ROUGE-L.

    In `ways` are those that the metrics have.
    """
    names = [way.name for way in ways]
    has_base = BASE.name in names
    learnt = [way.name for way in ways if has_base and way.has_nll and way.adapter is not None]
    nll = (f"NLL {BASE.name}", *(f"{name} %" for name in learnt)) if has_base else ()
    rouge = (f"ROUGE-L {names[0]}", *names[1:])
    rows = table("user", *nll, *rouge, right=(*nll, *rouge))
    for name, metrics in users:
        cells = []
        if has_base:
            changes = nll_changes(metrics)
            base = number(metrics[BASE.name].get("nll"))
            cells = [base, *(f"{changes[way]:+.2%}" for way in learnt)]
        cells += [number(metrics[way].get("rougeL")) for way in names]
        rows.add_row(cell(name), *cells)
    return rows


def differences_table(by_way: "Mapping[str, Mapping[str, Difference]]", first: str) -> "Table":
    """Return a row for each way: how far it lies above the reference, and how sure that is."""
    had = {measure for figures in by_way.values() for measure in figures}
    measures = [name for name in COMPARED if name in had]
    columns = tuple(f"Δ {MEASURES[name]}" for name in measures)
    rows = table(first, *columns, right=columns)
    for way, figures in by_way.items():
        cells = [_difference(figures.get(measure)) for measure in measures]
        rows.add_row(cell(way), *cells)
    return rows


def grid_table(cells: "Sequence[Cell]") -> "Table":
    """Return a row for each setting of α and τ: what its answers are like."""
    measures = [name for name in MEASURES if name in cells[0].figures]
    columns = ("α", "τ", *(MEASURES[name] for name in measures))
    rows = table(*columns, right=columns)
    for each in cells:
        tau = number(each.tau, 2) if each.alpha else "any"
        figures = [number(each.figures[name].value) for name in measures]
        rows.add_row(number(each.alpha, 1), tau, *figures)
    return rows


def matrix_line(matrix: "AdapterMatrix") -> str:
    """Return in one sentence how often a user's own adapter knows the user best."""
    top1, above = matrix.top1, matrix.own_above_another
    return (
        f"a user's own adapter is the likeliest of all {matrix.num_users} on the user's texts for "
        f"{_share(top1)} of the users (chance {1 / matrix.num_users:.0%}), and likelier than "
        f"{_share(above)} of the others' (chance 50%)"
    )


def _share(value: "Estimate") -> str:
    if value.interval is None:
        return f"{value.value:.0%}"
    low, high = value.interval
    return f"{value.value:.0%} [{low:.0%}, {high:.0%}]"


def nll_changes(metrics: Metrics) -> dict[str, float]:
    """Return by what share the NLL of each other way is above (below: negative) the base's."""
    base = metrics.get(BASE.name, {}).get("nll")
    if base is None:
        return {}
    return {
        way: figures["nll"] / base - 1
        for way, figures in metrics.items()
        if way != BASE.name and "nll" in figures
    }


def p_text(p: float, digits: int) -> str:
    """Return a p as people read it: none is 0, it is below what can be shown."""
    least = 10**-digits
    return f"p < {least:.{digits}f}" if p < least / 2 else f"p {p:.{digits}f}"


def _difference(value: "Difference | None") -> str:
    return "–" if value is None else f"{value.value:+.3f} ({p_text(value.p, 2)})"


def _figure(metrics: Metrics, way: str, measure: str) -> Any:
    """Return one figure as a table cell, bold where it is the best of all ways."""
    value = metrics[way].get(measure)
    if value is None:
        return cell(number(None))
    column = [figures[measure] for figures in metrics.values() if measure in figures]
    best = min(column) if measure in _LOWER_IS_BETTER else max(column)
    is_best = measure in _HAS_BEST and value == best
    return cell(number(value), "bold" if is_best else "")
