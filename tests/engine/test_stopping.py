"""A stop is heard while many answers are on their way, and between two scoring forwards."""

import threading
import time
from collections.abc import Iterator

import pytest

from langchain_cope.engine import Engine, Request, Sampling, scoring
from langchain_cope.errors import Cancelled

LONG = Sampling(max_tokens=200, temperature=1.0, seed=1)


def idle(engine: Engine) -> bool:
    now = engine.statistics()
    return (now.rows, now.waiting) == (0, 0)


def test_a_stopped_generate_lets_go_of_all_its_requests(engine: Engine) -> None:
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    requests = [Request([5, 6, 7 + number], sampling=LONG) for number in range(200)]
    with pytest.raises(Cancelled, match="while the model was answering"):
        engine.generate(requests * 5, stop.is_set)
    deadline = time.monotonic() + 2
    while not idle(engine) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert idle(engine)


def test_a_generate_that_is_not_stopped_answers_as_always(engine: Engine) -> None:
    requests = [Request([5, 6, 7], sampling=LONG)]
    assert engine.generate(requests, lambda: False) == engine.generate(requests)


def test_a_stop_is_heard_between_two_scoring_forwards(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "MAX_TOKENS", 10)  # a forward for each sequence
    asked: list[bool] = []

    def after_two() -> bool:
        asked.append(len(asked) == 2)
        return asked[-1]

    with pytest.raises(Cancelled, match="while the model was scoring"):
        engine.score([([5, 6, 7], [8, 9, 10])] * 5, None, after_two)
    assert asked == [False, False, True]


def test_each_answer_comes_in_order_while_few_requests_wait(engine: Engine) -> None:
    taken = 0

    def requests() -> Iterator[Request]:
        nonlocal taken
        for number in range(3000):
            taken += 1
            yield Request([5, 6, 7 + number % 300], sampling=Sampling(max_tokens=2))

    expected = engine.generate(list(requests()))
    taken = 0
    for number, answer in enumerate(engine.generate_each(requests())):
        assert answer == expected[number]
        assert taken - number <= 16 * engine.options.max_rows
    assert number == 2999


def test_a_closed_iterator_of_answers_lets_go_of_its_requests(engine: Engine) -> None:
    requests = (Request([5, 6, 7 + number % 300], sampling=LONG) for number in range(1000))
    answers = engine.generate_each(requests)
    next(answers)
    assert not idle(engine)
    answers.close()
    deadline = time.monotonic() + 2
    while not idle(engine) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert idle(engine)
    with pytest.raises(Cancelled, match="while the model was answering"):
        next(engine.generate_each(iter([Request([5], sampling=LONG)]), lambda: True))
