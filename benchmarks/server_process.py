"""A server in a process of its own, for the benchmarks that ask one."""

import contextlib
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

READY = 180.0  # seconds until a server that does not answer is given up


@contextlib.contextmanager
def server_process(words: list[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a server until the block ends; print the end of its log where that fails."""
    here = Path(__file__).parents[1]
    paths = os.pathsep.join([str(here), str(here / "cli"), os.environ.get("PYTHONPATH", "")])
    with log.open("wb") as output:
        process = subprocess.Popen(
            words, stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": paths}
        )
    try:
        yield process
    except Exception:
        print(log.read_text(encoding="utf-8", errors="replace")[-3000:], file=sys.stderr)
        raise
    finally:
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()


def port_of(log: Path, lives: Callable[[], bool]) -> int:
    """Return the port that a server says it is ready at, once it does; `lives` tells if it can."""
    deadline = time.monotonic() + READY
    while time.monotonic() < deadline and lives():
        for line in log.read_text(encoding="utf-8").splitlines():
            if found := re.search(r"ready at (?:http://[\d.]+:)?(\d+)", line):
                return int(found[1])
        time.sleep(0.2)
    raise RuntimeError("the server did not start")


def wait_for(url: str) -> None:
    """Wait until something answers there."""
    deadline = time.monotonic() + READY
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=2).close()
            return
        time.sleep(0.5)
    raise RuntimeError(f"{url} does not answer")
