"""What stands around a training, and is none of its business, neither stops nor changes it.

No home folder and a user without a name, a launcher's leftovers, a network.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from personal import QUICK, ROWS, Recorder
from training.tiny import make_item

from adapter_store import AdapterStore
from langchain_cope import PersonalizeUser
from langchain_cope.engine import Base, load_base
from langchain_cope.training import sft
from langchain_cope.training.encode import Encoded, fit
from langchain_cope.training.launchers import launchers_hidden
from langchain_cope.training.progress import Monitor, Stage

LAUNCHERS = {
    "torchrun": {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    },
    "another rank": {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "gone"},
    "accelerate": {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_TORCH_DEVICE": "meta",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_SHARDING_STRATEGY": "1",
    },
    "accelerate with parallelism": {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
    "DeepSpeed": {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cuda", "LOCAL_RANK": "0"},
    "Megatron": {"ACCELERATE_USE_MEGATRON_LM": "true", "MEGATRON_LM_TP_DEGREE": "2"},
    "Open MPI": {
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    },
    "Intel MPI": {"PMI_SIZE": "2", "PMI_RANK": "0", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"},
    "MVAPICH": {"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "0"},
    "Slurm": {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "RANK": "1"},
    "SageMaker": {"ACCELERATE_USE_SAGEMAKER": "true", "SM_HP_MP_PARAMETERS": '{"partitions": 2}'},
    "a notebook": {"FORK_LAUNCHED": "1", "ACCELERATE_USE_CPU": "true"},
}


def examples(loaded: Base) -> list[Encoded]:
    return fit(loaded, [make_item(number) for number in range(3)], 256, 100)[0]


@pytest.fixture
def leftovers(request: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    variables: dict[str, str] = LAUNCHERS[request.param]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


@pytest.mark.parametrize("leftovers", LAUNCHERS, indirect=True)
def test_a_launchers_leftovers_do_not_reach_the_trainer(
    leftovers: dict[str, str], base: Path, tmp_path: Path
) -> None:
    before = dict(os.environ)
    loaded = load_base(base)
    with launchers_hidden():
        trainer = sft.sft_trainer(loaded, examples(loaded), QUICK, str(tmp_path))
        seen = [
            trainer.args.world_size,
            trainer.args.process_index,
            trainer.args.gradient_accumulation_steps,
            trainer.accelerator.num_processes,
            trainer.accelerator.device.type,
            trainer.accelerator.distributed_type.value,
            trainer.accelerator.mixed_precision,
            trainer.accelerator.gradient_accumulation_steps,
            trainer.accelerator.state.dynamo_plugin.backend.value,
        ]
    assert seen == [1, 0, 1, 1, "cpu", "NO", "no", 1, "NO"]
    assert not torch.distributed.is_initialized()
    assert dict(os.environ) == before


def test_an_apps_own_accelerate_is_as_it_was_after_a_training(base: Path, tmp_path: Path) -> None:
    of_app = PartialState(cpu=True)
    of_app.num_processes = 3
    monitor = Monitor()
    try:
        with monitor.stage(Stage.SFT):
            loaded = load_base(base)
            sft.train_sft(loaded, examples(loaded), QUICK, tmp_path / "sft", monitor)
        assert PartialState().num_processes == 3
    finally:
        PartialState._reset_state()


# Personalizes alice and chats, with a history in Chroma; tells what it tried to reach.
CHILD = """
import ipaddress, json, pwd, socket, sys
import huggingface_hub.constants  # loaded before us, as in many apps

def nobody(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = nobody
reached = []

def is_outside(address):
    if not isinstance(address, tuple):
        return False  # a Unix socket
    try:
        return not ipaddress.ip_address(address[0]).is_loopback
    except ValueError:
        return address[0] not in ("localhost", None)

def watched(real, address_of):
    def call(*arguments, **options):
        if is_outside(address_of(arguments)):
            reached.append(str(address_of(arguments)))
            raise OSError("no network here")
        return real(*arguments, **options)
    return call

socket.socket.connect = watched(socket.socket.connect, lambda given: given[1])
socket.socket.connect_ex = watched(socket.socket.connect_ex, lambda given: given[1])
socket.getaddrinfo = watched(socket.getaddrinfo, lambda given: (given[0],))

from langchain_cope import ChatCoPe, ChromaHistory, PersonalizeUser
from personal import QUICK

asked = json.load(sys.stdin)
history = ChromaHistory(asked["chroma"])
history.add("alice", asked["rows"])
settings = {"model": asked["model"], "store": asked["store"]}
personalize = PersonalizeUser(recipe=QUICK, history=history, **settings)
result = personalize.invoke({"user_id": "alice"})
answer = ChatCoPe(user_id="alice", max_tokens=4, **settings).invoke("Headline?").content
told = {"reached": reached, "answer": answer, **result.model_dump(mode="json")}
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A training in ordinary surroundings: its result and its files."""
    folder = tmp_path_factory.mktemp("ordinary")
    personalize = PersonalizeUser(model=str(base), store=str(folder), recipe=QUICK)
    return personalize.invoke({"user_id": "alice", "history": ROWS}), files_in(folder)


@pytest.fixture(scope="module")
def told(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same in a process in odd ones: what it told, and its files."""
    folder = tmp_path_factory.mktemp("odd")
    ours = ("HOME", "CI", "LOGNAME", "USER", "XDG_CACHE_HOME", "XDG_DATA_HOME", "NLTK_DATA")
    telemetry = ("HF_HUB_OFFLINE", "ANONYMIZED_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")
    environment = {k: v for k, v in os.environ.items() if k not in (*ours, *telemetry)}
    for variables in LAUNCHERS.values():
        environment |= variables
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    locations = {"model": base, "store": folder / "store", "chroma": folder / "chroma"}
    asked = {"rows": ROWS, **{name: str(path) for name, path in locations.items()}}
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout), files_in(folder / "store")


def files_in(folder: Path) -> Any:
    store = AdapterStore(folder)
    return store.fetch(store.resolve("alice"))


def test_in_odd_surroundings_the_same_adapter_is_trained(told: Any, whole: Any) -> None:
    result, files = told
    assert files == whole[1]
    assert result["answer"]
    assert result["metrics"] == whole[0].metrics  # ROUGE too: a home is made up for its import
    assert not [note for note in result["notes"] if "ROUGE" in note]


def test_training_chat_and_history_reach_nothing_outside(told: Any) -> None:
    assert told[0]["reached"] == []


def test_a_score_that_cannot_be_had_is_a_note(
    personalize: PersonalizeUser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "langchain_cope.evaluation.rouge", None)
    result = personalize.invoke({"user_id": "alice", "history": ROWS})
    assert result.published
    assert result.notes[-1].startswith("ROUGE could not be computed (ModuleNotFoundError: ")
    assert result.metrics.keys() == {"base", "sft", "dpo", "cope"}
    assert set(result.metrics["dpo"]) == {"nll"}
    assert result.metrics["cope"] == {}
    assert len(result.samples) == 2


FAILURES = [RuntimeError("the device is gone"), MemoryError()]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_no_adapter_is_lost_to_its_evaluation(
    personalize: PersonalizeUser, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failure: Any
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def broken(*_: Any) -> None:
        raise failure

    request = {"user_id": "alice", "history": ROWS}
    with monkeypatch.context() as patch:
        patch.setattr("langchain_cope.evaluation.evaluate._generate", broken)
        with pytest.raises(type(failure)) as caught:
            personalize.invoke(request)
    (note,) = caught.value.__notes__
    (job_dir,) = tmp_path.glob("cope-*")
    assert note == (
        "what was done before it is kept (sft, negatives, dpo): the same again with "
        f"job_dir='{job_dir}' (--job-dir) goes on after that; "
        "or delete that folder, which holds texts of the user"
    )
    recorder = Recorder()
    again = personalize.model_copy(update={"job_dir": job_dir})
    assert again.invoke(request, {"callbacks": [recorder]}).published
    assert recorder.stages == ["history", "load", "evaluate", "strength", "publish"]
