"""Run by `test_forks.py`: a process that forks, and what its children get to hear.

Prints one JSON object: by case, the answer or the error of a call in a forked child, and its
seconds; `hung` where the child had to be killed.
"""

import asyncio
import atexit
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from langchain_cope import ChatCoPe, PersonalizeUser, forget
from langchain_cope.engine.engine import _engines_lock  # as a preloading server has imported it

QUESTION = "What is rain?"
KILLED_AFTER = 20.0  # seconds; beyond any answer's, however busy the machine is
MODEL, OTHER, STORE = sys.argv[1:]


def in_child(call: Callable[[], Any]) -> dict[str, Any]:
    """Return what `call` gives or raises in a forked child."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        started = time.monotonic()
        try:
            outcome = {"answer": str(call())}
        except BaseException as error:
            outcome = {"error": f"{type(error).__name__}: {error}"}
        outcome["seconds"] = time.monotonic() - started
        os.write(write, json.dumps(outcome).encode())
        os.close(write)
        atexit._run_exitfuncs()  # these must not hang either
        os._exit(0)  # the rest of an interpreter's end takes a second
    os.close(write)
    arrived, _, _ = select.select([read], [], [], KILLED_AFTER)
    outcome = json.loads(os.read(read, 100_000) or b"{}") if arrived else {"hung": "call"}
    os.close(read)
    until = time.monotonic() + KILLED_AFTER / 2
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            outcome["hung"] = outcome.get("hung", "exit")
            break
        time.sleep(0.01)
    return outcome


async def astreamed(chat: ChatCoPe) -> list[Any]:
    return [chunk async for chunk in chat.astream(QUESTION)]


def calls(chat: ChatCoPe) -> dict[str, Callable[[], Any]]:
    """Every way in, as a child may take it."""
    rows = [{"prompt": f"p {i}", "completion": f"c {i}"} for i in range(6)]
    personalize = PersonalizeUser(model=MODEL, store=STORE)
    return {
        "invoke": partial(chat.invoke, QUESTION),
        "invoke with a timeout": partial(chat.invoke, QUESTION, timeout=1),
        "ainvoke": lambda: asyncio.run(chat.ainvoke(QUESTION)),
        "stream": lambda: list(chat.stream(QUESTION)),
        "astream": lambda: asyncio.run(astreamed(chat)),
        "batch": partial(chat.batch, [QUESTION, QUESTION]),
        "count": partial(chat.get_num_tokens, QUESTION),
        "another base": ChatCoPe(model=OTHER, max_tokens=2).load,
        "a new chat": ChatCoPe(model=MODEL, max_tokens=2).load,
        "train": lambda: personalize.invoke({"user_id": "alice", "history": rows}),
        "close": chat.close,
    }


def main() -> None:
    chat = ChatCoPe(model=MODEL, store=STORE, max_tokens=6)
    results = {"before: invoke": in_child(partial(chat.invoke, QUESTION))}
    expected = chat.invoke(QUESTION).content
    for name, call in calls(chat).items():
        results[f"after a chat: {name}"] = in_child(call)

    engine = chat._engine()
    with engine._wake:  # as another thread may hold it in the moment of the fork
        for name in ("invoke", "batch", "close"):
            results[f"lock held: {name}"] = in_child(calls(chat)[name])

    with _engines_lock:
        results["lock held: forget"] = in_child(lambda: forget("bob", store=STORE).failed)

    chunks = chat.stream(QUESTION, max_tokens=200)
    next(chunks)
    results["within a stream: the rest"] = in_child(lambda: list(chunks))
    results["within a stream: invoke"] = in_child(partial(chat.invoke, QUESTION))
    chunks.close()

    loading = threading.Thread(target=ChatCoPe(model=OTHER).load)
    loading.start()
    results["while another thread loads: invoke"] = in_child(partial(chat.invoke, QUESTION))
    loading.join()
    results["parent"] = {"answer": chat.invoke(QUESTION).content, "expected": expected}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
