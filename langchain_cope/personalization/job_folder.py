"""The folder in which one personalization works, so that it can go on after a crash.

It goes on after the last finished stage. A job folder belongs to one user and one input: `job.json`
holds the input's digest, and where that differs the folder is emptied and the job starts anew. It
holds what the user wrote (negatives, the evaluation's texts), readable by its owner alone, and is
removed when the job is done. What was trained is never lost to a failure after it: where nobody
named a folder, the temporary one stays then, and the error says where.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapter_store.errors import UserErasedError
from langchain_cope.atomic_files import read_json, write_json
from langchain_cope.errors import Cancelled, InputError
from langchain_cope.evaluation.ways import WAYS
from langchain_cope.history.items import Item
from langchain_cope.training.progress import Stage
from langchain_cope.training.recipe import Recipe

FORMAT = 4  # of what the stages leave; a job in another one starts anew
FACTS = "job.json"


@dataclass(frozen=True)
class Job:
    """One personalization's folder."""

    folder: Path
    key: str
    """Names the job to the store: a version published under it came of this very job."""

    def finished_stages(self) -> list[Stage]:
        """Return the stages that have left their work in the folder, in order."""
        return [stage for stage in Stage if stage.file and (self.folder / stage.file).exists()]


def input_digest(
    base: Mapping[str, str], recipe: Recipe, trained: Sequence[Item], held_out: Sequence[Item]
) -> str:
    """Return a sha256 over all that the stages' work depends on.

    That is the base, the recipe, what is trained on, what is judged by, and the ways that are
    compared.
    """
    ways = [way.name for way in WAYS]
    parts = [FORMAT, dict(base), recipe.as_dict(), ways, _texts(trained), _texts(held_out)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _texts(items: Sequence[Item]) -> list[list[object]]:
    return [[item.messages, item.completion, item.rejected] for item in items]


@contextmanager
def temporary_job(user_id: str, digest: str) -> Iterator[Job]:
    """Yield a job in a temporary folder, which is removed after the block.

    It stays where the block fails after a stage has finished, as the error's note then says; but
    not after a cancel, nor where the user was erased meanwhile.
    """
    job_dir = tempfile.mkdtemp(prefix="cope-")
    stays = False
    try:
        with resumable_job(job_dir, user_id, digest) as job:
            try:
                yield job
            except Exception as error:
                stays = _is_worth_going_on(job, error)
                raise
    finally:
        if not stays:
            shutil.rmtree(job_dir, ignore_errors=True)


@contextmanager
def resumable_job(job_dir: str | os.PathLike[str], user_id: str, digest: str) -> Iterator[Job]:
    """Yield the user's job below `job_dir`; where the block raises, what its stages finished stays.

    Of a user who was erased meanwhile nothing stays. Else the error has a note, which says how to
    go on. Raises `InputError` where the folder cannot be written, and while another process works
    on this user's job.
    """
    folder = _folder(job_dir, user_id)
    lock = _locked(folder)
    try:
        job = _open_job(folder, digest)
        try:
            yield job
        except Exception as error:
            if _is_worth_going_on(job, error):
                error.add_note(_how_to_go_on(job, job_dir))
            raise
        # The facts first: what is left of a folder without them is never resumed.
        (folder / FACTS).unlink()
        shutil.rmtree(folder, ignore_errors=True)
    except UserErasedError:
        shutil.rmtree(folder)
        raise
    finally:
        os.close(lock)  # which unlocks it, as the end of a killed process does


def remove_job(job_dir: str | os.PathLike[str], user_id: str) -> bool:
    """Remove what an unfinished run left of the user below `job_dir`; return whether there was any.

    Raises `InputError` while another process works on it, OSError where it cannot be removed.
    """
    folder = _folder(job_dir, user_id)
    if not folder.exists():
        return False
    lock = _locked(folder)
    try:
        shutil.rmtree(folder)
    finally:
        os.close(lock)
    return True


def _folder(job_dir: str | os.PathLike[str], user_id: str) -> Path:
    # Not the id itself, which may hold any character; and the folder's listing need not tell
    # which users are trained.
    name = hashlib.sha256(user_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return Path(job_dir).expanduser() / name


def _is_worth_going_on(job: Job, error: Exception) -> bool:
    """Return whether a stage had finished, and nobody wanted the end."""
    return bool(job.finished_stages()) and not isinstance(error, Cancelled | UserErasedError)


def _how_to_go_on(job: Job, job_dir: str | os.PathLike[str]) -> str:
    return (
        f"what was done before it is kept ({', '.join(job.finished_stages())}): the same again "
        f"with job_dir={os.fspath(job_dir)!r} (--job-dir) goes on after that; "
        "or delete that folder, which holds texts of the user"
    )


def _locked(folder: Path) -> int:
    """Make the folder, for its owner alone, and lock it; the descriptor returned holds the lock."""
    import fcntl  # POSIX alone has it, and only this needs it

    while True:
        try:
            folder.mkdir(0o700, parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another process was done with it just now
        except OSError as error:
            raise InputError(
                f"job_dir: cannot use {folder} ({error.strerror}): "
                "name a folder that can be written"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(
                f"job_dir: another process works on {folder}: "
                "wait for it, or give each its own job_dir"
            ) from None
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _open_job(folder: Path, digest: str) -> Job:
    facts_file = folder / FACTS
    facts = read_json(facts_file) if facts_file.exists() else {}
    is_same = facts.get("digest") == digest
    if not is_same:
        facts_file.unlink(missing_ok=True)
    for path in folder.iterdir():
        # Left by a process that was killed, or of another input.
        if path.name.startswith(".") or not is_same:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not is_same:
        facts = {"digest": digest, "key": os.urandom(16).hex()}
        write_json(facts_file, facts)
    return Job(folder, facts["key"])
