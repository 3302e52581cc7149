"""What a fleet survives: every user is published exactly once, or named with a reason.

    python benchmarks/fleet_faults.py [--kills 100] [--seed 0] [--only kills,memory,disk,store,base]

Real `cope-lc personalize-fleet` commands on `starter`, two workers, small histories made here:

kills   a worker, or the driver (with its workers told by nobody), is killed by signal 9 at a random
        moment; a killed driver's command is given again. Fleets follow each other until so many
        kills have hit.
memory  a worker may allocate nothing more for a few seconds.
disk    the disk of store and ledger (a small tmpfs, which needs root) is full for a while.
store   an S3 server (moto's) answers nothing for 30 s.
base    the base's folder is gone while workers are killed; then it is there again.

After each fleet the store is verified, and holds for every user one version and no candidate, or
the report names the user. Half-published users, users published twice, unnamed ones and damage are
counted; the last line is one JSON object with those counts, which are all 0 where all is well.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from adapter_store import AdapterStore
from langchain_cope.engine.base.bundled import STARTER

COMMAND = [sys.executable, "-m", "cope_lc"]
NUM_USERS = 8
MOST_SECONDS = 18.0  # between two kills; a user takes about five
MOST_RUNS = 60  # of one fleet's command
NAMED = ("failed", "erased", "superseded", "unsure", "refused", "unfit")


class Fleet:
    """One fleet's folders, and its command, given as often as need be."""

    def __init__(self, folder: Path, store: str | None = None, model: str = "starter") -> None:
        self.folder = folder
        self.store = store or str(folder / "adapters")
        self.model = model
        self.runs = 0
        self.codes: Counter[int] = Counter()
        self.last_words = ""
        (folder / "histories").mkdir(parents=True)
        for number in range(NUM_USERS):
            user = f"user{number}"
            rows = [
                {"prompt": f"Story {n}?", "completion": f"The fox says {user}, dog {n}"}
                for n in range(12)
            ]
            file = folder / "histories" / f"{user}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(self) -> subprocess.Popen[str]:
        """Give the command."""
        self.runs += 1
        words = ["personalize-fleet", self.folder / "histories", "--store", self.store]
        words += ["--work", self.folder / "work", "--workers", 2, "--model", self.model, "--json"]
        return subprocess.Popen(
            [*COMMAND, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, run: subprocess.Popen[str]) -> dict[str, Any] | None:
        """Wait for the command; return its report if it came to one."""
        printed, said = run.communicate(timeout=600)
        self.codes[run.returncode] += 1
        self.last_words = said.strip().rpartition("\n")[2]
        return json.loads(printed) if printed else None

    def finish(self) -> dict[str, Any]:
        """Give the command until it reports."""
        while self.runs < MOST_RUNS:
            report = self.end(self.start())
            if report is not None:
                return report
        raise RuntimeError(f"no report after {MOST_RUNS} runs: {self.last_words}")

    def judged(self, report: dict[str, Any]) -> Counter[str]:
        """Return how many users are as they should be, and how many are not."""
        store, found = AdapterStore(self.store), Counter[str]()
        for user in report["users"]:
            versions = len(store.versions(user["user_id"]))
            is_active = store.active(user["user_id"]) is not None
            if store.candidate(user["user_id"]) is not None:
                found["half published"] += 1
            if versions > 1:
                found["published twice"] += 1
            elif versions == 1 and is_active:
                found["published"] += 1
            elif user["state"] in NAMED and user["reason"]:
                found["named"] += 1
            else:
                found["lost"] += 1
        found["lost"] += NUM_USERS - len(report["users"])
        found["damaged"] += len(store.verify().damaged)
        return found


def kills(folder: Path, num_kills: int, chance: random.Random) -> Counter[str]:
    total: Counter[str] = Counter()
    number = 0
    while total["kills"] < num_kills:
        fleet, report = Fleet(folder / f"kills-{number}"), None
        number += 1
        while report is None:
            run = fleet.start()
            while total["kills"] < num_kills:
                try:
                    run.wait(chance.uniform(0.2, MOST_SECONDS))
                    break
                except subprocess.TimeoutExpired:
                    victim = chance.choice([run.pid, *(worker.pid for worker in _workers(run))])
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                    total["kills"] += 1
                    total["of the driver"] += victim == run.pid
            report = fleet.end(run)
        total["runs"] += fleet.runs
        total.update(fleet.judged(report))
        shutil.rmtree(fleet.folder)
    total["fleets"] = number
    total["processes left"] = _left_over()
    return total


def memory(folder: Path, chance: random.Random) -> Counter[str]:
    fleet = Fleet(folder / "memory")
    run = fleet.start()
    _wait_for_ledger(fleet)
    (worker, *_) = _workers(run)
    used = worker.memory_info().vms
    resource.prlimit(worker.pid, resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
    time.sleep(5)
    with contextlib.suppress(ProcessLookupError):
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(worker.pid, resource.RLIMIT_AS, unlimited)
    report = fleet.end(run) or fleet.finish()
    return fleet.judged(report)


def disk(folder: Path, chance: random.Random) -> Counter[str]:
    small = folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "none", str(small)], check=True)
    try:
        fleet = Fleet(small / "fleet")
        run = fleet.start()
        _wait_for_ledger(fleet)
        filler = small / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        time.sleep(15)
        filler.unlink()
        report = fleet.end(run) or fleet.finish()
        found = fleet.judged(report)
        found["runs"] = fleet.runs
        return found
    finally:
        subprocess.run(["umount", str(small)], check=True)


def store(folder: Path, chance: random.Random) -> Counter[str]:
    with _s3() as (server, url):
        fleet = Fleet(folder / "store", url)
        run = fleet.start()
        _wait_for_ledger(fleet)
        server.send_signal(signal.SIGSTOP)
        time.sleep(30)
        server.send_signal(signal.SIGCONT)
        report = fleet.end(run) or fleet.finish()
        found = fleet.judged(report)
        found["runs"] = fleet.runs
        return found


def base(folder: Path, chance: random.Random) -> Counter[str]:
    place = folder / "the-base"
    shutil.copytree(STARTER, place)
    fleet = Fleet(folder / "base", model=str(place))
    run = fleet.start()
    _wait_for_ledger(fleet)
    place.rename(folder / "away")
    for worker in _workers(run):
        worker.kill()
    found: Counter[str] = Counter()
    if fleet.end(run) is None:
        found["ended with a reason"] = int("a worker could not start" in fleet.last_words)
    (folder / "away").rename(place)
    found.update(fleet.judged(fleet.finish()))
    return found


def _workers(run: subprocess.Popen[str]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(run.pid).children()
        return [one for one in children if "spawn_main" in " ".join(one.cmdline())]
    return []


def _left_over() -> int:
    """Return how many workers outlived their drivers by two seconds."""
    time.sleep(2)
    ours = psutil.Process().children(recursive=True)
    return sum("spawn_main" in " ".join(one.cmdline()) for one in ours)


def _wait_for_ledger(fleet: Fleet) -> None:
    """Return once the first users are trained."""
    file = fleet.folder / "work" / "ledger.jsonl"
    until = time.monotonic() + 300
    while time.monotonic() < until:
        if file.exists() and "settled" in file.read_text():
            return
        time.sleep(0.05)
    raise RuntimeError("no user was trained within 300 s")


@contextlib.contextmanager
def _s3() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    os.environ.update(
        AWS_ACCESS_KEY_ID="key",
        AWS_SECRET_ACCESS_KEY="secret",
        AWS_REGION="us-east-1",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT_URL=endpoint,
        AWS_ALLOW_HTTP="true",
    )
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="fleet")
        yield server, "s3://fleet/adapters"
    finally:
        server.send_signal(signal.SIGCONT)
        server.kill()
        server.wait()


FAULTS: dict[str, Callable[[Path, random.Random], Counter[str]]] = {
    "memory": memory,
    "disk": disk,
    "store": store,
    "base": base,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(["kills", *FAULTS]))
    arguments = parser.parse_args()
    chance, found = random.Random(arguments.seed), {}
    with tempfile.TemporaryDirectory(prefix="cope-faults-") as scratch:
        for name in arguments.only.split(","):
            began = time.monotonic()
            if name == "kills":
                counts = kills(Path(scratch), arguments.kills, chance)
            else:
                counts = FAULTS[name](Path(scratch), chance)
            found[name] = dict(counts)
            print(f"{name}: {dict(counts)} in {time.monotonic() - began:.0f} s", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
