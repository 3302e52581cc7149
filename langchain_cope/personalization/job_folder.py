"""The folder in which one personalization does its work, so that after a crash it goes on from the last finished stage.

A job folder belongs to one user and one input: ``job.json`` holds the input's digest, and where that differs the folder is emptied
and the job starts anew. It holds what the user wrote (negatives, the evaluation's texts), readable by its owner alone, and
is removed when the job is done.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from langchain_cope.errors import InputError
from langchain_cope.training.atomic_files import read_json, write_json
from langchain_cope.training.recipe import Recipe

if TYPE_CHECKING:
    from langchain_cope.training.encode import Example

FORMAT = 1  # of what the stages leave behind; another one starts anew
FACTS = "job.json"
STAGES = {"sft": "sft", "negatives.json": "negatives", "dpo": "dpo", "evaluation.json": "evaluate"}


@dataclass(frozen=True)
class Job:
    """One personalization's folder."""

    folder: Path
    key: str | None = None
    """Names the job to the store: what was published under it was published by this very job. None: it cannot be resumed."""

    def finished(self) -> list[str]:
        """The stages whose work is there, in order."""
        return [stage for name, stage in STAGES.items() if (self.folder / name).exists()]


def digest_of(
    base: Mapping[str, str],
    recipe: Recipe,
    trained: "Sequence[Example]",
    judged: "Sequence[Example]",
) -> str:
    """sha256 over all that the stages' work depends on: base, recipe, what is trained on and what is judged by."""
    examples = [[asdict(example) for example in examples] for examples in (trained, judged)]
    whole = json.dumps([FORMAT, dict(base), recipe.as_dict(), *examples], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


@contextmanager
def passing_job() -> Iterator[Job]:
    """A job in a temporary folder, which is gone afterwards whatever happened."""
    with tempfile.TemporaryDirectory(prefix="cope-") as folder:
        yield Job(Path(folder))


@contextmanager
def kept_job(job_dir: str | os.PathLike[str], user_id: str, digest: str) -> Iterator[Job]:
    """The user's job below ``job_dir``; where the block raises, what its stages finished stays.

    Raises ``InputError`` where the folder cannot be written, and while another process works on this user's job.
    """
    # Not the id itself: it is no name of a file, and the folder's listing need not tell who is trained.
    name = hashlib.sha256(user_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    folder = Path(job_dir).expanduser() / name
    lock = _locked(folder)
    try:
        yield _opened(folder, digest)
        (
            folder / FACTS
        ).unlink()  # first: what is left of a folder without it is never gone on with
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)  # which unlocks it, as the end of a killed process does


def _locked(folder: Path) -> int:
    """Make the folder, for its owner alone, and lock it; the descriptor holds the lock."""
    import fcntl  # POSIX alone has it, and only this needs it

    while True:
        try:
            folder.mkdir(0o700, parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another process was done with it just now
        except OSError as error:
            raise InputError(
                f"job_dir: cannot use {folder} ({error.strerror}): name a folder that can be written"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(
                f"job_dir: another process works on {folder}: wait for it, or give each its own job_dir"
            ) from None
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _opened(folder: Path, digest: str) -> Job:
    facts = folder / FACTS
    kept = read_json(facts) if facts.exists() else {}
    resumed = kept.get("digest") == digest
    if not resumed:
        facts.unlink(missing_ok=True)
    for path in folder.iterdir():
        if (
            path.name.startswith(".") or not resumed
        ):  # left by a process that was killed, or of another input
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not resumed:
        kept = {"digest": digest, "key": os.urandom(16).hex()}
        write_json(facts, kept)
    return Job(folder, kept["key"])
