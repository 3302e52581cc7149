"""How fast the adapter store is, and what it costs beside simpler ways of keeping an adapter.

Measured are: publishes and cold resolve + fetch + verify a second, with one process and with
several, on a local folder (with fsync) and on S3 (a moto server in a process of its own, so its
figures are the server's); resolve with 10, 100 and 1000 log entries, cold (a new store object) and
warm; many users: resolve one, list all. Beside it the ways that people use without a store, with
the same adapter of the bundled base: peft's own (`save_pretrained` into a folder, `load_adapter`
from it), MLflow's file store (log the two files and their metrics; find the newest run and load
them; where mlflow is installed), and, to see what the store's care costs, the two bare files
written and read with nothing checked.

Each figure is the median of several rounds; a round makes each way once, so that a busy machine is
busy for all. The last line is JSON, with the ratios; below 1 the store is faster:

    publish_vs_peft_folder          store.publish (checked, fsynced, atomic) over save_pretrained
    fetch_vs_peft_folder            resolve + fetch_dir, warm, every byte checked, over load_adapter
    publish_vs_mlflow               the same over MLflow's file store
    fetch_vs_mlflow
    publish_vs_bare_files           the same over writing the two files with fsync, and reading them
    fetch_vs_bare_files
    warm_resolve_vs_stat            a warm resolve over os.stat of one file
    cold_resolve_1000_vs_10_entries a cold resolve with 1000 log entries over one with 10

    python benchmarks/store.py                     # about three minutes
    python benchmarks/store.py --users 100000      # writes 100 000 users, a few minutes more
"""

import argparse
import contextlib
import itertools
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from store_torture import s3

from adapter_store import AdapterStore, Limits, layout
from adapter_store.conformance import make_adapter
from adapter_store.entry import encode
from adapter_store.facts import AdapterVersion, FileFacts, UserHead
from adapter_store.log import now

BASE = {"weights": "ab" * 32, "architecture": "cd" * 32, "tokenizer": "ef" * 32, "model": "starter"}
METRICS = {
    way: {"nll": 4.7, "rouge1": 0.15, "rougeL": 0.14} for way in ("base", "sft", "dpo", "cope")
}
Figures = dict[str, Any]


def median_seconds(rounds: int, *calls: Callable[[], Any], each: int = 1) -> list[float]:
    """Return the median time of each call; a round makes all of them, `each` times in a row."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for index, call in enumerate(calls):
            started = time.perf_counter()
            for _ in range(each):
                call()
            times[index].append((time.perf_counter() - started) / each)
    return [statistics.median(seconds) for seconds in times]


# ── beside simpler ways ──


def side_by_side(folder: Path, rounds: int) -> Figures:
    peft_save, peft_load = peft_ways(folder)
    peft_save()
    source = folder / "peft"
    files = {name: (source / name).read_bytes() for name in layout.ADAPTER_FILES}
    store = AdapterStore(folder / "store", limits=Limits(live_versions=20))
    counter = iter(range(10**9))

    def publish() -> None:
        store.publish("alice", source, base=BASE, metrics=METRICS, alpha=0.1, tau=0.1)

    def write() -> None:
        target = folder / "bare" / str(next(counter))
        target.mkdir(parents=True)
        for name, content in files.items():
            with (target / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

    mlflow_publish, mlflow_load = mlflow_ways(folder, source)
    publish()
    writes: dict[str, Callable[[], Any] | None] = {
        "store": publish,
        "peft_folder": peft_save,
        "bare_files": write,
        "mlflow": mlflow_publish,
    }
    write_seconds = medians(rounds, writes)

    def cold() -> None:
        again = AdapterStore(folder / "store")
        again.fetch(again.resolve("alice", base=BASE))

    reads: dict[str, Callable[[], Any] | None] = {
        "store": lambda: store.fetch_dir(store.resolve("alice", base=BASE)),
        "store_cold": cold,
        "peft_folder": peft_load,
        "bare_files": lambda: [(source / name).read_bytes() for name in layout.ADAPTER_FILES],
        "mlflow": mlflow_load,
    }
    return {
        "write": write_seconds,
        "read": medians(rounds, reads),
        "bytes": sum(map(len, files.values())),
    }


def medians(rounds: int, ways: dict[str, Callable[[], Any] | None]) -> dict[str, float]:
    installed = {name: way for name, way in ways.items() if way is not None}
    return dict(zip(installed, median_seconds(rounds, *installed.values()), strict=True))


def peft_ways(folder: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Save an adapter of the bundled base with peft, into one folder as people do; and load it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import langchain_cope

    base = Path(langchain_cope.__file__).parent / "starter"
    torch.set_num_threads(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=42, target_modules=["q_proj", "v_proj"]),
    )

    def save() -> None:
        model.save_pretrained(str(folder / "peft"), safe_serialization=True)

    def load() -> None:
        model.load_adapter(str(folder / "peft"), "loaded")
        model.delete_adapter("loaded")

    return save, load


def mlflow_ways(
    folder: Path, source: Path
) -> tuple[Callable[[], Any] | None, Callable[[], Any] | None]:
    """Log the two files as artifacts of an MLflow run with its metrics; and load them again."""
    try:
        import mlflow
        from mlflow.tracking import MlflowClient
    except ImportError:
        print("mlflow is not installed: pip install mlflow-skinny")
        return None, None
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    client = MlflowClient(tracking_uri=(folder / "mlflow").as_uri())
    experiment = client.create_experiment(
        "alice", artifact_location=(folder / "mlflow-artifacts").as_uri()
    )
    runs: list[str] = []

    def publish() -> None:
        run = client.create_run(experiment)
        for name in layout.ADAPTER_FILES:
            client.log_artifact(run.info.run_id, str(source / name), "adapter")
        for way, figures in METRICS.items():
            for measure, value in figures.items():
                client.log_metric(run.info.run_id, f"{way}.{measure}", value)
        client.set_terminated(run.info.run_id)
        runs.append(run.info.run_id)

    def load() -> None:
        [run] = client.search_runs(
            [experiment], max_results=1, order_by=["attributes.start_time DESC"]
        )
        path = mlflow.artifacts.download_artifacts(
            artifact_uri=f"{run.info.artifact_uri}/adapter",
            tracking_uri=(folder / "mlflow").as_uri(),
        )
        for name in layout.ADAPTER_FILES:
            (Path(path) / name).read_bytes()

    return publish, load


# ── throughput ──


def throughput(location: str, num_bytes: int, seconds: float, processes: int, kind: str) -> float:
    """Return operations a second of so many processes together, each on users of its own."""
    command = [sys.executable, __file__, "--work", kind, location, str(num_bytes), str(seconds)]
    children = [
        subprocess.Popen(
            [*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for number in range(processes)
    ]
    for child in children:
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin
        child.stdin.write("go\n")
        child.stdin.flush()
    return sum(float(child.communicate()[0]) for child in children)


def work(kind: str, location: str, num_bytes: int, seconds: float, number: int) -> None:
    """Be one process of `throughput`: wait for the word, work, print operations a second."""
    files = make_adapter(number, num_bytes)
    store = AdapterStore(location)
    users = [f"user {number} {index}" for index in range(20)]
    if kind != "publish":
        for user in users:
            store.publish(user, files, base=BASE, metrics=METRICS)
    else:
        store.publish(users[0], files, base=BASE, metrics=METRICS)
    print("ready", flush=True)
    sys.stdin.readline()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        user = users[count % len(users)]
        if kind == "publish":
            store.publish(user, files, base=BASE, metrics=METRICS)
        else:
            reader = AdapterStore(location) if kind == "cold" else store
            reader.fetch(reader.resolve(user, base=BASE))
        count += 1
    print(count / (time.perf_counter() - started))


def throughputs(location: str, num_bytes: int, seconds: float) -> Figures:
    figures = {}
    for kind in ("publish", "cold", "warm"):
        for processes in (1, 4):
            rate = throughput(location, num_bytes, seconds, processes, kind)
            figures[f"{kind}_per_second_{processes}_processes"] = round(rate, 1)
    return figures


# ── resolve ──


def resolves(folder: Path, rounds: int) -> Figures:
    """Time resolve with logs of several lengths, cold and warm, and a look at one file."""
    store = AdapterStore(folder / "logs")
    seconds: Figures = {}
    for num_entries in (10, 100, 1000):
        user = f"user {num_entries}"
        one, other = (
            store.publish(user, make_adapter(seed, 64), base=BASE, metrics=METRICS).version
            for seed in range(2)
        )
        for number in range(num_entries - 2):
            store.activate(user, (one, other)[number % 2])

        def cold(user: str = user) -> None:
            AdapterStore(folder / "logs").resolve(user)

        def warm(user: str = user) -> None:
            store.resolve(user)

        seconds[f"cold_{num_entries}_entries"] = median_seconds(rounds, cold, each=20)[0]
        seconds[f"warm_{num_entries}_entries"] = median_seconds(rounds, warm, each=200)[0]
    path = str(folder / "logs" / layout.ROOT_FILE)

    def stat() -> None:
        os.stat(path)  # noqa: PTH116 - what is compared with

    seconds["stat"] = median_seconds(rounds, stat, each=1000)[0]
    return seconds


def many_users(folder: Path, num_users: int) -> Figures:
    """Make a store of many users, then resolve some, and list all.

    It is made without fsync, by writing what a publish writes.
    """
    store = AdapterStore(folder / "many")
    store.publish("first", make_adapter(0, 64), base=BASE)
    inside = store._opener.open()
    assert inside is not None
    started = time.perf_counter()
    for number in range(num_users - 1):
        head = head_of(inside.log.user_key(f"user {number}"), f"user {number}")
        path = folder / "many" / layout.entry_key(head.user_key, 1)
        path.parent.mkdir(parents=True)
        path.write_bytes(encode(head))
    made = time.perf_counter() - started
    picks = itertools.cycle(range(0, num_users - 1, max(1, num_users // 500)))

    def cold() -> None:
        AdapterStore(folder / "many").resolve(f"user {next(picks)}")

    cold_seconds = [timed(cold) for _ in range(400)]
    started = time.perf_counter()
    listed = sum(1 for _ in inside.log.user_keys())
    keys_seconds = time.perf_counter() - started
    started = time.perf_counter()
    heads, cursor = store.list_users()
    count = len(heads)
    while cursor is not None:
        heads, cursor = store.list_users(cursor)
        count += len(heads)
    heads_seconds = time.perf_counter() - started
    assert listed == count == num_users
    return {
        "users": num_users,
        "made_seconds": round(made, 1),
        "cold_resolve_us": round(1e6 * statistics.median(cold_seconds)),
        "enumerate_seconds": round(keys_seconds, 2),
        "list_with_heads_seconds": round(heads_seconds, 2),
    }


def head_of(user_key: str, user_id: str) -> UserHead:
    created = now()
    version = AdapterVersion(
        user_id=user_id,
        user_key=user_key,
        version=layout.new_version(created),
        created_at=created,
        files={name: FileFacts.of(content) for name, content in make_adapter(0, 64).items()},
        base=BASE,
        metrics=METRICS,
    )
    return UserHead(
        user_id=user_id,
        user_key=user_key,
        seq=1,
        commit="c",
        updated_at=created,
        operation="publish",
        operation_version=version.version,
        active=version.version,
        versions=(version,),
    )


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


# ── from the command line ──


@contextlib.contextmanager
def working_folder(where: str | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=where) as name:
        yield Path(name)


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        kind, location, num_bytes, seconds, number = sys.argv[2:]
        work(kind, location, int(num_bytes), float(seconds), int(number))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bytes", type=int, default=1_200_000, help="of the adapters in operations a second"
    )
    parser.add_argument(
        "--turns", type=int, default=30, dest="rounds", help="rounds of each median"
    )
    parser.add_argument("--seconds", type=float, default=5, help="of each throughput")
    parser.add_argument("--users", type=int, default=10_000, help="of the store with many users")
    parser.add_argument("--folder", help="where the files lie; default: the temporary folder")
    parser.add_argument("--no-s3", action="store_true")
    options = parser.parse_args()
    print(f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} CPUs")
    with working_folder(options.folder) as folder:
        beside = side_by_side(folder, options.rounds)
        resolve = resolves(folder, options.rounds)
        local = throughputs(str(folder / "throughput"), options.bytes, options.seconds)
        many = many_users(folder, options.users)
        remote: Figures = {}
        if not options.no_s3:
            with s3() as url:
                remote = throughputs(url, options.bytes, options.seconds)
    ratios = {}
    for what, seconds in (("publish", beside["write"]), ("fetch", beside["read"])):
        for way in ("peft_folder", "mlflow", "bare_files"):
            ratio = seconds["store"] / seconds[way] if way in seconds else None
            ratios[f"{what}_vs_{way}"] = ratio
    ratios["warm_resolve_vs_stat"] = resolve["warm_100_entries"] / resolve["stat"]
    ratios["cold_resolve_1000_vs_10_entries"] = (
        resolve["cold_1000_entries"] / resolve["cold_10_entries"]
    )
    figures = {
        "ratios": {name: value and round(value, 3) for name, value in ratios.items()},
        "write_ms": {name: round(1e3 * seconds, 2) for name, seconds in beside["write"].items()},
        "read_ms": {name: round(1e3 * seconds, 3) for name, seconds in beside["read"].items()},
        "resolve_us": {name: round(1e6 * seconds, 1) for name, seconds in resolve.items()},
        "local": local,
        "s3_moto": remote,
        "many_users": many,
    }
    print(
        f"an adapter of {beside['bytes']} bytes beside the others; "
        f"{options.bytes} bytes for operations a second"
    )
    for name, rows in figures.items():
        print(f"\n{name}")
        for key, value in rows.items():
            print(f"  {key:36} {value}")
    print(json.dumps({**figures["ratios"], **figures}))


if __name__ == "__main__":
    main()
