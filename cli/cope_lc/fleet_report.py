"""The page that `cope-lc personalize-fleet --report` writes: one HTML file that runs no script."""

from collections.abc import Sequence
from html import escape

from cope_lc.fleet import summary
from cope_lc.page import page
from cope_lc.report_charts import table
from langchain_cope.fleet.discoveries import LEVEL
from langchain_cope.fleet.report import FleetReport
from langchain_cope.fleet.tasks import Outcome

_BINS = 20
_WIDTH, _HEIGHT, _BOTTOM = 600, 140, 24  # pixels of a histogram
_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
table { border-collapse: collapse } .wide { overflow-x: auto }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top;
  overflow-wrap: anywhere; font-weight: 400 }
thead th { opacity: .7 } .number { white-space: nowrap }
svg { max-width: 100%; height: auto; font-size: 12px } svg text { fill: currentColor }
svg rect { fill: #4477aa }
"""


def fleet_page(report: FleetReport) -> str:
    """Return the page: who was published, who was not and why, how gains and voices are spread."""
    rows = [_row(user, outcome) for user, outcome in report.users.items()]
    parts = [
        f"<h1>{len(report.users)} users personalized as one fleet</h1>",
        *(f"<p>{escape(line)}</p>" for line in summary(report)),
        f"<p>Of those published at most {LEVEL:.0%} gain nothing, in the long run.</p>",
        *_histogram("Gain, nats a token", report.gains),
        *_histogram("Voice: answers nearer to the user than the base's, as chrF", report.voices),
        "<h2>Each user</h2>",
        table(["user", "what became of it", "gain", "p", "voice", "why"], rows),
        *(
            f"<p>Not read: {escape(place)}: {escape(problem)}</p>"
            for place, problem in report.unreadable.items()
        ),
    ]
    return page("cope-lc personalize-fleet", _STYLE, parts)


def _row(user: str, outcome: Outcome) -> list[str]:
    verdict = outcome.verdict
    voice = "–" if outcome.voice is None else f"{outcome.voice:.2f}"
    figures = ["–", "–"]
    if verdict is not None:
        figures = [f"{verdict['mean_gain']:.3f}", f"{verdict['p_value']:.2g}"]
    return [user, outcome.state.value, *figures, voice, outcome.reason]


def _histogram(name: str, values: Sequence[float]) -> list[str]:
    """Return how many users have which value, as bars."""
    if not values:
        return []
    low, high = min(values), max(values)
    width = (high - low or 1) / _BINS
    heights = [0] * _BINS
    for value in values:
        heights[min(_BINS - 1, int((value - low) / width))] += 1
    space = (_HEIGHT - _BOTTOM) / max(heights)
    bars = "".join(
        f'<rect x="{index * _WIDTH / _BINS + 1:.1f}" y="{_HEIGHT - _BOTTOM - times * space:.1f}" '
        f'width="{_WIDTH / _BINS - 2:.1f}" height="{times * space:.1f}">'
        f"<title>{low + index * width:.3f} and above: {times}</title></rect>"
        for index, times in enumerate(heights)
    )
    ends = (
        f'<text x="0" y="{_HEIGHT - 6}">{low:.3f}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 6}" text-anchor="end">{high:.3f}</text>'
    )
    return [
        f"<h2>{escape(name)}</h2>",
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(name)}, '
        f'{len(values)} users">{bars}{ends}</svg>',
    ]
