"""The page that `cope-lc evaluate --report` writes: one HTML file that needs nothing else.

Whatever people or models wrote is escaped, and the page runs no script.
"""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from cope_lc.metrics_table import COMPARED, MEASURES

if TYPE_CHECKING:
    from langchain_cope.evaluation.measures import Report, Sample, UserFigures
    from langchain_cope.evaluation.over_users import Difference, Estimate
    from langchain_cope.evaluation.users import Answer

SHOWN_SAMPLES = 3  # a user
_CHARTED = ("style", "voice", "rougeL")
_LEFT, _WIDTH, _RIGHT, _ROW = 150, 460, 20, 22  # pixels of a chart
_COLOURS = ("#888", "#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#000")
_FULL = 2.0  # nats by which a word is likelier under the user's model, for its full colour
# The policy holds even where the file is served: nothing is loaded, nothing runs.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .25rem .7rem; text-align: left; vertical-align: top }
th { border-bottom: 1px solid #999; font-weight: 600 }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
small { color: #666 } .text { white-space: pre-wrap; overflow-wrap: anywhere }
svg { display: block; margin: 1rem 0; max-width: 100% }
"""


def html_report(report: "Report", model: str, task_adapter: str | None = None) -> str:
    """Return the page: figures of all ways, each user's gain, and samples side by side."""
    on = f"{model} with the task adapter {task_adapter}" if task_adapter else model
    parts = [
        f"<h1>{len(report.ways)} ways of answering, {len(report.users)} users</h1>",
        f"<p>On {escape(on)}. Means over users; in brackets 95 % intervals over users.</p>",
        _means(report),
        *(_differences(name, by_way) for name, by_way in report.differences.items()),
        *(_chart(report, measure) for measure in _CHARTED),
        *(f"<p><small>{escape(note)}</small></p>" for note in report.notes),
        "<h2>Samples</h2>",
        "<p>Green words are likelier under the user's model than under the base, red ones less "
        "likely; where a way computes both.</p>",
        *(_samples(user) for user in report.users),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>cope-lc evaluate</title><style>{_STYLE}</style></head>\n"
        f"<body>{chr(10).join(part for part in parts if part)}</body></html>\n"
    )


def _means(report: "Report") -> str:
    had = {measure for figures in report.means.values() for measure in figures}
    measures = [name for name in MEASURES if name in had]
    rows = [
        [way, *(_estimate(figures.get(name)) for name in measures)]
        for way, figures in report.means.items()
    ]
    return _table(["", *(MEASURES[name] for name in measures)], rows)


def _differences(reference: str, by_way: "dict[str, dict[str, Difference]]") -> str:
    had = {measure for figures in by_way.values() for measure in figures}
    measures = [name for name in COMPARED if name in had]
    rows = []
    for way, figures in by_way.items():
        cells = []
        for name in measures:
            value = figures.get(name)
            more = f", p {value.p:.3f}, above for {value.num_above}" if value else ""
            cells.append(_estimate(value, sign=True) + more)
        rows.append([way, *cells])
    heads = ["", *(f"Δ {MEASURES[name]}" for name in measures)]
    return f"<h2>Against {escape(reference)}, user by user</h2>{_table(heads, rows)}"


def _estimate(value: "Estimate | None", *, sign: bool = False) -> str:
    if value is None:
        return "–"
    form = "+.3f" if sign else ".3f"
    interval = ""
    if value.interval is not None:
        low, high = value.interval
        interval = f" [{low:{form}}, {high:{form}}]"
    return f"{value.value:{form}}{interval}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = []
    for first, *numbers in rows:
        cells = "".join(f'<td class="number">{escape(text)}</td>' for text in numbers)
        body.append(f"<tr><td>{escape(first)}</td>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def _chart(report: "Report", measure: str) -> str:
    """Return a row for each user and a dot for each way; nothing where nobody has the measure.

    A voice score has a floor, strangers' words, and a ceiling, the user's own.
    """
    points = [
        (row, number, way.name, user.metrics[way.name][measure])
        for row, user in enumerate(report.users)
        for number, way in enumerate(report.ways)
        if measure in user.metrics[way.name]
    ]
    if not points:
        return ""
    marks = {} if measure == "rougeL" else {"strangers": 0.0, "the user": 1.0}
    values = [0.0, *marks.values(), *(value for *_, value in points)]
    low, high = min(values), max(values)
    scale = _WIDTH / ((high - low) or 1.0)

    def x(value: float) -> float:
        return round(_LEFT + (value - low) * scale, 1)

    bottom = _ROW * (len(report.users) + 1)
    shapes = []
    for name, value in marks.items():
        shapes.append(
            f'<line x1="{x(value)}" x2="{x(value)}" y1="{_ROW}" y2="{bottom}" stroke="#999" '
            f'stroke-dasharray="4 3"/><text x="{x(value)}" y="14" text-anchor="middle">'
            f"{escape(name)}</text>"
        )
    for row, user in enumerate(report.users):
        y = _ROW * row + _ROW * 1.5
        name = escape(user.name if len(user.name) <= 20 else f"{user.name[:19]}…")
        shapes.append(
            f'<text x="{_LEFT - 12}" y="{y + 4}" text-anchor="end">{name}</text>'
            f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y}" y2="{y}" stroke="#eee"/>'
        )
    for row, number, way, value in points:
        y = _ROW * row + _ROW * 1.5
        shapes.append(
            f'<circle cx="{x(value)}" cy="{y}" r="5" fill="{_colour(number)}" fill-opacity=".8">'
            f"<title>{escape(way)}: {value:.3f}</title></circle>"
        )
    legend = []
    for number, name in enumerate(way.name for way in report.ways):
        y = bottom + 16 + 18 * number
        legend.append(
            f'<circle cx="{_LEFT}" cy="{y}" r="5" fill="{_colour(number)}"/>'
            f'<text x="{_LEFT + 12}" y="{y + 4}">{escape(name)}</text>'
        )
    width, height = _LEFT + _WIDTH + _RIGHT, bottom + 20 + 18 * len(report.ways)
    return (
        f"<h2>{escape(MEASURES[measure])}, each user</h2>"
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'font-size="13">{"".join(shapes)}{"".join(legend)}</svg>'
    )


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _samples(user: "UserFigures") -> str:
    """Return the newest queries of a user, and what each way answered."""
    tables = "".join(_sample(sample) for sample in user.samples[-SHOWN_SAMPLES:])
    return f"<details><summary>{escape(user.name)}</summary>{tables}</details>"


def _sample(sample: "Sample") -> str:
    rows = [("prompt", escape(sample.prompt)), ("the user wrote", escape(sample.reference))]
    rows += [(escape(way), _words(answer)) for way, answer in sample.answers.items()]
    cells = "".join(f'<tr><th>{way}</th><td class="text">{text}</td></tr>' for way, text in rows)
    return f"<table>{cells}</table>"


def _words(answer: "Answer") -> str:
    """Return an answer with each token coloured by how much likelier the user's model finds it."""
    if not answer.tokens:
        return escape(answer.text)
    spans = []
    for text, reward in answer.tokens:
        strength = min(1.0, abs(reward) / _FULL) * 0.6
        colour = "34,136,51" if reward > 0 else "204,51,68"
        title = f"{reward:+.2f} nats"
        spans.append(
            f'<span style="background:rgba({colour},{strength:.2f})" title="{title}">'
            f"{escape(text)}</span>"
        )
    return "".join(spans)
