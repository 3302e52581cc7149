"""The page that `cope-lc evaluate --report` writes: one HTML file that needs nothing else.

Whatever people or models wrote is escaped, and the page runs no script.
"""

from html import escape
from typing import TYPE_CHECKING

from cope_lc.metrics_table import COMPARED, MEASURES, matrix_line, p_text
from cope_lc.page import page
from cope_lc.report_charts import gains, grid_charts, table, user_chart

if TYPE_CHECKING:
    from langchain_cope.evaluation.measures import Report, Sample, UserFigures
    from langchain_cope.evaluation.over_users import Difference, Estimate
    from langchain_cope.evaluation.user_job import Answer

SHOWN_SAMPLES = 3  # a user
_CHARTED = ("style", "voice", "rougeL")
_FULL = 2.0  # nats by which a word is likelier under the user's model, for its full colour
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1b1b; --quiet: #595959; --line: #d0d0d0;
  --likely: 34,136,51; --unlikely: 204,51,68; --heat: 68,119,170 }
@media (prefers-color-scheme: dark) { :root { --paper: #161616; --ink: #ececec; --quiet: #a6a6a6;
  --line: #444; --likely: 80,190,100; --unlikely: 240,100,110; --heat: 110,165,220 } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.2rem; margin-top: 2.5rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem }
:focus-visible { outline: 2px solid rgb(var(--heat)); outline-offset: 2px }
table { border-collapse: collapse; margin: .75rem 0 }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; font-weight: 400 }
thead th { border-bottom: 1px solid var(--line); color: var(--quiet); white-space: nowrap }
tbody th { min-width: 6.5rem; max-width: 10rem; overflow-wrap: anywhere }
.number small { display: block; color: var(--quiet); font-size: .85em }
.wide tbody th, .wide thead th:first-child { position: sticky; left: 0; background: var(--paper) }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.wide { overflow-x: auto } .note, figcaption, summary { color: var(--quiet) }
.text { white-space: pre-wrap; overflow-wrap: anywhere } summary { cursor: pointer }
summary, .name { overflow-wrap: anywhere }
.figures { margin-bottom: 1.5rem; display: flex; flex-wrap: wrap; gap: 1.5rem 2.5rem }
figure { margin: 0; max-width: 100%; min-width: 0 }
.legend { list-style: none; padding: 0; margin: .25rem 0; display: flex; flex-wrap: wrap;
  gap: .1rem 1rem }
.legend i { display: inline-block; width: .7em; height: .7em; border-radius: 50%;
  margin-right: .4em }
.dots { display: grid; grid-template-columns: minmax(0, 9rem) 1fr; gap: 0 1rem;
  align-items: center; max-width: 50rem; padding-right: 2rem }
.bars { display: grid; grid-template-columns: minmax(0, 9rem) 9rem auto; gap: 0 .75rem;
  align-items: center; padding-top: .4rem }
.name { line-height: 1.2; padding: .2rem 0; font-size: .9em }
.track { position: relative; display: block; height: 1.5rem }
.dots .track { border-bottom: 1px solid var(--line);
  height: calc(1.5rem + var(--lanes, 0) * .5rem) }
.track.heads { border: 0; color: var(--quiet); font-size: .85em }
.track > * { position: absolute }
.track b { font-weight: 400; transform: translateX(-50%); white-space: nowrap }
.track u { top: 0; bottom: 0; border-left: 1px dashed var(--quiet) }
.track i { top: calc(.4rem + var(--lane, 0) * .5rem); width: .7rem; height: .7rem;
  margin-left: -.35rem; border-radius: 50%; opacity: .85 }
.bar i { height: .7rem; margin: 0; border-radius: 0 }
.up { background: rgb(var(--likely)) } .down { background: rgb(var(--unlikely)) }
.heat { text-align: right; padding: .4rem .7rem; font-variant-numeric: tabular-nums;
  vertical-align: middle;
  background: color-mix(in srgb, rgb(var(--heat)) calc(var(--share) * .6), var(--paper)) }
.map th { min-width: 0; padding: .4rem .7rem .4rem 0; color: var(--quiet); white-space: nowrap }
.map tr:first-child th { text-align: right; padding-right: .7rem }
@media (max-width: 30rem) { .map td.heat, .map tr th { padding: .4rem .3rem } }
svg { display: block; max-width: 100%; height: auto; font-size: 12px } svg text { fill: var(--ink) }
.axis, .mark { fill: none; stroke: var(--line) } .mark { stroke-dasharray: 4 3;
  stroke: var(--quiet) }
.line { fill: none; stroke-width: 2 }
.s0 { fill: #4477aa; background: #4477aa; stroke: #4477aa }
.s1 { fill: #cc6622; background: #cc6622; stroke: #cc6622 }
path.s0, path.s1 { fill: none }
.c0 { background: #888 } .c1 { background: #4477aa } .c2 { background: #66ccee }
.c3 { background: #228833 } .c4 { background: #ccbb44 } .c5 { background: #ee6677 }
.c6 { background: #aa3377 } .c7 { background: #cc6622 }
i.ring { background-image: radial-gradient(circle, var(--paper) 40%, transparent 45%) }
.likely { background: rgba(var(--likely), var(--much)) }
.unlikely { background: rgba(var(--unlikely), var(--much)); text-decoration: underline dotted }
.sample { border-top: 1px solid var(--line); padding: .5rem 0 1rem }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr));
  gap: .75rem 1.5rem; margin: .5rem 0 } .answers dt { color: var(--quiet); font-size: .9em }
.answers dd { margin: 0 }
"""


def html_report(report: "Report", model: str, task_adapter: str | None = None) -> str:
    """Return the page: figures of all ways, each user's gain, and samples side by side."""
    on = f"{model} with the task adapter {task_adapter}" if task_adapter else model
    parts = [
        f"<h1>{len(report.ways)} ways of answering, {len(report.users)} users</h1>",
        f"<p>On {escape(on)}. Means over users; in brackets 95 % intervals over users.</p>",
        _means(report),
        *(_differences(name, by_way) for name, by_way in report.differences.items()),
        gains(report),
        "<h2>Each user</h2>",
        *(user_chart(report, measure) for measure in _CHARTED),
        grid_charts(report.grid),
        *_matrix(report),
        "<h2>Samples</h2>",
        "<p>Green words are likelier under the user's model than under the base, red and dotted "
        "ones less likely; where a way computes both.</p>",
        *(_samples(user) for user in report.users),
        *(f'<p class="note">{escape(note)}</p>' for note in _notes(report)),
    ]
    return page("cope-lc evaluate", _STYLE, parts)


def _means(report: "Report") -> str:
    had = {measure for figures in report.means.values() for measure in figures}
    measures = [name for name in MEASURES if name in had]
    rows = [
        [way, *(_estimate(figures.get(name)) for name in measures)]
        for way, figures in report.means.items()
    ]
    return table(["way", *(MEASURES[name] for name in measures)], rows)


def _differences(reference: str, by_way: "dict[str, dict[str, Difference]]") -> str:
    had = {measure for figures in by_way.values() for measure in figures}
    measures = [name for name in COMPARED if name in had]
    rows = []
    for way, figures in by_way.items():
        cells = []
        for name in measures:
            value = figures.get(name)
            more = f"\n{p_text(value.p, 3)}, above for {value.num_above}" if value else ""
            cells.append(_estimate(value, sign=True) + more)
        rows.append([way, *cells])
    heads = ["way", *(f"Δ {MEASURES[name]}" for name in measures)]
    return f"<h2>Against {escape(reference)}, user by user</h2>{table(heads, rows)}"


def _estimate(value: "Estimate | None", *, sign: bool = False) -> str:
    """Return a figure, and its interval on a line of its own."""
    if value is None:
        return "–"
    form = "+.3f" if sign else ".3f"
    interval = ""
    if value.interval is not None:
        low, high = value.interval
        interval = f"\n[{low:{form}}, {high:{form}}]"
    return f"{value.value:{form}}{interval}"


def _matrix(report: "Report") -> list[str]:
    if report.matrix is None:
        return []
    return ["<h2>Adapters</h2>", f"<p>On held-out texts {escape(matrix_line(report.matrix))}.</p>"]


def _notes(report: "Report") -> list[str]:
    """Return the notes of the whole, and why a voice has no figures."""
    from langchain_cope.evaluation.voice import Silent

    silent = [
        f"no {name} score: {scale.reason}"
        for name, scale in report.voice.items()
        if isinstance(scale, Silent)
    ]
    return [*silent, *report.notes]


def _samples(user: "UserFigures") -> str:
    """Return the newest queries of a user, and what each way answered."""
    shown = "".join(_sample(sample) for sample in user.samples[-SHOWN_SAMPLES:])
    return f"<details><summary>{escape(user.name)}</summary>{shown}</details>"


def _sample(sample: "Sample") -> str:
    texts = [("the user wrote", escape(sample.reference))]
    texts += [(escape(way), _words(answer)) for way, answer in sample.answers.items()]
    cells = "".join(f'<div><dt>{way}</dt><dd class="text">{text}</dd></div>' for way, text in texts)
    return (
        f'<div class="sample"><p class="note text">{escape(sample.prompt)}</p>'
        f'<dl class="answers">{cells}</dl></div>'
    )


def _words(answer: "Answer") -> str:
    """Return an answer with each token coloured by how much likelier the user's model finds it."""
    if not answer.tokens:
        return escape(answer.text)
    spans = []
    for text, reward in answer.tokens:
        strength = min(1.0, abs(reward) / _FULL) * 0.5
        kind = "likely" if reward > 0 else "unlikely"
        spans.append(
            f'<span class="{kind}" style="--much:{strength:.2f}" title="{reward:+.2f} nats">'
            f"{escape(text)}</span>"
        )
    return "".join(spans)
