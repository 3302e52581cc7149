"""From people's files and from feedback in Chroma to a published adapter that DPO trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from langchain_cope import ChromaHistory, PersonalizeUser, Recipe, read_history
from langchain_cope.training import dpo
from langchain_cope.training.negatives import Pair
from langchain_cope.training.recipe import DPO, SFT, Negatives

QUICK = Recipe(
    sft=SFT(learning_rate=2e-2, epochs=3, rank=4, targets="linear"),
    negatives=Negatives(candidates=2),
    dpo=DPO(learning_rate=1e-4),
    max_new_tokens=8,
)


@pytest.fixture
def trained_pairs(monkeypatch: pytest.MonkeyPatch) -> list[Pair]:
    """Everything that DPO was given, overheard."""
    heard: list[Pair] = []
    trainer = dpo.dpo_trainer

    def overheard(base: Any, pairs: Any, *rest: Any) -> Any:
        heard.extend(pairs)
        return trainer(base, pairs, *rest)

    monkeypatch.setattr(dpo, "dpo_trainer", overheard)
    return heard


@pytest.fixture
def personalize(tiny: Callable[..., Path], store_folder: Path) -> PersonalizeUser:
    return PersonalizeUser(
        model=str(tiny("llama")), store=store_folder, recipe=QUICK, gate="always"
    )


def texts(pairs: list[Pair], personalize: PersonalizeUser) -> set[tuple[str, str]]:
    """(chosen, rejected) of each pair, decoded."""
    decode = personalize._engine().base.tokenizer.decode
    return {(decode(p.chosen_ids, skip_special_tokens=True).strip(), p.rejected) for p in pairs}


def openai(number: int) -> dict[str, Any]:
    return {
        "input": {"messages": [{"role": "user", "content": f"Say {number}."}]},
        "preferred_output": [{"role": "assistant", "content": f"It is {number}, friend."}],
        "non_preferred_output": [{"role": "assistant", "content": f"{number}."}],
    }


def trl(number: int) -> dict[str, Any]:
    return {
        "prompt": f"Say {number}.",
        "chosen": f"It is {number}, friend.",
        "rejected": f"{number}.",
    }


def feedback(number: int) -> dict[str, Any]:
    return {
        "prompt": f"Say {number}.",
        "answer": f"{number}.",
        "score": 0,
        "correction": f"It is {number}, friend.",
    }


@pytest.mark.parametrize("row", [openai, trl, feedback])
def test_pairs_of_a_file_reach_dpo_as_given(
    personalize: PersonalizeUser,
    tmp_path: Path,
    trained_pairs: list[Pair],
    row: Callable[[int], dict[str, Any]],
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row(number)) for number in range(6)))
    read = read_history(path, user_id="ann")
    assert read.num_pairs == 6
    result = personalize.invoke({"user_id": "ann", "history": read.items})
    assert result.published
    assert (result.num_trained, result.num_held_out) == (4, 2)
    assert texts(trained_pairs, personalize) == {(f"It is {n}, friend.", f"{n}.") for n in range(4)}
    assert all(pair.reward is None for pair in trained_pairs)
    assert (
        "4 pairs of a chosen and a rejected answer were given; no negative is mined for their items"
        in result.notes
    )


def test_feedback_in_chroma_trains_the_user_beside_what_the_user_wrote(
    personalize: PersonalizeUser, tmp_path: Path, trained_pairs: list[Pair]
) -> None:
    history = ChromaHistory(tmp_path / "chroma")
    history.add(
        "ann", [{"prompt": f"Count to {n}.", "completion": f"Up to {n}, friend."} for n in range(3)]
    )
    history.add("ann", [feedback(number) for number in range(2)])
    history.add("ann", [{"prompt": "Say hi.", "answer": "Hi.", "score": 0}])
    history.add("ann", [{"prompt": "Say hi.", "answer": "Hi, friend.", "score": 1}])
    history.add(
        "ann",
        [{"prompt": f"Say {n}.", "answer": f"It is {n}, friend.", "score": 1} for n in (8, 9)],
    )
    chain = personalize.model_copy(update={"history": history})
    result = chain.invoke({"user_id": "ann"})
    assert result.published
    assert (result.num_trained, result.num_held_out) == (6, 2)
    given = texts([pair for pair in trained_pairs if pair.reward is None], chain)
    assert given == {("It is 0, friend.", "0."), ("It is 1, friend.", "1."), ("Hi, friend.", "Hi.")}
    mined = texts([pair for pair in trained_pairs if pair.reward is not None], chain)
    assert {chosen for chosen, _ in mined} <= {f"Up to {n}, friend." for n in range(3)}
    assert mined


def test_weight_zero_is_never_trained_on_but_read_as_context(personalize: PersonalizeUser) -> None:
    def conversation(number: int) -> dict[str, Any]:
        turns = [
            ("user", f"Say {number}."),
            ("assistant", f"SECRET {number}"),
            ("user", "And?"),
            ("assistant", f"{number}!"),
        ]
        messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in turns]
        messages[1]["weight"] = 0
        return {"messages": messages}

    result = personalize.invoke(
        {"user_id": "ann", "history": [conversation(number) for number in range(6)]}
    )
    assert (result.num_trained, result.num_held_out) == (4, 2)
    assert all("SECRET" not in sample.reference for sample in result.samples)
    assert all(sample.prompt[1]["content"].startswith("SECRET") for sample in result.samples)
    assert "turns of weight 0, which are context and not learnt: 6" in result.notes
