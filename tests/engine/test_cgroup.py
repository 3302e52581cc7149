"""What a container leaves, read from both versions of control groups as plain files."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from langchain_cope.engine import device
from langchain_cope.engine.cgroup import cores_in_cgroups, free_in_cgroups

MB = 1_000_000
UNLIMITED_V1 = "9223372036854771712"
V2, V1, HYBRID = "sys/fs/cgroup", "sys/fs/cgroup/memory", "sys/fs/cgroup/unified"


def group(folder: Path, limit: str, used: int, inactive: int = 0, high: str = "max") -> None:
    """Write a group as version 2 has it; under a folder named `memory` as version 1 has it."""
    folder.mkdir(parents=True, exist_ok=True)
    is_v1 = "memory" in folder.parts
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    if not is_v1:
        names = ("memory.max", "memory.current", "inactive_file")
        (folder / "memory.high").write_text(f"{high}\n")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used * MB}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {inactive * MB}\nactive_file 9\n")


def process_in(root: Path, *lines: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))


def test_version_2_in_a_container_with_its_own_namespace(tmp_path: Path) -> None:
    process_in(tmp_path, "0::/")
    group(tmp_path / V2, str(1500 * MB), used=400, inactive=100)
    assert free_in_cgroups(tmp_path) == 1200 * MB


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    process_in(tmp_path, "0::/pods/one/worker")
    group(tmp_path / V2 / "pods", str(8000 * MB), used=7700)
    group(tmp_path / V2 / "pods/one", str(2000 * MB), used=1000)
    group(tmp_path / V2 / "pods/one/worker", "max", used=900)
    group(tmp_path / V2 / "pods/another", str(1 * MB), used=1)
    assert free_in_cgroups(tmp_path) == 300 * MB


def test_a_group_slowed_down_at_its_high_mark_ends_there(tmp_path: Path) -> None:
    process_in(tmp_path, "0::/slice")
    group(tmp_path / V2 / "slice", str(2000 * MB), used=500, high=str(900 * MB))
    assert free_in_cgroups(tmp_path) == 400 * MB


def test_version_1_with_a_hosts_path_that_the_container_does_not_see(tmp_path: Path) -> None:
    process_in(tmp_path, "9:name=systemd:/docker/ab", "4:cpu,memory:/docker/ab", "0::/docker/ab")
    group(tmp_path / V1, str(1500 * MB), used=1400, inactive=50)
    assert free_in_cgroups(tmp_path) == 150 * MB


def test_version_1_without_a_limit_leaves_more_than_any_host_has(tmp_path: Path) -> None:
    process_in(tmp_path, "4:memory:/")
    group(tmp_path / V1, UNLIMITED_V1, used=300)
    free = free_in_cgroups(tmp_path)
    assert free is not None
    assert free > 2**62


def test_both_versions_at_once_are_both_read(tmp_path: Path) -> None:
    process_in(tmp_path, "4:memory:/one", "0::/one")
    group(tmp_path / V1 / "one", str(1000 * MB), used=100)
    group(tmp_path / HYBRID / "one", str(500 * MB), used=100)
    assert free_in_cgroups(tmp_path) == 400 * MB


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    process_in(tmp_path, "0::/")
    group(tmp_path / V2, str(100 * MB), used=120)
    assert free_in_cgroups(tmp_path) == 0


@pytest.mark.parametrize("lines", [(), ("0::/",), ("4:memory:/gone", "0::/gone"), ("1:cpu:/",)])
def test_without_a_limit_there_is_none(tmp_path: Path, lines: tuple[str, ...]) -> None:
    process_in(tmp_path, *lines)
    assert free_in_cgroups(tmp_path) is None
    assert free_in_cgroups(tmp_path / "no Linux") is None


@pytest.mark.parametrize(("groups", "share"), [(None, 1.0), (2**62, 1.0), (1000, 0.0)])
def test_the_engine_sizes_its_caches_by_the_smaller_of_host_and_groups(
    monkeypatch: pytest.MonkeyPatch, groups: int | None, share: float
) -> None:
    monkeypatch.setattr(device, "free_in_cgroups", lambda: groups)
    free = device.free_bytes(torch.device("cpu"))
    of_host = psutil.virtual_memory().available
    expected = of_host * share + (1000 if groups == 1000 else 0)
    assert free == pytest.approx(expected, rel=0.1)


def test_the_tightest_quota_of_nested_groups_tells_the_cores(tmp_path: Path) -> None:
    process_in(tmp_path, "0::/pods/one")
    for name, quota in {"pods": "250000 100000", "pods/one": "max 100000"}.items():
        (tmp_path / V2 / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / V2 / name / "cpu.max").write_text(f"{quota}\n")
    assert cores_in_cgroups(tmp_path) == 2.5


@pytest.mark.parametrize(("quota", "cores"), [("150000", 1.5), ("-1", None), (None, None)])
def test_version_1_has_quota_and_period_apart(
    quota: str | None, cores: float | None, tmp_path: Path
) -> None:
    process_in(tmp_path, "4:cpu,cpuacct:/docker/ab", "3:memory:/docker/ab")
    folder = tmp_path / "sys/fs/cgroup/cpu,cpuacct"
    folder.mkdir(parents=True)
    if quota is not None:
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert cores_in_cgroups(tmp_path) == cores


LOAD = """
import torch
torch.set_num_threads(4)
from langchain_cope.engine import device, load_base
device.cores_in_cgroups = lambda: 1.5
load_base("starter", device="cpu")
print(torch.get_num_threads())
"""


@pytest.mark.parametrize(("asked", "threads"), [(None, "2"), ("4", "4")])
def test_torch_takes_no_more_threads_than_the_quota_has_cores(
    asked: str | None, threads: str
) -> None:
    environment = {name: text for name, text in os.environ.items() if name != "OMP_NUM_THREADS"}
    if asked is not None:
        environment["OMP_NUM_THREADS"] = asked
    run = subprocess.run(
        [sys.executable, "-c", LOAD],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout.split() == [threads]
