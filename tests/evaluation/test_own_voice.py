"""One user's voice, on texts made by rule: a manner of one's own, whatever each text is about."""

import pytest
from evaluation.test_voice import write

from langchain_cope.evaluation.own_voice import OwnVoice, gain, jackknife_error, own_voice
from langchain_cope.evaluation.voice import Silent


def texts(topics: range, manner: int, *, seed: int = 0, strength: float = 0.6) -> list[str]:
    """Return a text about each of the topics."""
    return [write(1, topic, manner, seed=seed, strength=strength)[0] for topic in topics]


PROMPTS = range(40, 60)
HISTORY = texts(range(40), manner=0)
OWN = texts(PROMPTS, manner=0)
OF_BASE = texts(PROMPTS, manner=1)


def scale_of(own: list[str] = OWN, of_base: list[str] = OF_BASE) -> OwnVoice:
    scale = own_voice(HISTORY, own, of_base)
    assert isinstance(scale, OwnVoice), scale
    return scale


def test_the_base_is_at_nought_and_the_user_at_one() -> None:
    scale = scale_of()
    assert scale.aim(OF_BASE) == pytest.approx(0)
    assert scale.aim(OWN) == pytest.approx(1)
    assert 0 < scale.aim([*OWN[:10], *OF_BASE[:10]]) < 1


def test_the_manner_counts_and_not_the_topic() -> None:
    scale = scale_of()
    manner = scale.aim(texts(range(60, 80), manner=0))
    topic = scale.aim(texts(PROMPTS, manner=2))
    assert manner > topic
    assert manner > 0.5


def test_caricature_is_no_gain() -> None:
    louder = texts(PROMPTS, manner=0, strength=1.0)
    scale = scale_of()
    assert scale.aim(louder) < scale.aim(texts(PROMPTS, manner=0, seed=1)) < 1


def test_a_gain_comes_with_its_error() -> None:
    value, error = gain(scale_of(), texts(PROMPTS, manner=0, seed=1), OF_BASE)
    assert value > error > 0
    assert gain(scale_of(), OWN, OWN) == (0, 0)


def test_it_is_silent_where_the_base_writes_as_the_user_does() -> None:
    alike = own_voice(HISTORY, OWN, texts(PROMPTS, manner=0, seed=2))
    assert isinstance(alike, Silent)
    assert "cannot be told" in alike.reason
    short = own_voice(HISTORY[:9], OWN, OF_BASE)
    assert isinstance(short, Silent)
    assert "9 texts" in short.reason
    unspaced = own_voice(["今日は雨が降っています。"] * 20, OWN, OF_BASE)
    assert isinstance(unspaced, Silent)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = [1.0, 2.0, 4.0, 7.0]
    leaving_out = [(sum(values) - value) / 3 for value in values]
    assert jackknife_error(leaving_out) == pytest.approx(1.3228756555)
