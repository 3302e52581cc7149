"""A training has the processors where answers leave them, and no other thread notices."""

import os
import sys
import threading
from collections.abc import Callable

import pytest
import torch

from langchain_cope.serving.admission import Admission
from langchain_cope.serving.giving_way import NICE, GivesWay, lower_priority


def in_a_thread(work: Callable[[], None]) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failed, failed


@pytest.mark.skipif(sys.platform != "linux", reason="Linux keeps a priority for each thread")
def test_the_training_threads_priority_alone_is_lowered() -> None:
    def work() -> None:
        lower_priority()
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == NICE

    before = os.getpriority(os.PRIO_PROCESS, 0)
    in_a_thread(work)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_products_have_one_thread_while_people_are_answered() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []

    def work() -> None:
        gives_way = GivesWay()
        for is_busy in (False, True, True, False):
            gives_way.now(is_busy)
            seen.append(torch.get_num_threads())
            in_a_thread(lambda: seen.append(torch.get_num_threads()))

    try:
        in_a_thread(work)
        assert seen == [2, 2, 1, 2, 1, 2, 2, 2]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


async def test_a_server_is_busy_for_a_moment_after_an_answer() -> None:
    now = [0.0]
    admission = Admission(rows=2, max_waiting=1, clock=lambda: now[0])
    assert not admission.is_busy()
    async with admission.place("key", 1):
        assert admission.is_busy()
    assert admission.is_busy()
    now[0] = 6.0
    assert not admission.is_busy()
