"""A user's versions and history as tables, and how well each version does as a small chart."""

from typing import TYPE_CHECKING, Any

from cope_lc.adapters.stored import local_time, num_bytes
from cope_lc.screen import cell, number, table

if TYPE_CHECKING:
    from rich.table import Table

    from adapter_store import AdapterVersion, HistoryEntry

_BAR_CELLS = 30
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def version_table(versions: list["AdapterVersion"], active: str | None) -> "Table":
    """The versions, the newest first, with what they were measured at."""
    columns = ("", "version", "created", "NLL\nbase → dpo", "ROUGE-L\nbase → cope")
    rows = table(*columns, whole=("", "created"), right=columns[3:])
    rows.columns[1].min_width = max(
        len(version.version) for version in versions
    )  # a model's path may fold, an id not
    for version in reversed(versions):
        strengths = f"α {_plain(version.alpha)}  τ {_plain(version.tau)}"
        model = cell(
            f"{version.version}\n  base {version.base.get('model', '?')}, {num_bytes(version) / 1e6:.1f} MB\n"
        )
        rows.add_row(
            cell("●" if version.version == active else "", "green"),
            model,
            cell(f"{local_time(version.created_at)}\n{strengths}"),
            _change(version.metrics, "nll", "dpo"),
            _change(version.metrics, "rougeL", "cope"),
        )
    return rows


def history_table(history: list["HistoryEntry"]) -> "Table":
    """The changes, the newest first: since when which version is served, what was done, how good it is, and why."""
    rows = table("since", "active", "NLL", "by", "why", whole=("since", "active"), right=("NLL",))
    for change in reversed(history):
        done = change.operation
        if change.version and change.version != change.active:
            done += f" of {change.version}"
        nll = _figure(change.metrics, "dpo", "nll") if change.version == change.active else None
        rows.add_row(
            local_time(change.at),
            change.active or "none",
            number(nll),
            cell(done),
            cell(change.reason),
        )
    return rows


def chart_of(versions: list["AdapterVersion"], active: str | None) -> "Table | None":
    """A bar a version, the oldest first: by what share its held-out NLL is below the base's; None without figures."""
    gains = [(version, gain) for version in versions if (gain := _gain(version)) is not None]
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
    """A bar of `share` of the chart's width, to the eighth of a cell."""
    eighths = round(share * _BAR_CELLS * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _gain(version: "AdapterVersion") -> float | None:
    base, own = (_figure(version.metrics, way, "nll") for way in ("base", "dpo"))
    return 1 - own / base if base and own is not None else None


def _figure(metrics: dict[str, Any], way: str, name: str) -> float | None:
    row = metrics.get(way)
    value = row.get(name) if isinstance(row, dict) else None
    return value if isinstance(value, int | float) else None


def _change(metrics: dict[str, Any], name: str, way: str) -> str:
    return " → ".join(number(_figure(metrics, key, name)) for key in ("base", way))


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"
