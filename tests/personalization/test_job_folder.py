"""A personalization with a job folder goes on where it was stopped or killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from personal import FOUR_STEPS, ROWS, Recorder

from adapter_store import AdapterStore
from langchain_cope import PersonalizeUser
from langchain_cope.atomic_files import atomic_folder, write_json
from langchain_cope.errors import InputError
from langchain_cope.evaluation.ways import WAYS, Way
from langchain_cope.personalization import job_folder
from langchain_cope.personalization.job_folder import resumable_job
from langchain_cope.training.progress import Stage

REQUEST = {"user_id": "alice", "history": ROWS}
ALL = [stage.value for stage in Stage]

# Personalizes alice, telling each step; where told to it waits to be killed.
CHILD = """
import json, sys, time
from langchain_core.callbacks import BaseCallbackHandler
from langchain_cope import PersonalizeUser
from personal import FOUR_STEPS

asked = json.load(sys.stdin)

def told(line):
    print(line, flush=True)
    if line == asked["wait_at"]:
        time.sleep(600)

class Teller(BaseCallbackHandler):
    run_inline = True
    stages = {}
    def on_chain_start(self, serialized, inputs, *, run_id, name=None, **_):
        self.stages[run_id] = name
    def on_chain_end(self, outputs, *, run_id, **_):
        told(f"{self.stages[run_id]} ended")
    def on_custom_event(self, name, data, **_):
        told(f"{data['stage']} {data['step']}")

settings = {key: asked[key] for key in ("model", "store", "job_dir")}
PersonalizeUser(recipe=FOUR_STEPS, **settings).invoke(asked["request"], {"callbacks": [Teller()]})
"""


@pytest.fixture
def personalize(base: Path, store_folder: Path, tmp_path: Path) -> PersonalizeUser:
    return PersonalizeUser(
        model=str(base), store=str(store_folder), recipe=FOUR_STEPS, job_dir=str(tmp_path / "jobs")
    )


def killed_at(moment: str, personalize: PersonalizeUser) -> list[str]:
    """Personalize alice in a process, kill it at that moment, and return what it had told."""
    asked = {"wait_at": moment, "request": REQUEST}
    asked |= {key: getattr(personalize, key) for key in ("model", "store", "job_dir")}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        json.dump(asked, child.stdin)
        child.stdin.close()
        told = []
        for line in child.stdout:
            told.append(line.strip())
            if told[-1] == moment:
                child.kill()
    assert child.returncode == -signal.SIGKILL
    return told


def job_files(personalize: PersonalizeUser) -> dict[str, tuple[int, int]]:
    """Inode and time of each finished file: another one, or the same written again, differs."""
    (job,) = Path(str(personalize.job_dir)).iterdir()
    files = {}
    for path in job.rglob("*"):
        if path.is_file() and not path.parent.name.startswith("."):
            stat = path.stat()
            files[str(path.relative_to(job))] = (stat.st_ino, stat.st_mtime_ns)
    return files


def invoke(personalize: PersonalizeUser, request: Any = REQUEST) -> tuple[Any, Recorder]:
    recorder = Recorder()
    return personalize.invoke(request, {"callbacks": [recorder]}), recorder


def test_killed_in_dpo_it_goes_on_to_the_same_adapter(
    personalize: PersonalizeUser, tmp_path: Path
) -> None:
    told = killed_at("dpo 2", personalize)
    assert "sft ended" in told
    assert "dpo ended" not in told
    store = AdapterStore(personalize.store)
    assert store.active("alice") is None
    before = job_files(personalize)
    assert set(before) == {
        "first_sight.json",
        "job.json",
        "sft/adapter_model.safetensors",
        "sft/adapter_config.json",
        "negatives.json",
    }
    at_dpo: dict[str, tuple[int, int]] = {}

    class AtDpo(Recorder):
        def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
            super().on_custom_event(name, data)
            at_dpo.update(job_files(personalize))

    recorder = AtDpo()
    result = personalize.invoke(REQUEST, {"callbacks": [recorder]})
    assert recorder.stages == ["history", "load", "dpo", "evaluate", "strength", "publish"]
    assert {name: at_dpo[name] for name in before} == before
    assert result.published
    assert set(result.timings) == set(recorder.stages)
    assert result.notes[-1] == "done before and not run again: sft, negatives"
    assert list(Path(str(personalize.job_dir)).iterdir()) == []

    other = AdapterStore(tmp_path / "never interrupted")
    whole, _ = invoke(personalize.model_copy(update={"store": other, "job_dir": None}))
    assert store.fetch(store.resolve("alice")) == other.fetch(other.resolve("alice"))
    assert whole.metrics == result.metrics


def test_killed_just_after_the_publish_it_is_not_published_twice(
    personalize: PersonalizeUser,
) -> None:
    killed_at("publish ended", personalize)
    store = AdapterStore(personalize.store)
    version = store.active("alice")
    assert version is not None
    result, recorder = invoke(personalize)
    assert recorder.stages == ["history", "load", "publish"]
    assert (result.published, result.version) == (True, version)
    assert "just before the job was interrupted" in result.reason
    assert len(result.samples) == 2
    assert [live.version for live in store.versions("alice")] == [version]
    again, recorder = invoke(personalize)  # that job is done: this is another
    assert recorder.stages == ALL
    assert not again.published


@pytest.fixture
def stopped(personalize: PersonalizeUser, monkeypatch: pytest.MonkeyPatch) -> PersonalizeUser:
    """A `PersonalizeUser` of which the first run failed in DPO."""

    def broken(*_: Any) -> None:
        raise RuntimeError("the disk burnt")

    with monkeypatch.context() as patch:
        patch.setattr("langchain_cope.training.dpo.train_dpo", broken)
        with pytest.raises(RuntimeError, match="the disk burnt"):
            personalize.invoke(REQUEST)
    assert "negatives.json" in job_files(personalize)
    return personalize


def test_after_a_failure_it_goes_on_too(stopped: PersonalizeUser) -> None:
    assert invoke(stopped)[1].stages == [
        "history",
        "load",
        "dpo",
        "evaluate",
        "strength",
        "publish",
    ]


CHANGES = ["history", "held out", "recipe", "base", "ways", "format"]


@pytest.mark.parametrize("change", CHANGES)
def test_another_input_starts_anew(
    stopped: PersonalizeUser,
    tiny: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    rows, changed = ROWS, stopped
    if change == "history":
        rows = [{**ROWS[0], "completion": "Another text"}, *ROWS[1:]]
    elif change == "held out":
        rows = [*ROWS[:-1], {**ROWS[-1], "completion": "Another text"}]
    elif change == "recipe":
        changed = stopped.model_copy(update={"recipe": replace(FOUR_STEPS, seed=1)})
    elif change == "ways":
        monkeypatch.setattr(job_folder, "WAYS", [*WAYS, Way("later")])
    elif change == "format":
        monkeypatch.setattr(job_folder, "FORMAT", job_folder.FORMAT + 1)
    else:
        other = tiny("llama", initializer_range=0.05, seed=1)
        changed = stopped.model_copy(update={"model": str(other)})
    result, recorder = invoke(changed, {"user_id": "alice", "history": rows})
    assert recorder.stages == ALL
    assert not [note for note in result.notes if "done before" in note]
    assert list(Path(str(stopped.job_dir)).iterdir()) == []


def test_another_users_job_is_left_alone(stopped: PersonalizeUser) -> None:
    before = job_files(stopped)
    assert invoke(stopped, {"user_id": "../../alice", "history": ROWS})[1].stages == ALL
    assert job_files(stopped) == before


def test_unfinished_work_of_a_killed_process_is_cleared_away(stopped: PersonalizeUser) -> None:
    (job,) = Path(str(stopped.job_dir)).iterdir()
    (job / ".half" / "sft").mkdir(parents=True)
    (job / ".negatives.json").write_text('{"pairs": [')
    seen: list[str] = []

    class Look(Recorder):
        def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
            seen.extend(path.name for path in job.iterdir())

    stopped.invoke(REQUEST, {"callbacks": [Look()]})
    assert ".half" not in seen
    assert ".negatives.json" not in seen


def test_a_job_folder_is_private(stopped: PersonalizeUser) -> None:
    (job,) = Path(str(stopped.job_dir)).iterdir()
    assert job.stat().st_mode & 0o777 == 0o700
    assert "alice" not in job.name


def test_two_processes_do_not_work_on_one_job(personalize: PersonalizeUser) -> None:
    with (
        resumable_job(str(personalize.job_dir), "alice", "digest"),
        pytest.raises(InputError, match="another process works on"),
    ):
        personalize.invoke(REQUEST)
    assert personalize.invoke(REQUEST).published


def test_a_job_folder_that_cannot_be_written_is_refused_before_training(
    personalize: PersonalizeUser, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    recorder = Recorder()
    impossible = personalize.model_copy(update={"job_dir": tmp_path / "file"})
    with pytest.raises(InputError, match="job_dir: cannot use"):
        impossible.invoke(REQUEST, {"callbacks": [recorder]})
    assert recorder.stages == ["history", "load"]


def test_what_fails_half_way_leaves_nothing_under_its_name(tmp_path: Path) -> None:
    def half() -> None:
        with atomic_folder(tmp_path / "folder") as unfinished:
            (unfinished / "file").write_text("half")
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        half()
    with pytest.raises(TypeError):
        write_json(tmp_path / "facts.json", {"not": object()})
    assert list(tmp_path.iterdir()) == []
