"""The task adapter on a tiny base: what it learns, from whom, and when it is refused."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from langchain_core.runnables import RunnableLambda
from personal import QUICK, ROWS, Recorder
from safetensors.torch import load_file
from training.tiny import Heard

from adapter_store import AdapterStore
from adapter_store.errors import BaseModelMismatchError
from langchain_cope import ChatCoPe, PersonalizeUser, TrainTaskAdapter
from langchain_cope.engine import WEIGHTS, Engine, load_base
from langchain_cope.errors import Cancelled, HistoryError, InputError
from langchain_cope.history.items import Item, UserHistory
from langchain_cope.personalization.task_adapter import count_known, train_task_adapter
from langchain_cope.training.recipe import SFT, Recipe

RECIPE = Recipe(sft=SFT(learning_rate=2e-2, epochs=3, batch_size=8, rank=4, lora_alpha=8))
LEARNS_NOTHING = Recipe(sft=SFT(learning_rate=1e-15))


def user(name: str, *, shareable: bool = True, num_items: int = 6) -> UserHistory:
    items = [
        Item(prompt=f"Say {number}.", completion=f"{number} it is, says {name}.")
        for number in range(num_items)
    ]
    return UserHistory(user_id=name, items=items, shareable=shareable)


@pytest.fixture
def engine(tiny: Callable[..., Path]) -> Engine:
    return Engine.of(load_base(tiny(), device="cpu"))


def test_it_learns_the_task_and_serves_as_a_base(
    engine: Engine, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    users = [user("anna"), user("bert"), user("carl", num_items=3)]
    result = train_task_adapter(engine, users, tmp_path / "task", recipe=RECIPE)
    assert result.nll["task"] < result.nll["base"]
    assert (result.users_better, result.num_judged, result.num_users) == (2, 2, 3)
    assert (result.num_trained, result.num_held_out) == (4 + 4 + 3, 2 + 2)
    assert result.folder == str(tmp_path / "task")
    base = load_base(tiny(), device="cpu", task_adapter=result.folder)
    assert base.fingerprint()["task_adapter"] != "none"
    with pytest.raises(InputError, match="has a task adapter already"):
        train_task_adapter(Engine.of(base), users, tmp_path / "another", recipe=RECIPE)


def test_its_folder_knows_what_it_was_trained_on(engine: Engine, tmp_path: Path) -> None:
    users = [user("anna"), user("bert")]
    train_task_adapter(engine, users, tmp_path / "task", recipe=RECIPE)
    assert count_known(tmp_path / "task", users[0].items) == 4
    assert count_known(tmp_path / "task", user("carl").items) == 0
    assert count_known(tmp_path, users[0].items) == 0


def test_a_version_says_which_task_adapter_it_needs(
    engine: Engine, tiny: Callable[..., Path], tmp_path: Path, store_folder: Path
) -> None:
    train_task_adapter(engine, [user("anna"), user("bert")], tmp_path / "task", recipe=RECIPE)
    personalize = PersonalizeUser(
        model=str(tiny()),
        task_adapter=str(tmp_path / "task"),
        store=store_folder,
        recipe=QUICK,
        gate="always",
    )
    personalize.invoke({"user_id": "alice", "history": ROWS})
    store = AdapterStore(store_folder)
    (version,) = store.versions("alice")
    assert version.metadata["task_adapter"] == "task"
    with pytest.raises(BaseModelMismatchError, match="with the task adapter 'task'"):
        store.resolve("alice", base=engine.base.fingerprint())
    words = {"model": str(tiny()), "store": store_folder, "user_id": "alice", "device": "cpu"}
    with pytest.raises(BaseModelMismatchError, match="--task-adapter"):
        ChatCoPe(**words, max_tokens=4).invoke("Hi")
    answer = ChatCoPe(**words, max_tokens=4, task_adapter=str(tmp_path / "task")).invoke("Hi")
    assert answer.response_metadata["adapter_version"] == version.version


def test_a_version_without_a_task_adapter_says_so(
    engine: Engine, tiny: Callable[..., Path], adapter: Callable[..., Path], store_folder: Path
) -> None:
    store = AdapterStore(store_folder)
    store.publish("alice", adapter(tiny()), base=engine.base.fingerprint())
    tasked = load_base(tiny(), device="cpu", task_adapter=adapter(tiny(), seed=3))
    with pytest.raises(BaseModelMismatchError, match="the base without a task adapter"):
        store.resolve("alice", base=tasked.fingerprint())


def test_it_is_a_runnable(tiny: Callable[..., Path], tmp_path: Path) -> None:
    train = TrainTaskAdapter(model=str(tiny()), device="cpu", recipe=RECIPE)
    row = {"user_id": "anna", "shareable": True, "history": user("anna").model_dump()["items"]}
    recorder = Recorder()
    chain = RunnableLambda(lambda users: {"users": users, "folder": tmp_path / "task"}) | train
    result = chain.invoke([row, user("bert")], {"callbacks": [recorder]})
    assert (result.folder, result.num_users) == (str(tmp_path / "task"), 2)
    assert {"num_users": 2, "num_items": 12} in recorder.inputs
    assert {event["stage"] for event in recorder.progress} == {"sft", "evaluate"}
    assert "says anna" not in str(recorder.inputs[-1]) + str(recorder.outputs[1])
    assert (tmp_path / "task" / WEIGHTS).is_file()


def test_a_runnable_stops_and_refuses(tiny: Callable[..., Path], tmp_path: Path) -> None:
    train = TrainTaskAdapter(model=str(tiny()), device="cpu", recipe=RECIPE)
    stopped = threading.Event()
    stopped.set()
    request = {"users": [user("anna"), user("bert")], "folder": tmp_path / "task"}
    with pytest.raises(Cancelled):
        train.invoke(request, stop_event=stopped)
    with pytest.raises(InputError, match=r"takes users and folder \(folder: Field required"):
        train.invoke({"users": []})
    broken = {"user_id": "carl", "history": [{"prompt": 3}]}
    with pytest.raises(HistoryError, match=r"^users\[1\]: history\[0\]"):
        train.invoke({"users": [user("anna"), broken], "folder": tmp_path / "task"})
    assert not list(tmp_path.iterdir())


def test_only_those_who_agreed_are_trained_on(engine: Engine, tmp_path: Path) -> None:
    agreed, other = [user("anna"), user("bert")], user("carl", shareable=False)
    with_other = train_task_adapter(engine, [*agreed, other], tmp_path / "a", recipe=RECIPE)
    train_task_adapter(engine, agreed, tmp_path / "b", recipe=RECIPE)
    weights, expected = (load_file(tmp_path / name / WEIGHTS) for name in ("a", "b"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert with_other.notes == ["1 user left out: not shareable"]
    everybody = train_task_adapter(
        engine, [*agreed, other], tmp_path / "c", recipe=RECIPE, all_shareable=True
    )
    assert everybody.num_users == 3


def test_one_user_is_no_task(engine: Engine, tmp_path: Path) -> None:
    users = [user("anna"), user("bert", shareable=False)]
    with pytest.raises(HistoryError, match=r'1 of 2 users can be used.*"shareable": true'):
        train_task_adapter(engine, users, tmp_path / "task")


def test_without_held_out_items_it_is_not_trained(engine: Engine, tmp_path: Path) -> None:
    users = [user(name, num_items=4) for name in ("anna", "bert")]
    with pytest.raises(HistoryError, match="no user has 5 items or more"):
        train_task_adapter(engine, users, tmp_path / "task")


def test_one_that_is_not_better_is_refused(engine: Engine, tmp_path: Path) -> None:
    users = [user("anna"), user("bert")]
    refused = train_task_adapter(engine, users, tmp_path / "task", recipe=LEARNS_NOTHING)
    assert refused.folder is None
    assert refused.reason.startswith("not better, not kept: held-out NLL ")
    assert not list(tmp_path.iterdir())
    kept = train_task_adapter(engine, users, tmp_path / "task", recipe=LEARNS_NOTHING, always=True)
    assert kept.folder == str(tmp_path / "task")
    assert (tmp_path / "task" / WEIGHTS).is_file()


def test_a_folder_that_is_there_is_left_alone(engine: Engine, tmp_path: Path) -> None:
    users = [user("anna"), user("bert")]
    with pytest.raises(InputError, match="is there already: name a new folder"):
        train_task_adapter(engine, users, tmp_path)
    with pytest.raises(InputError, match="there is no folder"):
        train_task_adapter(engine, users, tmp_path / "no" / "task")


def test_a_stop_leaves_nothing_behind(engine: Engine, tmp_path: Path) -> None:
    monitor = Heard(stop=lambda steps: len(steps) >= 2)
    users = [user("anna"), user("bert")]
    with pytest.raises(Cancelled):
        train_task_adapter(engine, users, tmp_path / "task", recipe=RECIPE, monitor=monitor)
    assert not list(tmp_path.iterdir())
