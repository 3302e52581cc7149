"""What a store must stand, done to it for as long as you like.

    kill    writers are killed (-9) at random moments, three at a time: nothing that was
            acknowledged may be lost, nothing half visible, and a garbage collection leaves what is
            listed and nothing else
    race    processes publish for one user: every publish is kept, in one order
    linear  threads publish, activate, roll back, erase, collect and resolve one user; a small
            checker looks for an order of the calls that explains every answer
    erase   readers and a publisher work on users that are erased under them: no answer after an
            erasure has returned
    full    publishes until a small file system is full: a clear error each time, an intact store
    fuzz    hostile entries, root files, weights, user ids and archives: only the store's own errors
            come out, no path outside the store is touched, memory stays bounded

Each kind prints figures and a last line of JSON.

    python benchmarks/store_torture.py kill --rounds 500
    python benchmarks/store_torture.py kill --rounds 100 --s3   # a moto server, its own process
    python benchmarks/store_torture.py linear --rounds 300
    python benchmarks/store_torture.py fuzz --minutes 10

The tests run the same code for a moment.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from adapter_store import (
    AdapterCache,
    AdapterStore,
    BackendError,
    Limits,
    LocalBackend,
    UserErasedError,
    layout,
)
from adapter_store.backends.protocol import open_backend
from adapter_store.conformance import all_keys, make_adapter

sys.path.insert(0, str(Path(__file__).parent))
from store_fuzz import fuzz
from store_linear import linear

BASE = {"weights": "w"}
MANY = Limits(live_versions=1000)  # none is dropped, so that a lost one is seen
NO_GRACE = timedelta(0)
Figures = dict[str, Any]


# ── kill ──


def write_for_ever(location: str, user: str, num_bytes: int) -> None:
    """Publish until this process is killed, and print each version once it is acknowledged."""
    store = AdapterStore(location, limits=MANY)
    number = 0
    while True:
        version = store.publish(
            user, make_adapter(number, num_bytes), base=BASE, metadata={"number": number}
        )
        print(version.version, flush=True)
        number += 1


def start_writer(location: str, user: str, num_bytes: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "write", location, user, str(num_bytes)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def kill(
    location: str, rounds: int, writers: int = 3, longest: float = 0.05, num_bytes: int = 60_000
) -> Figures:
    """Kill writers at random moments and check the store after each round."""
    moments = random.Random(0)
    num_acknowledged = num_listed = 0
    store = AdapterStore(location, limits=MANY)
    for number in range(rounds):
        user = f"user-{number}"
        processes = [start_writer(location, user, num_bytes) for _ in range(writers)]
        acknowledged = [
            process.stdout.readline().strip() for process in processes if process.stdout
        ]
        for process in processes:
            time.sleep(moments.uniform(0, longest))
            process.kill()
        for process in processes:
            acknowledged += process.communicate()[0].split()
        versions = AdapterStore(location, limits=MANY).versions(user)
        listed = {version.version for version in versions}
        assert set(acknowledged) <= listed, f"round {number}: lost {set(acknowledged) - listed}"
        assert len(versions) <= len(acknowledged) + writers, f"round {number}: too many versions"
        for version in versions:
            store.fetch(version)
        num_acknowledged += len(acknowledged)
        num_listed += len(versions)
        again = store.publish(user, make_adapter(0), base=BASE)
        assert store.resolve(user) == again
    backend = open_backend(location)
    done = store.gc(grace=NO_GRACE)
    verified = store.verify()
    assert verified.ok, verified.damaged
    assert verified.orphans == 0
    check_only_live_files(backend, store)
    return {
        "rounds": rounds,
        "kills": rounds * writers,
        "acknowledged": num_acknowledged,
        "lost": 0,
        "half_visible": 0,
        "committed_unacknowledged": num_listed - num_acknowledged,
        "collected_versions": done.versions,
        "collected_unfinished_files": done.unfinished_files,
    }


def check_only_live_files(backend: Any, store: AdapterStore) -> None:
    """Check that users/ holds listed versions and log entries only, and that no probe is left."""
    heads, cursor = store.list_users()
    while cursor is not None:
        page, cursor = store.list_users(cursor)
        heads = [*heads, *page]
    live = {
        f"{layout.version_folder(head.user_key, version.version)}/{name}"
        for head in heads
        for version in head.versions
        for name in layout.ADAPTER_FILES
    }
    assert {key for key in all_keys(backend, layout.USERS) if "/versions/" in key} == live
    assert backend.list_folder(layout.STAGING) == []
    assert all_keys(backend, layout.PROBES) == []


# ── race ──


def race(location: str, processes: int, each: int) -> Figures:
    """Processes publish for one user at the same time."""
    code = (
        "import sys\nfrom adapter_store import AdapterStore, Limits\n"
        "from adapter_store.conformance import make_adapter\n"
        "store = AdapterStore(sys.argv[1], limits=Limits(live_versions=10_000))\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for n in range(int(sys.argv[2])):\n"
        "    print(store.publish('alice', make_adapter(n, 20_000), base={}).version, flush=True)\n"
    )
    command = [sys.executable, "-c", code, location, str(each)]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    for child in children:
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
    started = time.perf_counter()
    for child in children:
        assert child.stdin
        child.stdin.write("go\n")
        child.stdin.flush()
    outputs = [child.communicate()[0].split() for child in children]
    seconds = time.perf_counter() - started
    assert [child.returncode for child in children] == [0] * processes
    store = AdapterStore(location)
    versions = [version.version for version in store.versions("alice")]
    assert sorted(versions) == sorted(version for output in outputs for version in output)
    for output in outputs:  # each process's publishes stand in the order in which it made them
        assert [version for version in versions if version in set(output)] == output
    assert store.active("alice") == versions[-1]
    assert [change.seq for change in store.history("alice", limit=10**6)] == list(
        range(1, processes * each + 1)
    )
    return {
        "processes": processes,
        "publishes": len(versions),
        "kept": len(versions),
        "per_second": len(versions) / seconds,
    }


# ── erase ──


def erase(location: str, folder: Path, seconds: float, readers: int = 2) -> Figures:
    """Erase users under processes that read and publish them."""
    code = (
        "import sys, time\nfrom adapter_store import *\n"
        "store = AdapterStore(sys.argv[1], cache=sys.argv[2])\nprint('ready', flush=True)\n"
        "while True:\n"
        "    for number in range(8):\n"
        "        started = time.time()\n"
        "        try:\n"
        "            version = store.resolve(f'user-{number}')\n"
        "            store.fetch(version)\n"
        "        except AdapterNotFoundError:\n"
        "            continue\n"
        "        print(number, version.version, repr(started), flush=True)\n"
    )
    store = AdapterStore(location, cache=folder / "cache-here")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, location, str(folder / f"cache-{number % 2}")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(readers)
    ]
    erased: dict[str, float] = {}
    num_refused = 0
    answers: list[str] = []

    def drain(process: subprocess.Popen[str]) -> None:
        assert process.stdout
        with process.stdout as lines:
            answers.extend(lines)

    def train(stop: threading.Event) -> None:
        nonlocal num_refused
        chance = random.Random(1)
        mine = AdapterStore(location)
        while not stop.is_set():
            user = f"user-{chance.randrange(8)}"
            data_seq = mine.data_seq(user)
            time.sleep(chance.uniform(0, 0.01))
            try:
                mine.publish(
                    user, make_adapter(chance.randrange(100), 20_000), base=BASE, data_seq=data_seq
                )
            except UserErasedError:
                num_refused += 1

    for number in range(8):
        store.publish(f"user-{number}", make_adapter(number, 20_000), base=BASE)
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    drains = [threading.Thread(target=drain, args=(process,)) for process in processes]
    stop = threading.Event()
    trainer = threading.Thread(target=train, args=(stop,))
    for thread in (*drains, trainer):
        thread.start()
    chance, num_erased = random.Random(2), 0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        user = f"user-{chance.randrange(8)}"
        doomed = [version.version for version in store.versions(user)]
        store.erase_user(user)
        returned = time.time()
        num_erased += 1
        for version in doomed:
            erased[version] = returned
        time.sleep(chance.uniform(0, 0.02))
    stop.set()
    trainer.join()
    for number in range(8):
        store.erase_user(f"user-{number}")
    for process in processes:
        process.kill()
        process.wait()
    for thread in drains:
        thread.join()
    num_answers = late = 0
    for line in answers:
        fields = line.split()
        if len(fields) == 3 and line.endswith("\n"):
            num_answers += 1
            if float(fields[2]) > erased.get(fields[1], float("inf")):
                late += 1
    assert late == 0, f"{late} answers began after the erasure had returned"
    store.gc(grace=NO_GRACE)
    left = [key for key in all_keys(open_backend(location), layout.USERS) if "/versions/" in key]
    assert left == [], left
    here = list((folder / "cache-here").rglob("*.safetensors"))
    assert here == [], here
    elsewhere = AdapterStore(location, cache=AdapterCache(folder / "cache-0"))
    elsewhere.gc(grace=NO_GRACE)
    copies = (folder / "cache-0").rglob("*.safetensors")
    assert [path for path in copies if "tmp" not in path.parts] == []
    return {
        "erasures": num_erased,
        "answers": num_answers,
        "answers_after_erasure": late,
        "publishes_refused": num_refused,
        "files_left": 0,
    }


# ── full ──


def full(folder: Path) -> Figures:
    """Publish until a small file system, mounted at `folder`, is full."""
    store = AdapterStore(folder / "store", limits=MANY)
    (folder / "something else").write_bytes(bytes(200_000))
    versions, errors = [], []
    for number in range(10_000):
        try:
            versions.append(
                store.publish(
                    "alice", make_adapter(number, 200_000), base=BASE, metadata={"x": "y" * 2000}
                )
            )
        except BackendError as error:
            errors.append(str(error))
            if len(errors) == 20:
                break
    assert len(errors) == 20, "it never became full"
    assert all("the disk is full" in error for error in errors), errors
    fresh = AdapterStore(folder / "store", limits=MANY)
    assert fresh.versions("alice") == versions
    for version in versions:
        fresh.fetch(version)
    check_only_live_files(LocalBackend(folder / "store"), fresh)
    (folder / "something else").unlink()  # as the error says: free some space
    fresh.delete_version("alice", versions[0].version)
    fresh.publish("alice", make_adapter(1, 1000), base=BASE)
    return {"published": len(versions), "refused_full": len(errors), "lost": 0}


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Mount a file system of that size in memory; BackendError where this user may not."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        raise BackendError(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# ── from the command line ──


@contextlib.contextmanager
def s3() -> Iterator[str]:
    """Give the URL of an empty bucket on a moto server that runs in a process of its own."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                request = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
                urllib.request.urlopen(request, timeout=10).close()
                break
            time.sleep(0.1)
        yield f"s3://key:secret@bucket/store?endpoint=http://127.0.0.1:{port}&region=us-east-1"
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    if sys.argv[1:2] == ["write"]:
        write_for_ever(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["kill", "race", "linear", "erase", "full", "fuzz"])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--s3", action="store_true", help="on a moto server instead of a local folder"
    )
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        location = stack.enter_context(s3()) if options.s3 else str(folder / "store")
        started = time.perf_counter()
        match options.kind:
            case "kill":
                figures = kill(location, options.rounds, longest=0.3 if options.s3 else 0.05)
            case "race":
                figures = race(location, options.processes, options.rounds)
            case "linear":
                figures = linear(
                    lambda: fresh_store(folder, options.s3, location),
                    options.rounds,
                    seed=options.seed,
                )
            case "erase":
                figures = erase(location, folder, options.seconds)
            case "full":
                with small_disk(folder / "disk", 6_000_000) as disk:
                    figures = full(disk)
            case _:
                figures = fuzz(options.minutes, options.seed)
        figures |= {"kind": options.kind, "place": "s3 (moto)" if options.s3 else "local folder"}
        figures["took_seconds"] = round(time.perf_counter() - started, 1)
    for name, value in figures.items():
        print(f"{name:28} {value}")
    print(json.dumps(figures))


def fresh_store(folder: Path, on_s3: bool, location: str) -> AdapterStore:
    name = os.urandom(6).hex()
    own = location.replace("/store?", f"/{name}?") if on_s3 else folder / name
    return AdapterStore(own, limits=MANY)


if __name__ == "__main__":
    main()
