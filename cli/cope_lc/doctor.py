"""``cope-lc doctor``: what is installed, which device, which store, what is wrong and what to do about it."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from cope_lc.options import Json, Store

EXAMPLE = "Example: cope-lc doctor"
LITTLE_SPACE = 2 * 10**9  # bytes; a training writes little, a model's download much
_WEIGHTS_BYTES = 10**6  # a checkout without its large files holds a pointer of 130 bytes instead


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``advice`` says what to do where ``ok`` is False; ``needed``: nothing works without it."""

    what: str
    found: str
    ok: bool = True
    advice: str = ""
    needed: bool = True


def doctor(store: Store = None, as_json: Json = False) -> None:
    """Show what is installed, the devices, the store, and what is wrong. Exit code 1: something needed is broken."""
    from cope_lc.quiet_libraries import prints_to_stderr
    from cope_lc.text import print_json

    with prints_to_stderr():
        findings = [*_packages(), *_devices(), _starter(), *_store(store)]
    broken = [finding for finding in findings if finding.needed and not finding.ok]
    if as_json:
        print_json({"ok": not broken, "findings": [asdict(finding) for finding in findings]})
    else:
        _show(findings, len(broken))
    if broken:
        raise typer.Exit(1)


def _show(findings: list[Finding], num_broken: int) -> None:
    from cope_lc.screen import cell, console, say, table

    rows = table("", "what", "found", whole=("", "what"))
    for finding in findings:
        mark, style = (
            ("✓", "green") if finding.ok else ("✗", "red") if finding.needed else ("!", "yellow")
        )
        found = finding.found if finding.ok else f"{finding.found}\n→ {finding.advice}"
        rows.add_row(cell(mark, style), finding.what, cell(found))
    out = console()
    out.print(rows)
    said = (
        f"{num_broken} thing{'s' if num_broken > 1 else ''} to mend, see ✗"
        if num_broken
        else "all that is needed works"
    )
    say(out, f"\n{said}")


def _packages() -> Iterator[Finding]:
    """Python, this package, and what it requires, against the requirements written in its own metadata."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    try:
        required = [Requirement(line) for line in requires("langchain-cope") or []]
        yield Finding("langchain-cope", version("langchain-cope"))
    except PackageNotFoundError:
        yield Finding("langchain-cope", "not installed", False, "pip install langchain-cope")
        return
    for requirement in required:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Finding(requirement.name, "not installed", False, wanted)
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        yield Finding(
            requirement.name,
            found if fits else f"{found}, needed {requirement.specifier}",
            fits,
            wanted,
        )


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding(
            "device",
            f"torch cannot be imported: {error}",
            False,
            "install torch anew, for this machine",
        )
        return
    threads = torch.get_num_threads()
    yield Finding(
        "cpu", f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}, {_bfloat16()}"
    )
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        yield Finding(f"cuda:{index}", f"{facts.name}, {facts.total_memory / 1e9:.0f} GB")
    if torch.backends.mps.is_available():
        yield Finding("mps", platform.processor())


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _bfloat16() -> str:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "bfloat16 unknown"
    found = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    return (
        f"bfloat16 in hardware ({', '.join(found)})"
        if found
        else "no bfloat16 in hardware: models compute in float32"
    )


def _starter() -> Finding:
    from importlib.util import find_spec

    spec = find_spec("langchain_cope")
    folder = Path(spec.origin or "").parent / "starter" if spec else Path("starter")
    weights = folder / "model.safetensors"
    size = weights.stat().st_size if weights.is_file() else 0
    if size < _WEIGHTS_BYTES or not (folder / "config.json").is_file():
        return Finding(
            "starter", f"incomplete in {folder}", False, "install langchain-cope anew", needed=False
        )
    return Finding("starter", f"the bundled base, {size / 1e6:.0f} MB")


def _store(asked: str | None) -> Iterator[Finding]:
    from adapter_store.errors import AdapterStoreError
    from cope_lc.adapters.stored import local_folder, place_of
    from langchain_cope.stores import open_store

    whence = "--store" if asked else "COPE_STORE" if os.environ.get("COPE_STORE") else "the default"
    try:
        store = open_store(asked)
        problems: list[AdapterStoreError] = []
        heads, more = store.list_users(on_problem=problems.append)
    except AdapterStoreError as error:
        yield Finding("store", f"cannot be read ({whence})", False, str(error))
        return
    users = (
        f"{len(heads)} user{'s' if len(heads) != 1 else ''}"
        if more is None
        else f"more than {len(heads)} users"
    )
    yield Finding("store", f"{place_of(store)} ({whence}), {users}")
    if problems:
        yield Finding(
            "users",
            f"{len(problems)} cannot be read",
            False,
            f"cope-lc adapters verify; {problems[0]}",
        )
    folder = local_folder(store)
    if folder is not None:
        yield _writable(folder, "store")
        yield _space(folder)
    if cache := os.environ.get("COPE_STORE_CACHE"):
        yield _writable(Path(cache).expanduser(), "cache", "COPE_STORE_CACHE")


def _existing(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _writable(folder: Path, what: str, setting: str = "--store or COPE_STORE") -> Finding:
    """Write into the folder, or where it would be made, and leave nothing there."""
    from tempfile import TemporaryFile

    existing = _existing(folder)
    try:
        with TemporaryFile(dir=existing):
            pass
    except OSError as error:
        advice = f"give this user access, or choose another {what} with {setting}"
        return Finding(f"{what} writable", f"no: {existing}: {error.strerror}", False, advice)
    return Finding(
        f"{what} writable",
        "yes" if existing == folder else f"yes; it is made in {existing} when it is needed",
    )


def _space(folder: Path) -> Finding:
    free = shutil.disk_usage(_existing(folder)).free
    return Finding(
        "disk",
        f"{free / 1e9:.1f} GB free at the store",
        free >= LITTLE_SPACE,
        "free some space",
        needed=False,
    )
