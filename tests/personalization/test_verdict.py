"""The verdict, on a tiny base that is really trained: it answers each topic in its own words."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from personal import QUICK
from topics import Rows, rows

from adapter_store import AdapterStore
from langchain_cope import PersonalizeUser
from langchain_cope.engine import Engine, load_base
from langchain_cope.evaluation.evaluate import item_nll
from langchain_cope.history import as_history
from langchain_cope.personalization.certainty import Prior, prior_of
from langchain_cope.personalization.evidence import Evidence, gather
from langchain_cope.personalization.verdict import Reference, choose_adapter, is_mispaired, judge

NOTHING = Evidence([], [], [])


def shuffled(of_user: Rows, num_trained: int) -> Rows:
    """Return the rows with the answers of those that are trained on in another order."""
    answers = [row["completion"] for row in of_user[:num_trained]]
    answers = answers[2:] + answers[:2]  # none stays with its topic
    mixed = [{**row, "completion": answer} for row, answer in zip(of_user, answers, strict=False)]
    return mixed + of_user[num_trained:]


@pytest.fixture
def learner(trained_base: Path, store_folder: Path) -> PersonalizeUser:
    return PersonalizeUser(
        model=str(trained_base), store=store_folder, recipe=QUICK, dtype="float32", device="cpu"
    )


def test_a_user_with_a_manner_is_published_with_the_numbers(learner: PersonalizeUser) -> None:
    result = learner.invoke({"user_id": "alice", "history": rows(30, "{}, or so I heard!!")})
    verdict = result.verdict
    assert result.published, result.reason
    assert verdict
    assert result.reason == verdict.reason == verdict.sentence
    assert (verdict.num_texts, verdict.reference) == (6, "the base")
    assert verdict.probability >= 0.9
    numbers = f"{verdict.num_better} of 6 newest texts are likelier with it than with the base"
    assert verdict.sentence.startswith(numbers)
    assert f"by {verdict.mean_gain:.3g} nats a token" in verdict.sentence
    assert f"{min(99, int(100 * verdict.probability))} % sure it helps" in verdict.sentence
    version = AdapterStore(learner.store).resolve("alice")
    assert version.metadata["verdict"] == verdict.model_dump()


def test_answers_shuffled_among_the_prompts_are_refused(learner: PersonalizeUser) -> None:
    history = shuffled(rows(30, "{}, or so I heard!!"), 24)
    result = learner.invoke({"user_id": "alice", "history": history})
    assert result.metrics["sft"]["nll"] < result.metrics["base"]["nll"], "the old rule would pass"
    assert not result.published
    assert "as if they were shuffled" in result.reason
    assert result.verdict
    assert "check that each prompt stands beside the text" in str(result.verdict.advice)


def test_a_user_who_writes_as_the_base_is_refused_with_advice(learner: PersonalizeUser) -> None:
    result = learner.invoke({"user_id": "alice", "history": rows(30)})
    assert not result.published
    assert result.verdict
    assert "more texts" in str(result.verdict.advice)


def test_the_adapter_of_sft_is_published_where_dpo_is_worse(
    learner: PersonalizeUser, trained_base: Path
) -> None:
    ruinous = replace(QUICK, dpo=replace(QUICK.dpo, learning_rate=0.3))
    history = rows(30, "{}, or so I heard!!")
    chain = learner.model_copy(update={"recipe": ruinous})
    result = chain.invoke({"user_id": "alice", "history": history})
    assert result.metrics["dpo"]["nll"] > result.metrics["sft"]["nll"]
    assert result.verdict
    assert (result.published, result.verdict.adapter) == (True, "sft")
    store = AdapterStore(learner.store)
    engine = Engine.of(load_base(trained_base, device="cpu", dtype="float32"))
    adapter = engine.load_adapter(store.fetch_dir(store.resolve("alice")))
    held_out = as_history(history).items[-6:]
    gain = fmean(item_nll(engine, held_out, ruinous)) - fmean(
        item_nll(engine, held_out, ruinous, adapter)
    )
    assert gain == pytest.approx(result.verdict.mean_gain, abs=1e-4)


def test_an_adapter_of_others_that_is_as_good_has_to_be_beaten(
    learner: PersonalizeUser, tmp_path: Path
) -> None:
    history = rows(30, "{}, or so I heard!!")
    learner.invoke({"user_id": "another", "history": history})
    other = AdapterStore(learner.store).export_peft("another", tmp_path / "other")
    asked = learner.model_copy(update={"reference_adapter": other})
    result = asked.invoke({"user_id": "alice", "history": history})
    assert not result.published
    assert "than with the reference adapter" in result.reason


def test_answers_that_fall_apart_are_refused_however_likely_the_texts() -> None:
    base = Reference("the base", [1.0] * 4, is_base=True)
    nll, fault = [0.5, 0.51, 0.5, 0.49], "its answers repeat themselves: 4 of 4"
    assert judge("sft", nll, [base], range(4), NOTHING, prior_of({})).published
    verdict = judge("sft", nll, [base], range(4), NOTHING, prior_of({}), fault=fault)
    assert not verdict.published
    assert verdict.reason == f"{verdict.sentence}; but {fault}"
    assert "longer texts" in str(verdict.advice)
    assert verdict.p_value == 1, "nor is it a discovery of a fleet"


def test_the_texts_of_one_conversation_count_as_one() -> None:
    base = Reference("the base", [1.0, 1.0, 1.0, 1.0], is_base=True)
    nll, units = [0.7, 0.9, 0.8, 0.7], ["a", "a", 2, 3]
    verdict = judge("sft", nll, [base], units, NOTHING, prior_of({}))
    assert (verdict.num_texts, verdict.num_better) == (3, 3)
    assert verdict.mean_gain == pytest.approx((0.2 + 0.2 + 0.3) / 3)


def test_the_reference_that_is_hardest_to_beat_decides() -> None:
    easy = Reference("the base", [1.0] * 4, is_base=True)
    hard = Reference("the reference adapter", [0.52, 0.48, 0.51, 0.49])
    verdict = judge("dpo", [0.5, 0.51, 0.5, 0.49], [easy, hard], range(4), NOTHING, prior_of({}))
    assert not verdict.published
    assert verdict.reference == "the reference adapter"


def test_few_texts_that_gain_say_how_many_would_do() -> None:
    base = Reference("the base", [1.0, 1.0], is_base=True)
    verdict = judge("dpo", [0.9, 0.7], [base], range(2), NOTHING, prior_of({}))
    assert not verdict.published
    assert "more texts: about 20 in all would do" in str(verdict.advice)


def test_first_sights_move_the_belief_and_decide_nothing() -> None:
    base = Reference("the base", [1.0] * 6, is_base=True)
    nll = [0.9, 1.0, 0.7, 1.05, 0.8, 0.9]

    def sure(first_sights: list[float]) -> float:
        evidence = replace(NOTHING, first_sights=first_sights)
        return judge("dpo", nll, [base], range(6), evidence, prior_of({})).probability

    for_it, against_it = sure([0.2, 0.3] * 20), sure([-0.2, -0.3] * 20)
    assert against_it < sure([]) < for_it
    worse = Reference("the base", [0.5] * 6, is_base=True)
    evidence = replace(NOTHING, first_sights=[5.0, 6.0] * 20)
    assert not judge("dpo", nll, [worse], range(6), evidence, prior_of({})).published


@pytest.mark.parametrize("reads_prompts", [False, True])
def test_held_out_items_are_paired_where_the_base_is_not_known_to_tell(
    reads_prompts: bool, tiny: Callable[..., Path]
) -> None:
    engine = Engine.of(load_base(tiny("llama")))
    trained, held_out = as_history(rows(8)).items, as_history(rows(4)).items
    of_base, prior = item_nll(engine, held_out, QUICK), Prior(0.0, 0.5, reads_prompts)
    evidence = gather(engine, trained, held_out, QUICK, [], of_base, prior)
    assert len(evidence.trained_pairing) == 8
    assert len(evidence.held_out_pairing) == (0 if reads_prompts else 4)


def test_only_a_base_that_reads_prompts_can_tell_shuffled_answers() -> None:
    blind, reads = Prior(0.0, 0.5, False), Prior(0.0, 0.5, True)
    noise, clear = [0.1, -0.1, 0.05, -0.06], [0.5, 0.6, 0.7, 0.4]
    assert not is_mispaired(Evidence([], noise, noise), blind)
    assert is_mispaired(Evidence([], noise, noise), reads)
    assert is_mispaired(Evidence([], noise, clear), blind)
    assert not is_mispaired(Evidence([], clear, clear), reads)
    assert not is_mispaired(Evidence([], [], clear), reads), "one prompt for all: nothing to tell"


def test_of_equally_good_adapters_the_one_of_sft_is_taken() -> None:
    assert choose_adapter({"sft": [1.0, 2.0], "dpo": [2.0, 1.0]}, ["sft", "dpo"]) == "sft"
    assert choose_adapter({"sft": [1.0, 2.0], "dpo": [1.0, 1.0]}, ["sft", "dpo"]) == "dpo"
