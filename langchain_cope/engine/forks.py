"""What a fork leaves of a loaded base: nothing that could answer.

A forked child has neither the engine's thread nor those of the products, and a lock that another
thread held stays locked for good: a call would hang. So every way in asks `check` first, before it
touches a lock.
"""

import os

from langchain_cope.errors import EngineClosed

_loads_bases = False  # in this process, or before the fork in the one that it came from
_is_child = False


def check() -> None:
    """Raise EngineClosed in a process that was forked from one that had begun to load a base."""
    if _is_child:
        raise EngineClosed(
            "this process was forked from one that had a base model in memory, and neither its "
            "threads nor its locks live on in a child: load after forking (gunicorn: without "
            "--preload, or first in post_fork), or start processes by multiprocessing's 'spawn'"
        )


def is_child() -> bool:
    """Tell whether `check` would raise."""
    return _is_child


def note_load() -> None:
    """Note that this process loads a base; raise as `check` does."""
    global _loads_bases
    check()
    _loads_bases = True


def _after_fork() -> None:
    global _is_child
    _is_child = _loads_bases


os.register_at_fork(after_in_child=_after_fork)
