"""PersonalizeUser on tiny real bases: really trained, really published."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.callbacks import BaseCallbackHandler
from peft import PeftModel
from personal import QUICK, ROWS, Recorder
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from adapter_store import AdapterStore, BackendError, InvalidAdapterError
from langchain_cope import ChatCoPe, ChromaHistory, PersonalizeResult, PersonalizeUser
from langchain_cope.engine import Engine, PromptProfile, load_base
from langchain_cope.errors import HistoryError, InputError, ModelError
from langchain_cope.evaluation.ways import WAYS
from langchain_cope.history import as_history
from langchain_cope.personalization.result import Sample
from langchain_cope.personalization.run import reserved_device
from langchain_cope.training.pipeline import train_user
from langchain_cope.training.progress import Monitor, Stage
from langchain_cope.training.recipe import Recipe


def test_from_history_to_a_published_version_that_chats(
    personalize: PersonalizeUser, base: Path, store_folder: Path, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in load_base(base).model.state_dict().items()}
    result = personalize.invoke({"user_id": "alice", "history": ROWS})
    assert isinstance(result, PersonalizeResult)
    assert result.published, result.reason
    assert (result.num_trained, result.num_held_out) == (8, 2)
    assert list(result.metrics) == ["base", "sft", "dpo", "cope"] == [way.name for way in WAYS]
    assert set(result.metrics["cope"]) == {"rouge1", "rougeL"}
    assert result.metrics["dpo"]["nll"] < result.metrics["base"]["nll"]
    assert list(result.timings) == [stage.value for stage in Stage]
    assert [sample.reference for sample in result.samples] == [
        row["completion"] for row in ROWS[-2:]
    ]
    fields = ["prompt", "reference", *[way.name for way in WAYS]]
    assert list(result.samples[0].model_dump()) == fields

    store = AdapterStore(store_folder)
    version = store.resolve("alice", base=load_base(base).fingerprint())
    assert (version.version, version.alpha, version.tau) == (result.version, 0.1, 0.1)
    assert version.metrics == result.metrics
    assert version.metadata["recipe"]["sft"]["rank"] == 4
    everyday = load_base(base).everyday
    profile = PromptProfile.from_stored(version.metadata["prompts"], everyday)
    assert profile is not None
    assert profile.relevance(everyday, [ROWS[-1]["prompt"]]) == 1
    assert profile.relevance(everyday, ["Add 12 and 7."]) == 0
    assert version.metadata["dtype"] == str(load_base(base).dtype).removeprefix("torch.")
    assert all(
        torch.equal(tensor, before[name])
        for name, tensor in load_base(base).model.state_dict().items()
    )

    message = ChatCoPe(model=str(base), store=store, user_id="alice").invoke(ROWS[-1]["prompt"])
    assert message.response_metadata["adapter_version"] == result.version
    exported = store.export_peft("alice", tmp_path / "exported")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), exported)
    assert plain.active_adapter == "default"


def test_a_version_that_is_no_better_is_refused(
    personalize: PersonalizeUser, store_folder: Path
) -> None:
    first = personalize.invoke({"user_id": "alice", "history": ROWS})
    again = personalize.invoke({"user_id": "alice", "history": ROWS})
    assert not again.published
    assert again.version is None
    assert f"active version {first.version}" in again.reason
    assert AdapterStore(store_folder).active("alice") == first.version
    forced = personalize.model_copy(update={"gate": "always"}).invoke(
        {"user_id": "alice", "history": ROWS}
    )
    assert forced.published
    assert AdapterStore(store_folder).active("alice") == forced.version
    assert forced.metrics == first.metrics, "the same seed gives the same result"


def test_a_damaged_active_version_is_replaced(
    personalize: PersonalizeUser, store_folder: Path
) -> None:
    personalize.invoke({"user_id": "alice", "history": ROWS})
    store = AdapterStore(store_folder)
    (store.fetch_dir(store.resolve("alice")) / "adapter_model.safetensors").write_bytes(b"damaged")
    result = personalize.invoke({"user_id": "alice", "history": ROWS})
    assert result.published
    assert "cannot be used" in result.reason
    assert set(store.fetch(store.resolve("alice"))) == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_a_sample_takes_the_answers_of_ways_to_come() -> None:
    answers = {way.name: way.name for way in WAYS} | {"later": "text"}
    assert Sample(prompt=[], reference="r", **answers).model_dump()["later"] == "text"


def test_the_recipe_may_be_a_function_of_base_and_items(personalize: PersonalizeUser) -> None:
    asked: list[tuple[int, int]] = []

    def recipe(base: Any, items: Any) -> Recipe:
        asked.append((base.num_parameters, len(items)))
        return replace(QUICK, seed=5)

    chain = personalize.model_copy(update={"recipe": recipe})
    result = chain.invoke({"user_id": "alice", "history": ROWS})
    assert asked == [(load_base(personalize.model).num_parameters, 8)]
    assert result.recipe["seed"] == 5


def test_the_gain_asked_for_counts(personalize: PersonalizeUser) -> None:
    asked = personalize.model_copy(update={"min_gain": 100.0})
    result = asked.invoke({"user_id": "alice", "history": ROWS})
    assert not result.published
    assert "a gain of more than 100 was asked for" in result.reason


def test_an_active_version_trained_on_held_out_items_is_not_the_judge(
    personalize: PersonalizeUser,
) -> None:
    personalize.invoke({"user_id": "alice", "history": ROWS})
    older = [*ROWS[8:], *ROWS[:8]]  # what was trained on before is now the newest
    result = personalize.invoke({"user_id": "alice", "history": older})
    assert "was trained on 2 of the held-out items" in result.reason
    assert result.verdict
    assert result.verdict.reference == "the base"


def test_an_active_version_of_another_base_is_not_the_judge(
    personalize: PersonalizeUser, tiny: Callable[..., Path]
) -> None:
    personalize.invoke({"user_id": "alice", "history": ROWS})
    other = personalize.model_copy(update={"model": str(tiny("qwen2", initializer_range=0.05))})
    assert (
        "was trained on another base" in other.invoke({"user_id": "alice", "history": ROWS}).reason
    )


def test_training_one_user_leaves_the_other_and_the_base_bit_for_bit(
    personalize: PersonalizeUser, base: Path, store_folder: Path
) -> None:
    store = AdapterStore(store_folder)
    personalize.invoke({"user_id": "alice", "history": ROWS})
    alice = store.fetch(store.resolve("alice"))
    weights = {name: tensor.clone() for name, tensor in load_base(base).model.state_dict().items()}
    answer = ChatCoPe(model=str(base), store=store, user_id="alice").invoke("Hello").content
    reversed_rows = [{**row, "completion": row["completion"][::-1]} for row in ROWS]
    personalize.invoke({"user_id": "bob", "history": reversed_rows})
    assert store.fetch(store.resolve("alice")) == alice
    assert store.fetch(store.resolve("bob")) != alice
    assert all(
        torch.equal(tensor, weights[name])
        for name, tensor in load_base(base).model.state_dict().items()
    )
    assert ChatCoPe(model=str(base), store=store, user_id="alice").invoke("Hello").content == answer


def test_a_user_is_trained_as_if_no_other_had_been_before(
    personalize: PersonalizeUser, tmp_path: Path
) -> None:
    first = AdapterStore(personalize.store)
    personalize.invoke({"user_id": "bob", "history": ROWS[::-1]})
    personalize.invoke({"user_id": "alice", "history": ROWS})
    second = AdapterStore(tmp_path / "other")
    personalize.model_copy(update={"store": second}).invoke({"user_id": "alice", "history": ROWS})
    assert first.fetch(first.resolve("alice")) == second.fetch(second.resolve("alice"))


def test_the_history_comes_from_chroma(personalize: PersonalizeUser, tmp_path: Path) -> None:
    history = ChromaHistory(tmp_path / "chroma")
    history.add("alice", ROWS)
    history.add("bob", ROWS[:2])
    result = personalize.model_copy(update={"history": history}).invoke({"user_id": "alice"})
    assert (result.num_trained, result.num_held_out) == (8, 2)
    with pytest.raises(HistoryError, match="holds 2 different items"):
        personalize.model_copy(update={"history": history}).invoke({"user_id": "bob"})


def test_what_is_published_in_any_case_needs_no_evidence(
    personalize: PersonalizeUser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("langchain_cope.personalization.gate.gather")
    chain = personalize.model_copy(update={"gate": "always"})
    result = chain.invoke({"user_id": "alice", "history": ROWS})
    assert result.published
    assert result.verdict is not None
    assert result.verdict.num_texts == 2
    assert result.reason.startswith("published as asked (gate 'always'): ")


def test_every_stage_is_a_child_run_and_progress_is_told(personalize: PersonalizeUser) -> None:
    recorder = Recorder()
    result = personalize.invoke({"user_id": "alice", "history": ROWS}, {"callbacks": [recorder]})
    assert result.samples
    (_, root, none), *children = recorder.started
    assert none is None
    names = ["history", "load", "sft", "negatives", "dpo", "evaluate", "strength", "publish"]
    assert [name for name, _, _ in children] == names
    assert {parent for _, _, parent in children} == {root}
    assert len(recorder.outputs) == len(recorder.started)
    assert "fox" not in str([recorder.inputs, recorder.outputs, recorder.progress])
    stages = {event["stage"] for event in recorder.progress}
    assert stages == {"sft", "negatives", "dpo", "evaluate"}
    sft = [event for event in recorder.progress if event["stage"] == "sft"]
    assert [event["step"] for event in sft] == sorted(event["step"] for event in sft)
    assert sft[-1]["step"] == sft[-1]["total"] == 6
    assert all(event["loss"] > 0 for event in sft if event["step"])
    assert {event["user_id"] for event in recorder.progress} == {"alice"}


async def test_progress_reaches_astream_events(personalize: PersonalizeUser) -> None:
    events = [
        event
        async for event in personalize.astream_events(
            {"user_id": "alice", "history": ROWS}, version="v2"
        )
        if event["event"] == "on_custom_event"
    ]
    assert {event["name"] for event in events} == {"cope.progress"}
    assert {event["data"]["stage"] for event in events} == {"sft", "negatives", "dpo", "evaluate"}


async def test_waiting_trainings_leave_the_event_loops_threads_free(
    personalize: PersonalizeUser,
) -> None:
    with reserved_device("cpu", Monitor()):
        waiting = [
            asyncio.create_task(personalize.ainvoke({"user_id": "alice", "history": ROWS}))
            for _ in range(40)
        ]
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), timeout=10) == "free"
        for task in waiting:
            task.cancel()
        assert all(
            isinstance(e, asyncio.CancelledError)
            for e in await asyncio.gather(*waiting, return_exceptions=True)
        )
    assert AdapterStore(personalize.store).active("alice") is None


async def test_a_cancelled_training_stops_at_the_next_step(
    personalize: PersonalizeUser, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    endless = replace(QUICK, sft=replace(QUICK.sft, epochs=10_000))
    training = threading.Event()

    class Wait(BaseCallbackHandler):
        def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
            if data["step"] >= 2:
                training.set()

    slow = personalize.model_copy(update={"recipe": endless})
    task = asyncio.create_task(
        slow.ainvoke({"user_id": "alice", "history": ROWS}, {"callbacks": [Wait()]})
    )
    await asyncio.to_thread(training.wait, 60)
    started = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - started < 5
    assert AdapterStore(personalize.store).active("alice") is None
    assert list(temporary.iterdir()) == []
    assert (await personalize.ainvoke({"user_id": "alice", "history": ROWS})).published


def test_a_batch_trains_every_user(personalize: PersonalizeUser) -> None:
    requests: list[Any] = [{"user_id": user, "history": ROWS} for user in ("alice", "bob")]
    assert [result.published for result in personalize.batch(requests)] == [True, True]


def test_too_short_a_history_is_refused_before_anything_is_loaded(store_folder: Path) -> None:
    with pytest.raises(HistoryError, match="at least 5 are needed"):
        PersonalizeUser(model="/nowhere", store=store_folder).invoke(
            {"user_id": "alice", "history": ROWS[:4]}
        )


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"history": ROWS}, "user_id"),
        ({"user_id": 3, "history": ROWS}, "user_id"),
        ({"user_id": "alice", "histroy": ROWS}, "histroy"),
        ({"user_id": "alice"}, "no history was given"),
        ({"user_id": "alice", "history": [{"prompt": "x"}]}, r"history\[0\]"),
    ],
)
def test_a_wrong_request_says_what_is_wrong(
    personalize: PersonalizeUser, request_: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        personalize.invoke(request_)


@pytest.mark.parametrize("user", ["", "a\0b", "x" * 10_000])
def test_hostile_user_ids_are_refused_before_training(
    personalize: PersonalizeUser, user: str
) -> None:
    with pytest.raises(InvalidAdapterError):
        personalize.invoke({"user_id": user, "history": ROWS})


def test_a_store_that_cannot_be_written_is_refused_before_training(
    personalize: PersonalizeUser, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BackendError, match="file stands where a folder is needed"):
        personalize.model_copy(update={"store": tmp_path / "file" / "store"}).invoke(
            {"user_id": "alice", "history": ROWS}
        )


def test_a_recipe_that_is_none_is_refused_by_name(personalize: PersonalizeUser) -> None:
    with pytest.raises(ValidationError, match="give an instance"):
        PersonalizeUser(recipe=Recipe)
    mistaken = personalize.model_copy(update={"recipe": lambda base, items: {"rank": 8}})
    with pytest.raises(InputError, match="not a Recipe"):
        mistaken.invoke({"user_id": "alice", "history": ROWS})


def test_training_on_a_quantized_base_is_refused(base: Path, tmp_path: Path) -> None:
    quantized = replace(load_base(base), quantization="int8")
    with pytest.raises(ModelError, match="is quantized"):
        train_user(Engine(quantized), as_history(ROWS).items, QUICK, tmp_path)


def test_a_failure_in_a_stage_is_traced_and_publishes_nothing(
    personalize: PersonalizeUser, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the disk burnt")

    monkeypatch.setattr("langchain_cope.training.dpo.train_dpo", broken)
    recorder = Recorder()
    with pytest.raises(RuntimeError, match="the disk burnt"):
        personalize.invoke({"user_id": "alice", "history": ROWS}, {"callbacks": [recorder]})
    # The stage's run, then the whole.
    assert [str(error) for error in recorder.errors] == ["the disk burnt", "the disk burnt"]
    assert AdapterStore(personalize.store).active("alice") is None
