"""`cope-lc doctor`: what is installed, the devices, the store, what is wrong, and what to do."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from cope_lc.adapters.stored import local_folder, location_of, store_at
from cope_lc.options import Json, Store
from cope_lc.output import Output
from cope_lc.quiet_libraries import prints_to_stderr
from cope_lc.screen import cell, console, say, table
from cope_lc.text import plural

if TYPE_CHECKING:
    from packaging.requirements import Requirement

LITTLE_SPACE = 2 * 10**9  # bytes; a training writes little, a model's download much
_WEIGHTS_BYTES = 10**6  # a checkout without its large files holds a pointer of 130 bytes instead
_CPU_FACTS = Path("/proc/cpuinfo")


class Finding(NamedTuple):
    """One thing that was looked at; `--json` prints it field by field."""

    what: str
    found: str
    ok: bool = True
    advice: str = ""
    """What to do where `ok` is False."""
    needed: bool = True
    """Whether nothing works without it."""

    @property
    def is_broken(self) -> bool:
        """Whether something needed does not work."""
        return self.needed and not self.ok


def doctor(store: Store = None, as_json: Json = False) -> None:
    """Show what is installed, the devices, the store, and what is wrong.

    Exit code 1 if something needed is broken.
    """
    with prints_to_stderr():
        findings = [*_packages(), *_devices(), _smollm2(), _starter(), *_store(store)]
    num_broken = len([finding for finding in findings if finding.is_broken])
    facts = {"ok": num_broken == 0, "findings": [finding._asdict() for finding in findings]}
    Output(as_json).show(facts, lambda: _show(findings, num_broken))
    if num_broken:
        raise typer.Exit(1)


def _show(findings: list[Finding], num_broken: int) -> None:
    rows = table("", "what", "found", whole=("", "what"))
    for finding in findings:
        text = finding.found if finding.ok else f"{finding.found}\n→ {finding.advice}"
        rows.add_row(cell(*_mark(finding)), finding.what, cell(text))
    out = console()
    out.print(rows)
    if num_broken:
        say(out, f"\n{plural(num_broken, 'thing')} to fix, see ✗")
    else:
        say(out, "\nall that is needed works")


def _mark(finding: Finding) -> tuple[str, str]:
    """Return the sign before a finding, and its colour."""
    if finding.ok:
        return "✓", "green"
    return ("✗", "red") if finding.needed else ("!", "yellow")


def _packages() -> Iterator[Finding]:
    """Check Python, this package, and what its own metadata requires."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    try:
        requirements = [Requirement(line) for line in requires("langchain-cope") or []]
        yield Finding("langchain-cope", version("langchain-cope"))
    except PackageNotFoundError:
        yield Finding("langchain-cope", "not installed", False, "pip install langchain-cope")
        return
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement)


def _package(requirement: "Requirement") -> Finding:
    from importlib.metadata import PackageNotFoundError, version

    advice = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return Finding(requirement.name, "not installed", False, advice)
    if requirement.specifier.contains(installed, prereleases=True):
        return Finding(requirement.name, installed, True, advice)
    text = f"{installed}, needed {requirement.specifier}"
    return Finding(requirement.name, text, False, advice)


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        advice = "install torch anew, for this machine"
        yield Finding("device", f"torch cannot be imported: {error}", False, advice)
        return
    threads = plural(torch.get_num_threads(), "thread")
    yield Finding("cpu", f"{_cpu_name()}, {threads}, {_bfloat16()}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(f"cuda:{index}", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB")
    if torch.backends.mps.is_available():
        yield Finding("mps", platform.processor())


def _cpu_name() -> str:
    try:
        lines = _CPU_FACTS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _bfloat16() -> str:
    """Say whether the CPU computes in bfloat16 itself."""
    try:
        facts = _CPU_FACTS.read_text(encoding="utf-8")
    except OSError:
        return "bfloat16 unknown"
    flags = sorted({word for word in facts.split() if "bf16" in word})
    if flags:
        return f"bfloat16 in hardware ({', '.join(flags)})"
    return "no bfloat16 in hardware: models compute in float32"


def _smollm2() -> Finding:
    """Check that the file of the default base is there, and what it is read with."""
    from langchain_cope.engine import SMOLLM2_INSTALL, smollm2_file
    from langchain_cope.errors import ModelNotFound

    try:
        path = smollm2_file()
    except ModelNotFound:
        advice = f"{SMOLLM2_INSTALL} gguf"
        return Finding("smollm2", "not installed", False, advice, needed=False)
    if find_spec("gguf") is None:
        advice = "pip install gguf"
        return Finding("smollm2", "there, but gguf is not installed", False, advice, needed=False)
    return Finding("smollm2", f"the default base, {path.stat().st_size / 1e6:.0f} MB")


def _starter() -> Finding:
    """Check that the bundled base is whole."""
    spec = find_spec("langchain_cope")
    folder = Path(spec.origin or "").parent / "starter" if spec else Path("starter")
    weights = folder / "model.safetensors"
    num_bytes = weights.stat().st_size if weights.is_file() else 0
    if num_bytes < _WEIGHTS_BYTES or not (folder / "config.json").is_file():
        advice = "install langchain-cope anew"
        return Finding("starter", f"incomplete in {folder}", False, advice, needed=False)
    return Finding("starter", f"the bundled base, {num_bytes / 1e6:.0f} MB")


def _store(url: str | None) -> Iterator[Finding]:
    """Check that the store can be opened, read and written, and has space."""
    from adapter_store.errors import AdapterStoreError

    origin = _origin(url)
    try:
        store = store_at(url)
        problems: list[AdapterStoreError] = []
        users, next_cursor = store.list_users(on_problem=problems.append)
    except AdapterStoreError as error:
        yield Finding("store", f"cannot be read ({origin})", False, str(error))
        return
    count = plural(len(users), "user")
    if next_cursor is not None:
        count = f"more than {len(users)} users"
    yield Finding("store", f"{location_of(store)} ({origin}), {count}")
    if problems:
        advice = f"cope-lc adapters verify; {problems[0]}"
        yield Finding("users", f"{len(problems)} cannot be read", False, advice)
    folder = local_folder(store)
    if folder is not None:
        yield _writable(folder, "store", "--store or COPE_STORE")
        yield _space(folder)
    cache = os.environ.get("COPE_STORE_CACHE")
    if cache:
        yield _writable(Path(cache).expanduser(), "cache", "COPE_STORE_CACHE")


def _origin(url: str | None) -> str:
    """Return the setting that chose the store."""
    if url:
        return "--store"
    return "COPE_STORE" if os.environ.get("COPE_STORE") else "the default"


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _writable(folder: Path, what: str, setting: str) -> Finding:
    """Write into the folder, or where it would be created, and leave nothing there."""
    from tempfile import TemporaryFile  # slow to import

    existing = _existing(folder)
    try:
        with TemporaryFile(dir=existing):
            pass
    except OSError as error:
        advice = f"give this user access, or choose another {what} with {setting}"
        return Finding(f"{what} writable", f"no: {existing}: {error.strerror}", False, advice)
    text = "yes" if existing == folder else f"yes; it is created in {existing} when needed"
    return Finding(f"{what} writable", text)


def _space(folder: Path) -> Finding:
    num_bytes = shutil.disk_usage(_existing(folder)).free
    text = f"{num_bytes / 1e9:.1f} GB free at the store"
    return Finding("disk", text, num_bytes >= LITTLE_SPACE, "free some space", needed=False)
