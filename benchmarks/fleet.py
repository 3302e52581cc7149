"""Users an hour: `cope-lc personalize-fleet` against `cope-lc personalize` in a loop.

    python benchmarks/fleet.py users.jsonl [--users 12] [--model smollm2] [--workers 2]
    python benchmarks/fleet.py users.jsonl --results r.json --part loop --from 0 --to 6
    python benchmarks/fleet.py users.jsonl --folder DIR --results r.json --part fleet --seconds 180

Takes the first users of the file (`{"user_id", "history": [{"prompt", "completion"}]}`). The loop
calls the command once a user, one after another, as a shell would, with all cores; the fleet is one
command with `--workers` processes. Both are timed from outside, start of Python included. What is
printed:

1. `fleet_vs_loop`: seconds a user of the loop over those of the fleet;
2. `nll_ratio`: the mean held-out NLL of the adapters, fleet over loop, a user each;
3. the part of each stage, of the loop's wall time and of the workers' time, and what is no stage
   (start, imports, the load of the base);
4. what other machines would do, computed from these parts: `cores_16` (eight times as many workers,
   if memory bandwidth allows it) and `start_free` (a fleet so long that starting costs nothing).

`--results` keeps figures between calls, so that a long comparison can be run in pieces: `--part
loop` does users `--from` to `--to`, `--part fleet` everybody. With `--folder`, which keeps stores
and work, a fleet is stopped after `--seconds`, and the same call goes on: of its pieces all count,
their starts and what a stop throws away, too; the time between them does not. The last line is one
JSON object.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "cope_lc"]


def main() -> None:
    arguments = _arguments()
    results = _read(arguments.results)
    with _folder(arguments.folder) as folder:
        files = _write_users(arguments, folder / "histories")
        if arguments.part in ("both", "loop"):
            for file in files[arguments.start : arguments.end]:
                results["loop"].update(_loop(file, arguments.model, folder))
                _write(arguments.results, results)
        if arguments.part in ("both", "fleet"):
            _fleet(folder, arguments, results)
            _write(arguments.results, results)
    figures = _compared(results)
    for name, value in figures.items():
        print(f"{name}: {value}", file=sys.stderr)
    print(json.dumps({"machine": _machine(), "model": arguments.model, **figures}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument("--items", type=int, help="newest items of each user; default: all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ray", help="train on a Ray cluster instead of processes")
    parser.add_argument("--part", choices=["both", "loop", "fleet"], default="both")
    parser.add_argument("--from", dest="start", type=int, default=0)
    parser.add_argument("--to", dest="end", type=int)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    parser.add_argument("--seconds", type=float, help="after which the fleet is stopped")
    return parser.parse_args()


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="cope-fleet-") as scratch:
        yield Path(scratch)


def _write_users(arguments: argparse.Namespace, folder: Path) -> list[Path]:
    """Write one file a user; return them in order."""
    folder.mkdir(exist_ok=True)
    with arguments.file.open(encoding="utf-8") as lines:
        users = [json.loads(line) for _, line in zip(range(arguments.users), lines, strict=False)]
    files = []
    for number, user in enumerate(users):
        rows = user["history"][-arguments.items :] if arguments.items else user["history"]
        file = folder / f"user-{number:04}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files.append(file)
    return files


def _loop(file: Path, model: str, folder: Path) -> dict[str, Any]:
    began = time.perf_counter()
    options = ["--user", file.stem, "--model", model, "--store", folder / "loop-store", "--json"]
    facts = _run("personalize", file, *options)
    return {
        file.stem: {
            "seconds": time.perf_counter() - began,
            "timings": facts["timings"],
            "nll": facts["metrics"]["sft"]["nll"],
            "published": facts["published"],
        }
    }


def _fleet(folder: Path, arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """Run the fleet until its end or for `--seconds`, and note in `results` what came of it."""
    began = time.perf_counter()
    where = ["--store", folder / "fleet-store", "--work", folder / "work"]
    ray = ["--ray", arguments.ray] if arguments.ray else []
    many = ["--model", arguments.model, "--workers", arguments.workers, *ray]
    words = ["personalize-fleet", folder / "histories", *where, *many, "--json"]
    facts = _run(*words, seconds=arguments.seconds)
    pieces = results.setdefault("pieces", [])
    pieces.append(time.perf_counter() - began)
    if facts is None:
        print(f"stopped; {len(pieces)} pieces so far: the same call goes on", file=sys.stderr)
        return
    results["fleet"] = {
        "seconds": sum(pieces),
        "workers": arguments.workers,
        "counts": facts["counts"],
        "users": {
            user["user_id"]: {
                "timings": user["timings"],
                "nll": user["metrics"]["sft"]["nll"],
                "state": user["state"],
            }
            for user in facts["users"]
            if user["metrics"]
        },
    }


def _run(*words: object, seconds: float | None = None) -> Any:
    """Return what the command prints; None where it was stopped after so many seconds."""
    process = subprocess.Popen([*COMMAND, *map(str, words)], stdout=subprocess.PIPE)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate()
        if not output:
            return None
    if process.returncode:
        raise SystemExit(f"{words[0]} ended with code {process.returncode}")
    return json.loads(output)


def _compared(results: dict[str, Any]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    loop, fleet = results["loop"], results["fleet"]
    if loop:
        seconds = sum(user["seconds"] for user in loop.values())
        figures["loop_seconds_a_user"] = seconds / len(loop)
        figures["loop_users_an_hour"] = 3600 * len(loop) / seconds
        figures["loop_parts"] = _parts([user["timings"] for user in loop.values()], seconds)
    if fleet:
        users, seconds = fleet["users"], fleet["seconds"]
        stages = [user["timings"] for user in users.values()]
        worked = sum(sum(timings.values()) for timings in stages)
        figures["fleet_seconds_a_user"] = seconds / len(users)
        figures["fleet_users_an_hour"] = 3600 * len(users) / seconds
        figures["fleet_counts"] = fleet["counts"]
        figures["fleet_parts"] = _parts(stages, seconds * fleet["workers"])
        figures["start_free_users_an_hour"] = 3600 * len(users) / (worked / fleet["workers"])
        figures["cores_16_users_an_hour"] = 3600 * len(users) / (worked / 16)
    both = sorted(set(loop) & set(fleet["users"])) if fleet else []
    if both:
        ours = figures["fleet_seconds_a_user"]
        figures["fleet_vs_loop"] = sum(loop[user]["seconds"] for user in both) / len(both) / ours
        ratios = [fleet["users"][user]["nll"] / loop[user]["nll"] for user in both]
        figures["nll_ratio"] = sum(ratios) / len(ratios)
        figures["users_of_both"] = len(both)
    return figures


def _parts(stages: list[dict[str, float]], seconds: float) -> dict[str, float]:
    """Return the share of `seconds` of each stage, and of what is none."""
    total: Counter[str] = Counter()
    for timings in stages:
        total.update(timings)
    parts = {stage: round(value / seconds, 3) for stage, value in total.items()}
    return {**parts, "no stage": round(1 - sum(total.values()) / seconds, 3)}


def _read(file: Path | None) -> dict[str, Any]:
    if file is not None and file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    return {"loop": {}, "fleet": None}


def _write(file: Path | None, results: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(results))


def _machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
