"""Whether the clock tells what others asked: times to the first token of prompts known and unknown.

Two users of one server, on the base alone, whose rows they would share. Again and again alice asks
a long prompt, until its first token:

    other    bob had just asked the same
    fresh    bob had just asked something else; nobody this
    own      alice had just asked the same

Their order is drawn anew each time. `auc` is the probability that a fresh prompt takes longer than
one of another kind (ties count half): 0.5 says that the two cannot be told apart. For `other` it
has to be within 3.3 standard errors of that, which chance alone leaves once in a thousand runs; for
`own` it has to be 0.9 at least, else the clock would be too coarse to show anything.

The last line is one JSON object; the exit status is 1 where either does not hold.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
from server_process import port_of, server_process
from worker import machine, print_report

WORDS = 150  # of a prompt
OWN = 0.9
ERRORS = 3.3  # standard errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="starter")
    parser.add_argument("--repeats", type=int, default=500, metavar="N")
    parser.set_defaults(device="cpu")
    options = parser.parse_args()
    state = machine("serve_timing", options) | {"model": options.model}
    with tempfile.TemporaryDirectory() as name:
        seconds = measure(Path(name), options.model, options.repeats)
    auc = {kind: share_longer(seconds["fresh"], seconds[kind]) for kind in ("other", "own")}
    # Of two samples of n from one distribution (Mann and Whitney): variance (2n + 1) / 12n².
    n = options.repeats
    bound = ERRORS * ((2 * n + 1) / (12 * n * n)) ** 0.5
    medians = {kind: round(statistics.median(each), 4) for kind, each in seconds.items()}
    print_report(state, seconds=medians, auc=auc, within=round(bound, 3))
    sys.exit(abs(auc["other"] - 0.5) > bound or auc["own"] < OWN)


def measure(folder: Path, model: str, repeats: int) -> dict[str, list[float]]:
    """Return the seconds to the first token, by kind."""
    words = [
        sys.executable, "-m", "cope_lc", "serve", "--model", model, "--served-name", "base",
        "--port", "0", "--store", str(folder / "adapters"), "--data", str(folder / "data"),
    ]  # fmt: skip
    log, chance = folder / "server.log", random.Random(0)
    seconds: dict[str, list[float]] = {"other": [], "fresh": [], "own": []}
    with server_process(words, log) as process:
        url = f"http://127.0.0.1:{port_of(log, lambda: process.poll() is None)}/v1/chat/completions"
        with httpx.Client(timeout=None) as client:
            for _ in range(repeats):
                for kind in chance.sample(list(seconds), 3):
                    known, text = prompt(chance), prompt(chance)
                    if kind != "fresh":
                        known = text
                    first_token(client, url, "alice" if kind == "own" else "bob", known)
                    seconds[kind].append(first_token(client, url, "alice", text))
    return seconds


def prompt(chance: random.Random) -> str:
    """Return a prompt that was never asked, as long as all others."""
    return " ".join(str(chance.randrange(100, 1000)) for _ in range(WORDS))


def first_token(client: httpx.Client, url: str, user: str, text: str) -> float:
    """Return the seconds until an answer has begun."""
    body = {
        "model": "base",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 1,
        "user": user,
    }
    started = time.perf_counter()
    client.post(url, json=body).raise_for_status()
    return time.perf_counter() - started


def share_longer(some: list[float], others: list[float]) -> float:
    """Return the share of pairs in which the first one's is the longer one; ties count half."""
    longer = sum((one > other) + (one == other) / 2 for one in some for other in others)
    return round(longer / (len(some) * len(others)), 3)


if __name__ == "__main__":
    main()
