"""What the charts of a report show of figures that are alike, and which of them is best."""

import re

from cope_lc.metrics_table import p_text
from cope_lc.report_charts import grid_charts, user_chart

from langchain_cope.evaluation.grid import Cell
from langchain_cope.evaluation.measures import Report, UserFigures
from langchain_cope.evaluation.over_users import Estimate
from langchain_cope.evaluation.ways import ALL_WAYS


def report_of(style: dict[str, float]) -> Report:
    ways = [way for way in ALL_WAYS if way.name in style]
    metrics = {way: {"style": value} for way, value in style.items()}
    user = UserFigures("alice", metrics, {}, 20, 5, 100, [], [])
    return Report(ways, [user], {}, {}, {}, [], [], None)


def test_equal_figures_of_many_ways_are_told_apart() -> None:
    names = [way.name for way in ALL_WAYS][:10]
    chart = user_chart(report_of(dict.fromkeys(names, 0.5)), "style")
    dots = re.findall(r'<i class="(c\d(?: ring)?)" style="left:[\d.]+%;--lane:(\d)"', chart)
    assert len(dots) == 10
    assert len({colour for colour, _ in dots}) == 10
    assert len({lane for _, lane in dots}) == 10


def test_figures_far_apart_share_a_lane() -> None:
    chart = user_chart(report_of({"base": 0.1, "sft": 0.5, "cope": 0.9}), "style")
    assert re.findall(r"--lane:(\d)", chart) == ["0", "0", "0"]


def test_a_style_beyond_the_users_own_is_not_the_darkest() -> None:
    cells = [
        Cell(alpha, 0.1, {"style": Estimate(style, None, 2), "rougeL": Estimate(style, None, 2)})
        for alpha, style in ((0.1, 0.6), (0.3, 1.1), (0.5, 1.7))
    ]
    shares = re.findall(r'--share:(\d+)%">([\d.]+)<', grid_charts(cells))
    assert shares[:3] == [("0", "0.600"), ("45", "1.100"), ("100", "1.700")]  # ROUGE-L
    assert shares[3:] == [("50", "0.600"), ("100", "1.100"), ("0", "1.700")]


def test_no_p_is_shown_as_zero() -> None:
    assert p_text(0.0004, 3) == "p < 0.001"
    assert p_text(0.0006, 3) == "p 0.001"
    assert p_text(0.004, 2) == "p < 0.01"
    assert p_text(0.5, 2) == "p 0.50"
