"""The charts of the page that `cope-lc evaluate --report` writes: HTML and SVG, no script.

Colours and sizes are classes of the page's style. Whatever a name says is escaped.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from cope_lc.metrics_table import MEASURES

if TYPE_CHECKING:
    from langchain_cope.evaluation.grid import Cell
    from langchain_cope.evaluation.measures import Report

NUM_COLOURS = 8
"""Classes `c0` to `c7` of the page's style; further ways are rings in the same colours."""
_SCALED = {"strangers": 0.0, "the user": 1.0}  # the marks of a voice score
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 330, 210, 44, 34  # pixels of a small chart
_PAD = 12
_DOT = 0.02  # of the width of a row of dots: nearer ones would hide each other
_WIDE = '<div class="wide" tabindex="0" role="region" aria-label="table">'  # scrolls by itself
Point = tuple[float, float, str]
"""Position on both axes, and what it says of itself."""


def user_chart(report: "Report", measure: str) -> str:
    """Return a row for each user and a dot for each way; nothing where nobody has the measure.

    A voice score has a floor, strangers' words, and a ceiling, the user's own.
    """
    values = [
        figures[measure]
        for user in report.users
        for figures in user.metrics.values()
        if measure in figures
    ]
    if not values:
        return ""
    marks = {} if measure == "rougeL" else _SCALED
    low = min(0.0, *values)
    span = max(*values, *marks.values(), low + 1e-9) - low

    def at(value: float) -> str:
        return f"left:{(value - low) / span:.2%}"

    heads = "".join(f'<b style="{at(value)}">{escape(name)}</b>' for name, value in marks.items())
    lines = "".join(f'<u style="{at(value)}"></u>' for value in marks.values())
    names = [(_colour(number), way.name) for number, way in enumerate(report.ways)]
    rows = [f'<span></span><span class="track heads">{heads}</span>' if marks else ""]
    for user in report.users:
        shown = [
            (user.metrics[way][measure], colour, way)
            for colour, way in names
            if measure in user.metrics[way]
        ]
        lanes = _lanes([value for value, _, _ in shown], span * _DOT)
        dots = "".join(
            f'<i class="{colour}" style="{at(value)};--lane:{lane}" '
            f'title="{escape(way)}: {value:.3f}"></i>'
            for (value, colour, way), lane in zip(shown, lanes, strict=True)
        )
        rows.append(
            f'<span class="name">{escape(user.name)}</span>'
            f'<span class="track" style="--lanes:{max(lanes, default=0)}">{lines}{dots}</span>'
        )
    return (
        f"<h3>{escape(MEASURES[measure])}</h3>{_legend(names)}"
        f'<div class="dots" aria-hidden="true">{"".join(rows)}</div>'
        f"{_numbers(report, measure)}"
    )


def _colour(number: int) -> str:
    """Return the class of the way of that number: a dot, and a ring where colours are used up."""
    return f"c{number % NUM_COLOURS}" + (" ring" if number >= NUM_COLOURS else "")


def _lanes(values: Sequence[float], width: float) -> list[int]:
    """Return a lane for each value, so that none lies within `width` of another of its lane."""
    lanes: list[int] = []
    for number, value in enumerate(values):
        taken = {
            lane
            for lane, other in zip(lanes, values[:number], strict=True)
            if abs(value - other) < width
        }
        lanes.append(next(lane for lane in range(number + 1) if lane not in taken))
    return lanes


def _legend(names: Sequence[tuple[str, str]]) -> str:
    items = "".join(f'<li><i class="{kind}"></i>{escape(name)}</li>' for kind, name in names)
    return f'<ul class="legend">{items}</ul>'


def _numbers(report: "Report", measure: str) -> str:
    """Return what a chart shows as a table, for those who cannot see it."""
    ways = [way.name for way in report.ways]
    rows = []
    for user in report.users:
        figures = [user.metrics[way].get(measure) for way in ways]
        rows.append([user.name, *("–" if value is None else f"{value:.3f}" for value in figures)])
    return f"<details><summary>Numbers</summary>{table(['user', *ways], rows)}</details>"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of figures, which scrolls by itself where the window is narrow.

    The first column names the rows. In a cell, lines after the first are small.
    """
    name, *columns = heads
    head = f'<th scope="col">{escape(name)}</th>'
    head += "".join(f'<th scope="col" class="number">{escape(text)}</th>' for text in columns)
    body = []
    for first, *cells in rows:
        shown = "".join(f'<td class="number">{_lines(text)}</td>' for text in cells)
        name = escape(first).replace("+", "+<wbr>")  # where a narrow window may break it
        body.append(f'<tr><th scope="row">{name}</th>{shown}</tr>')
    return (
        f"{_WIDE}<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _lines(text: str) -> str:
    first, *others = map(escape, text.split("\n"))
    return first + "".join(f"<small>{line}</small>" for line in others)


def gains(report: "Report") -> str:
    """Return each user's gain of the last adapter over the reference, and it against the items."""
    shown = _gain_of(report)
    if shown is None:
        return ""
    way, reference = shown
    charts = []
    for measure in ("rougeL", "style", "voice"):
        found = [
            (user, user.metrics[way][measure] - user.metrics[reference][measure])
            for user in report.users
            if measure in user.metrics[way] and measure in user.metrics[reference]
        ]
        if not found:
            continue
        points = [(float(user.num_trained), gain, user.name) for user, gain in found]
        label = f"Δ {MEASURES[measure].split()[0]}"
        ranked = sorted(((gain, user.name) for user, gain in found), reverse=True)
        pair = _bars(ranked, label)
        if len({items for items, _, _ in points}) > 1:
            pair += _figure([("", points)], "items trained on", label, joined=False)
        charts.append(f'<div class="figures">{pair}</div>')
    title = f"<h2>Gain of {escape(way)} over {escape(reference)}</h2>"
    return title + "".join(charts) if charts else ""


def _gain_of(report: "Report") -> tuple[str, str] | None:
    """Return the way whose gain is shown, and what it is a gain over."""
    names = [way.name for way in report.ways]
    learnt = [way.name for way in report.ways if way.adapter and not way.of_another]
    way = "cope" if "cope" in names else next(reversed(learnt), None)
    reference = next((name for name in ("task", "base", "sft") if name in names), None)
    return None if way is None or reference in (None, way) else (way, str(reference))


def _bars(gains: Sequence[tuple[float, str]], label: str) -> str:
    most = max(*(abs(gain) for gain, _ in gains), 1e-9)
    num_up = sum(gain > 0 for gain, _ in gains)
    rows = []
    for gain, name in gains:
        start = 50 + min(0.0, gain) / most * 50
        kind = "up" if gain > 0 else "down"
        bar = f'<i class="{kind}" style="left:{start:.2f}%;width:{abs(gain) / most * 50:.2f}%"></i>'
        rows.append(
            f'<span class="name">{escape(name)}</span><span class="track bar">'
            f'<u style="left:50%"></u>{bar}</span><span class="number">{gain:+.3f}</span>'
        )
    caption = f"{escape(label)}: higher for {num_up} of {len(gains)} users"
    bars = f'<div class="bars">{"".join(rows)}</div>'
    return f"<figure><figcaption>{caption}</figcaption>{bars}</figure>"


def grid_charts(cells: "Sequence[Cell]", tau: float = 0.1) -> str:
    """Return a heat map of α × τ for each measure, and the measures along α at one τ."""
    if not cells:
        return ""
    measures = [name for name in ("rougeL", "voice", "style") if name in cells[0].figures]
    maps = "".join(_heat_map(cells, measure) for measure in measures)
    along = [cell for cell in cells if not cell.alpha or cell.tau == tau]
    lines = []
    for names in (["rougeL"], [name for name in measures if name != "rougeL"]):
        series = [
            (
                MEASURES[name].split()[0],
                [
                    (cell.alpha, cell.figures[name].value, f"α {cell.alpha}")
                    for cell in along
                    if name in cell.figures
                ],
            )
            for name in names
        ]
        if series:
            marks = {} if names == ["rougeL"] else _SCALED
            lines.append(
                _figure(series, f"α, at τ {tau}", " and ".join(s[0] for s in series), marks)
            )
    return (
        "<h2>α and τ</h2><p>Means over users of greedy answers to their newest queries. At α 0 the "
        "adapter answers alone.</p>"
        f'<div class="figures">{maps}</div><div class="figures">{"".join(lines)}</div>'
    )


def _heat_map(cells: "Sequence[Cell]", measure: str) -> str:
    values = {(c.alpha, c.tau): c.figures[measure].value for c in cells if measure in c.figures}
    is_scaled = measure != "rougeL"  # then 1 is best: more of the user than the user is caricature
    best = {each: -abs(value - 1) if is_scaled else value for each, value in values.items()}
    low, high = min(best.values()), max(best.values())
    alphas = sorted({alpha for alpha, _ in values if alpha})
    taus = sorted({tau for alpha, tau in values if alpha})
    alone = next((setting for setting in values if not setting[0]), None)

    def cell(setting: tuple[float, float], rows: int = 1) -> str:
        share = (best[setting] - low) / ((high - low) or 1.0)
        span = f' rowspan="{rows}"' if rows > 1 else ""
        return f'<td{span} class="heat" style="--share:{share:.0%}">{values[setting]:.3f}</td>'

    body = []
    for number, tau in enumerate(taus):
        first = cell(alone, len(taus)) if number == 0 and alone else ""
        rest = "".join(cell((alpha, tau)) for alpha in alphas)
        body.append(f'<tr><th scope="row">τ {tau}</th>{first}{rest}</tr>')
    heads = "".join(f'<th scope="col">α {alpha}</th>' for alpha in ([0] if alone else []) + alphas)
    what = MEASURES[measure] + (" (darkest nearest to 1)" if is_scaled else "")
    return (
        f"<figure><figcaption>{escape(what)}</figcaption>"
        f'{_WIDE}<table class="map"><tr><td></td>{heads}</tr>'
        f"{''.join(body)}</table></div></figure>"
    )


def _figure(
    series: Sequence[tuple[str, Sequence[Point]]],
    x_label: str,
    y_label: str,
    marks: Mapping[str, float] | None = None,
    *,
    joined: bool = True,
) -> str:
    """Return a small chart of points, joined to a line or not; `marks` are levels with a name."""
    points = [point for _, of_series in series for point in of_series]
    levels = marks or {}
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    heights = [*(p[1] for p in points), *levels.values(), *([] if joined else [0.0])]
    y_low, y_high = min(heights), max(heights)

    def x(value: float) -> float:
        share = (value - x_low) / ((x_high - x_low) or 1.0)
        return round(_LEFT + _PAD + share * (_WIDTH - _LEFT - 2 * _PAD), 1)

    def y(value: float) -> float:
        share = (value - y_low) / ((y_high - y_low) or 1.0)
        return round(_HEIGHT - _BOTTOM - _PAD - share * (_HEIGHT - _BOTTOM - 2 * _PAD), 1)

    shapes = [
        f'<path class="axis" d="M{_LEFT} {_PAD}V{_HEIGHT - _BOTTOM}H{_WIDTH}"/>',
        *(_tick(value, _LEFT - 5, y(value) + 4, "end") for value in (y_low, y_high)),
        *(_tick(value, x(value), _HEIGHT - _BOTTOM + 15, "middle") for value in (x_low, x_high)),
        f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
    ]
    for name, value in (levels or ({} if joined else {"": 0.0})).items():
        shapes.append(
            f'<path class="mark" d="M{_LEFT} {y(value)}H{_WIDTH}"/>'
            f'<text x="{_LEFT + 4}" y="{y(value) - 4}">{escape(name)}</text>'
        )
    for number, (_, of_series) in enumerate(series):
        if joined:
            path = "L".join(f"{x(a)} {y(b)}" for a, b, _ in of_series)
            shapes.append(f'<path class="line s{number}" d="M{path}"/>')
        shapes += [
            f'<circle class="s{number}" cx="{x(a)}" cy="{y(b)}" r="4">'
            f"<title>{escape(says)}: {b:.3f}</title></circle>"
            for a, b, says in of_series
        ]
    legend = _legend([(f"s{number}", name) for number, (name, _) in enumerate(series)])
    shown = "; ".join(f"{says} {b:.3f}" for _, of in series for _, b, says in of)
    return (
        f"<figure><figcaption>{escape(y_label)}, {escape(x_label)}</figcaption>"
        f"{legend if len(series) > 1 else ''}"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img" '
        f'aria-label="{escape(shown)}">{"".join(shapes)}</svg></figure>'
    )


def _tick(value: float, x: float, y: float, anchor: str) -> str:
    digits = f"{round(value, 3 if abs(value) < 1 else 2) + 0.0:g}"  # + 0.0: -0.0 becomes 0.0
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{digits}</text>'
