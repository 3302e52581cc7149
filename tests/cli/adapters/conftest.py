import os
import pty
from collections.abc import Callable

import pytest

from adapter_store import AdapterStore
from adapter_store.conformance import make_adapter

BASE = {"weights": "w", "model": "starter"}


@pytest.fixture
def put() -> Callable[..., str]:
    """Publishes a small adapter, which no model can load, and returns its version's id."""

    def published(store: AdapterStore, user: str = "alice", seed: int = 1, nll: float = 4.6) -> str:
        metrics = {"base": {"nll": 4.8}, "dpo": {"nll": nll}}
        return store.publish(user, make_adapter(seed), base=BASE, metrics=metrics).version

    return published


@pytest.fixture
def on_terminal(process: Callable) -> Callable[..., tuple[int, str]]:
    """Runs a command that asks on a terminal; returns its exit code and standard error."""

    def run(*words: object, answer: str) -> tuple[int, str]:
        ours, theirs = pty.openpty()
        command = process(*words, stdin=theirs)
        os.write(ours, answer.encode())
        _, said = command.communicate(timeout=60)
        os.close(ours)
        os.close(theirs)
        return command.returncode, said

    return run
