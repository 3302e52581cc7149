"""A user's versions and history as tables, and how good each version is as a small chart."""

from typing import TYPE_CHECKING, Any

from cope_lc.adapters.stored import local_time, num_bytes
from cope_lc.screen import cell, number, table

if TYPE_CHECKING:
    from rich.table import Table

    from adapter_store import AdapterVersion, HistoryEntry
    from langchain_cope.evaluation.ways import Way

_BAR_CELLS = 30
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def version_table(versions: list["AdapterVersion"], active: str | None) -> "Table":
    """Return a table of the versions, the newest first, with what they were measured at."""
    from langchain_cope.evaluation.ways import BASE, COPE, DPO
    from langchain_cope.strength import recommended_scale

    nll = f"NLL\n{BASE.name} → {DPO.name}"
    rouge = f"ROUGE-L\n{BASE.name} → {COPE.name}"
    columns = ("", "version", "created", nll, rouge)
    rows = table(*columns, whole=("", "created"), right=columns[3:])
    # A model's path may be folded, a version's id not.
    rows.columns[1].min_width = max(len(version.version) for version in versions)
    for version in reversed(versions):
        size = f"{num_bytes(version) / 1e6:.1f} MB"
        task = version.metadata.get("task_adapter")
        with_task = f" with the task adapter {task}" if task else ""
        model = f"base {version.base.get('model', '?')}{with_task}, {size}"
        contrast = f"α {_plain(version.alpha)}  τ {_plain(version.tau)}"
        scale = recommended_scale(version.metadata)
        if scale is not None:
            contrast += f"\nadapter scale {_plain(scale)}"
        rows.add_row(
            cell("●" if version.version == active else "", "green"),
            cell(f"{version.version}\n  {model}\n"),
            cell(f"{local_time(version.created_at)}\n{contrast}"),
            _change(version.metrics, "nll", BASE, DPO),
            _change(version.metrics, "rougeL", BASE, COPE),
        )
    return rows


def history_table(history: list["HistoryEntry"]) -> "Table":
    """Return a table of the changes, the newest first: what was served since when, and why."""
    from langchain_cope.evaluation.ways import DPO

    rows = table("since", "active", "NLL", "by", "why", whole=("since", "active"), right=("NLL",))
    for change in reversed(history):
        is_of_active = change.version == change.active
        operation = change.operation
        if change.version and not is_of_active:
            operation += f" of {change.version}"
        nll = _figure(change.metrics, DPO, "nll") if is_of_active else None
        rows.add_row(
            local_time(change.at),
            change.active or "none",
            number(nll),
            cell(operation),
            cell(change.reason),
        )
    return rows


def chart_of(versions: list["AdapterVersion"], active: str | None) -> "Table | None":
    """Return a chart of how far each version's held-out NLL is below the base's.

    A bar for each version, the oldest first; None where no version has figures.
    """
    gains = []
    for version in versions:
        gain = _gain(version)
        if gain is not None:
            gains.append((version, gain))
    if not gains:
        return None
    longest = max(abs(gain) for _, gain in gains) or 1.0
    rows = table("", "", "", whole=("",))
    rows.show_header = False
    for version, gain in gains:
        style = "green" if gain > 0 else "red"
        rows.add_row(
            cell(version.version, "bold" if version.version == active else ""),
            cell(bar(abs(gain) / longest), style),
            cell(f"{-100 * gain:+.2f} %", style),
        )
    return rows


def bar(share: float) -> str:
    """Return a bar of `share` of the chart's width, to the eighth of a cell."""
    eighths = round(share * _BAR_CELLS * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _gain(version: "AdapterVersion") -> float | None:
    """Return the share by which a version's NLL is below the base's; None without figures."""
    from langchain_cope.evaluation.ways import BASE, DPO

    base = _figure(version.metrics, BASE, "nll")
    personal = _figure(version.metrics, DPO, "nll")
    return 1 - personal / base if base and personal is not None else None


def _figure(metrics: dict[str, Any], way: "Way", measure: str) -> float | None:
    figures = metrics.get(way.name)
    value = figures.get(measure) if isinstance(figures, dict) else None
    return value if isinstance(value, int | float) else None


def _change(metrics: dict[str, Any], measure: str, before: "Way", after: "Way") -> str:
    old, new = _figure(metrics, before, measure), _figure(metrics, after, measure)
    return f"{number(old)} → {number(new)}"


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"
