"""Whether a store is linearizable: whether an order of concurrent calls explains every answer.

The model of a user is a few lines: which versions exist, which one is active, and the stack of
earlier active ones. The checker is the well-known search (Wing and Gong, with the memory of Lowe):
of the calls that are left, one that began before any other had ended may come next, if the model
can give its answer. `store_torture.py linear` runs it.
"""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from adapter_store import AdapterNotFoundError, AdapterStore, PublishConflictError, UserErasedError
from adapter_store.conformance import make_adapter

BASE = {"weights": "w"}
NO_GRACE = timedelta(0)
THREADS = 4
UNTOLD = "untold"
_WORDS = ("none", "refused", UNTOLD)
CALLS = 6  # of each thread in a round: more make the search long, not the test better


@dataclass(frozen=True)
class Call:
    """One call as its caller saw it: what was asked, what came of it, from when until when."""

    kind: str
    argument: str | None
    result: str | None
    start: float
    end: float


State = tuple[tuple[str, ...], str | None, tuple[str, ...]]
"""What the model knows of a user: versions, the active one, the stack of earlier active ones."""


def steps(state: State, call: Call, known: frozenset[str]) -> list[State]:
    """Return the states that a call may lead to, none where its result is impossible here.

    A publish that was refused may have been seen for a moment, before the erasure that it ran into:
    it may have put a version of a name that was never returned, which stands as UNTOLD.
    """
    if call.kind == "publish" and call.result == "refused":
        return [state, *steps(state, replace(call, result=UNTOLD), known)]
    is_told = call.result is None or call.result in known or call.result in _WORDS
    following = step(state, call if is_told else replace(call, result=UNTOLD))
    return [] if following is None else [following]


def step(state: State, call: Call) -> State | None:
    """Return the state after a call of a certain effect, None where its result is impossible."""
    versions, active, back = state
    match call.kind:
        case "resolve":
            return state if call.result == active else None
        case "publish":
            assert call.result is not None
            now = (*versions, call.result)
            return now, call.result, _stack(_pushed(back, active), now, call.result)
        case "activate":
            if call.result == "none":
                return state if call.argument not in versions else None
            if call.argument not in versions:
                return None
            if active == call.argument:
                return state
            return versions, call.argument, _stack(_pushed(back, active), versions, call.argument)
        case "rollback":
            if call.result == "none":
                return state if not back else None
            return (versions, back[-1], back[:-1]) if back and back[-1] == call.result else None
        case "erase":
            return (), None, ()
    raise ValueError(call.kind)


def _pushed(back: tuple[str, ...], active: str | None) -> tuple[str, ...]:
    return back if active is None else (*back, active)


def _stack(back: tuple[str, ...], versions: tuple[str, ...], active: str | None) -> tuple[str, ...]:
    stack: list[str] = []
    for version in back:
        if not stack or stack[-1] != version:
            stack.append(version)
    if stack and stack[-1] == active:
        stack.pop()
    return tuple(stack[-max(1, len(versions)) :])


def explains(calls: list[Call]) -> bool:
    """Return whether an order of calls, each between its start and end, explains all results."""
    order = sorted(calls, key=lambda call: call.start)
    known = frozenset(str(call.result) for call in calls if call.kind == "publish")
    refused = [call for call in calls if call.result == "refused"]
    for call in calls:
        untold = call.kind == "resolve" and call.result is not None and call.result not in known
        # Seen for a moment, which ended before its publisher was told.
        if untold and not any(one.start <= call.end and call.start <= one.end for one in refused):
            return False
    seen: set[tuple[frozenset[int], State]] = set()
    stack: list[tuple[frozenset[int], State]] = [(frozenset(range(len(order))), ((), None, ()))]
    while stack:
        left, state = stack.pop()
        if not left:
            return True
        if (left, state) in seen:
            continue
        seen.add((left, state))
        soonest_end = min(order[index].end for index in left)
        for index in left:
            if order[index].start <= soonest_end:  # no other had finished before it began
                for following in steps(state, order[index], known):
                    stack.append((left - {index}, following))
    return False


def act(store: AdapterStore, kind: str, argument: str | None, seed: int) -> Call:
    """Make one call on the user and note it."""
    start = time.perf_counter()
    result: str | None
    try:
        if kind == "resolve":
            result = store.resolve("alice").version
        elif kind == "publish":
            result = store.publish("alice", make_adapter(seed, 64), base=BASE).version
        elif kind == "activate":
            result = store.activate("alice", argument or "none").version
        elif kind == "rollback":
            result = store.rollback("alice").version
        else:
            result = store.erase_user("alice")
    # Nothing was published: erased, or collected again and again.
    except (UserErasedError, PublishConflictError):
        result = "refused"
    except AdapterNotFoundError:
        result = None if kind == "resolve" else "none"
    return Call(kind, argument, result, start, time.perf_counter())


def linear(open_store: Callable[[], AdapterStore], rounds: int, seed: int = 0) -> dict[str, Any]:
    """Make random calls from threads, and raise AssertionError where no order explains them.

    Each thread has a store object of its own.
    """
    kinds: dict[str, int] = {}
    for number in range(rounds):
        store = open_store()
        history = one_round(store, f"{seed} {number}")
        assert explains(history), (
            f"round {number}: no order explains {sorted(history, key=lambda call: call.start)}"
        )
        for call in history:
            kinds[call.kind] = kinds.get(call.kind, 0) + 1
        for version in store.versions("alice"):
            store.fetch(version)
    return {
        "rounds": rounds,
        "threads": THREADS,
        "calls": sum(kinds.values()),
        "kinds": kinds,
        "violations": 0,
    }


def one_round(store: AdapterStore, seed: str) -> list[Call]:
    """Let threads work on one user while another collects garbage; return all their calls."""
    known: list[str] = []
    barrier = threading.Barrier(THREADS + 1)
    stop = threading.Event()

    def work(thread: int) -> list[Call]:
        chance = random.Random(f"{seed} {thread}")
        mine = again(store)
        barrier.wait()
        calls = []
        for number in range(CALLS):
            kind = chance.choice(
                ["resolve", "resolve", "publish", "publish", "activate", "rollback", "erase"]
            )
            if kind == "activate" and not known:
                kind = "publish"
            argument = chance.choice(known) if kind == "activate" else None
            time.sleep(chance.uniform(0, 0.002))  # so that the threads' calls meet
            calls.append(act(mine, kind, argument, 100 * thread + number))
            if kind == "publish" and calls[-1].result != "refused":
                known.append(str(calls[-1].result))
        return calls

    def collect() -> None:
        mine = again(store)
        barrier.wait()
        while not stop.is_set():
            mine.gc(grace=NO_GRACE, entry_age=NO_GRACE)
            time.sleep(0.005)

    with ThreadPoolExecutor(THREADS + 1) as pool:
        collector = pool.submit(collect)
        histories = [pool.submit(work, thread) for thread in range(THREADS)]
        try:
            calls = [call for future in histories for call in future.result()]
        finally:
            stop.set()
        collector.result()
    return calls


def again(store: AdapterStore) -> AdapterStore:
    """Return another store object on the same storage, as another process has it."""
    opener = store._opener
    return AdapterStore(opener.backend, keys=opener.keys, limits=opener.limits)
