"""Whether a store is linearizable, that is, whether an order of concurrent calls explains every answer.

The model of a user is a few lines: which versions there are, which one is active, and the way back. The checker is the
well-known search (Wing and Gong, with the memory of Lowe): of the calls that are left, one that began before any other
had ended may come next, if the model can give its answer. `store_torture.py linear` runs it.
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
    """One call as its caller saw it: what was asked, what came of it, and between which moments."""

    kind: str
    argument: str | None
    result: str | None
    start: float
    end: float


State = tuple[tuple[str, ...], str | None, tuple[str, ...]]
"""What the model knows of a user: versions, the active one, the way back."""


def steps(state: State, call: Call, known: frozenset[str]) -> list[State]:
    """The states that a call may lead to; none where its result could not have come from this state.

    A publish that was refused may have been seen for a moment, before the erasure that it ran into: it may have put a
    version whose name nobody was told, which stands as UNTOLD.
    """
    if call.kind == "publish" and call.result == "refused":
        return [state, *steps(state, replace(call, result=UNTOLD), known)]
    result = (
        call.result
        if call.result is None or call.result in known or call.result in _WORDS
        else UNTOLD
    )
    following = step(state, replace(call, result=result))
    return [] if following is None else [following]


def step(state: State, call: Call) -> State | None:
    """The state after a call whose effect is certain, None where its result could not have come from this state."""
    versions, active, back = state
    match call.kind:
        case "resolve":
            return state if call.result == active else None
        case "publish":
            assert call.result is not None
            now = (*versions, call.result)
            return (
                now,
                call.result,
                _way(back if active is None else (*back, active), now, call.result),
            )
        case "activate":
            if call.result == "none":
                return state if call.argument not in versions else None
            if call.argument not in versions:
                return None
            if active == call.argument:
                return state
            return (
                versions,
                call.argument,
                _way(back if active is None else (*back, active), versions, call.argument),
            )
        case "rollback":
            if call.result == "none":
                return state if not back else None
            return (versions, back[-1], back[:-1]) if back and back[-1] == call.result else None
        case "erase":
            return (), None, ()
    raise ValueError(call.kind)


def _way(back: tuple[str, ...], versions: tuple[str, ...], active: str | None) -> tuple[str, ...]:
    way: list[str] = []
    for version in back:
        if not way or way[-1] != version:
            way.append(version)
    if way and way[-1] == active:
        way.pop()
    return tuple(way[-max(1, len(versions)) :])


def explains(calls: list[Call]) -> bool:
    """Whether some order of the calls, each between its start and its end, explains every result."""
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
            if order[index].start <= soonest_end:  # nobody else had finished before it began
                stack += [
                    (left - {index}, following) for following in steps(state, order[index], known)
                ]
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
    except (
        UserErasedError,
        PublishConflictError,
    ):  # nothing was published: erased, or collected again and again
        result = "refused"
    except AdapterNotFoundError:
        result = None if kind == "resolve" else "none"
    return Call(kind, argument, result, start, time.perf_counter())


def linear(open_store: Callable[[], AdapterStore], rounds: int, seed: int = 0) -> dict[str, Any]:
    """Random calls from threads, each with a store object of its own, and a look whether an order explains them."""
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
    """Let threads work on one user while another collects garbage without grace; return all their calls."""
    known: list[str] = []
    barrier = threading.Barrier(THREADS + 1)
    stop = threading.Event()

    def work(thread: int) -> list[Call]:
        chance = random.Random(f"{seed} {thread}")
        mine = again(store)
        barrier.wait()
        found = []
        for turn in range(CALLS):
            kind = chance.choice(
                ["resolve", "resolve", "publish", "publish", "activate", "rollback", "erase"]
            )
            if kind == "activate" and not known:
                kind = "publish"
            argument = chance.choice(known) if kind == "activate" else None
            time.sleep(chance.uniform(0, 0.002))  # so that the threads' calls meet
            found.append(act(mine, kind, argument, 100 * thread + turn))
            if kind == "publish" and found[-1].result != "refused":
                known.append(str(found[-1].result))
        return found

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
