"""How strongly a version is to act: what is believed of a gain, and really trained choices."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from personal import QUICK, ROWS
from training.tiny import Heard

from adapter_store import AdapterStore
from langchain_cope import ChatCoPe, PersonalizeUser
from langchain_cope.engine import Engine, load_base
from langchain_cope.history import Item
from langchain_cope.personalization import choose_strength
from langchain_cope.personalization.choose_strength import Trial, pick
from langchain_cope.strength import Candidate, Strength, StrengthPrior
from langchain_cope.training.encode import fit
from langchain_cope.training.progress import Monitor, Stage

WEAK, STRONG = Strength(0.0), Strength(0.5)
MANY = [
    {"prompt": f"Headline for story {i}?", "completion": f"The fox jumps over story {i}, says dog"}
    for i in range(120)
]


def prior(mean: float = 0.0, sd: float = 0.1) -> StrengthPrior:
    candidates = tuple(Candidate(one, mean, sd) for one in (WEAK, STRONG))
    return StrengthPrior(Strength(), candidates, is_measured=True)


def test_the_strength_believed_to_gain_most_is_chosen() -> None:
    chosen = pick(prior(), {WEAK: (-0.2, 0.05), STRONG: (0.3, 0.05)})
    assert chosen is not None
    assert chosen.strength == STRONG
    assert 0.2 < chosen.mean < 0.3
    assert pick(prior(), {WEAK: (-0.2, 0.05), STRONG: (-0.1, 0.05)}) is None
    assert pick(prior(), {}) is None


def test_a_gain_within_its_error_changes_nothing() -> None:
    assert pick(prior(), {STRONG: (0.05, 0.06)}) is None
    assert pick(prior(), {STRONG: (0.05, 0.02)}) is not None
    # What users gain weighs as well: believed are 0.0525 and an error of 0.072.
    assert pick(prior(sd=0.1), {STRONG: (0.105, 0.1)}) is None


def test_a_smaller_sure_gain_is_taken_where_the_largest_is_not_sure() -> None:
    chosen = pick(prior(), {WEAK: (0.06, 0.02), STRONG: (0.32, 0.2)})
    assert chosen is not None
    assert chosen.strength == WEAK


def test_a_small_sure_gain_beats_a_large_doubtful_one() -> None:
    chosen = pick(prior(), {WEAK: (0.1, 0.02), STRONG: (0.2, 0.3)})
    assert chosen is not None
    assert chosen.strength == WEAK


def test_what_users_of_the_base_need_outweighs_a_few_texts() -> None:
    gains = {STRONG: (0.2, 0.1)}
    assert pick(prior(mean=-0.2), gains) is None
    assert pick(prior(mean=0.2), gains) is not None
    assert pick(prior(mean=0.0, sd=0.0), gains) is None  # all users are alike


def test_a_short_history_is_told_why_nothing_was_chosen(personalize: PersonalizeUser) -> None:
    result = personalize.invoke({"user_id": "alice", "history": ROWS})
    recommended = result.recommended
    assert recommended is not None
    assert (recommended.alpha, recommended.tau, recommended.adapter_scale) == (0.1, 0.1, 1)
    assert recommended.num_texts == 0
    assert recommended.why.startswith("the paper's: below 24 held-out texts")


def test_a_recipes_own_contrast_is_what_the_version_recommends(
    personalize: PersonalizeUser,
) -> None:
    chain = personalize.model_copy(update={"recipe": replace(QUICK, alpha=0.7)})
    recommended = chain.invoke({"user_id": "alice", "history": ROWS}).recommended
    assert recommended is not None
    assert (recommended.alpha, recommended.tau) == (0.7, 0.1)
    assert recommended.why == "as the recipe has it"


def test_texts_that_judge_nothing_choose_what_chats_use(
    base: Path, store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that every text is allowed to say something, and the best is taken.
    monkeypatch.setattr(choose_strength, "TOLERANCE", 100.0)
    chain = PersonalizeUser(
        model=str(base), dtype="float32", store=store_folder, recipe=QUICK, gate="always"
    )
    answers, num_known = Trial.answers, []

    def compared(trial: Trial, strengths: list[Strength]) -> dict[Strength, list[str]]:
        num_known.append(len(trial.known))
        assert answers(replace(trial, known={}), list(trial.known)) == trial.known
        return answers(trial, strengths)

    monkeypatch.setattr(Trial, "answers", compared)
    result = chain.invoke({"user_id": "alice", "history": MANY})
    assert result.verdict is not None
    # With α 0, and with the contrast, which is evaluated with DPO's adapter.
    assert num_known == [2 if result.verdict.adapter == "dpo" else 1]
    recommended = result.recommended
    assert recommended is not None
    assert recommended.num_texts == 8, recommended.why
    assert result.verdict is not None
    assert result.verdict.num_texts == 16
    assert result.num_held_out == 24
    version = AdapterStore(store_folder).resolve("alice")
    assert version.metadata["recommended"] == recommended.model_dump()
    chat = ChatCoPe(model=str(base), store=store_folder, user_id="alice", max_tokens=2)
    facts = chat.invoke("Headline for story 99?").response_metadata
    for name in ("alpha", "tau", "adapter_scale"):
        assert facts[name] == getattr(recommended, name)


def test_a_trial_answers_and_loses_likelihood_by_strength(
    base: Path, adapter: Callable[..., Path]
) -> None:
    engine = Engine.of(load_base(base))
    items = [Item(prompt=row["prompt"], completion=row["completion"]) for row in ROWS[:3]]
    examples, _ = fit(engine.base, items, 256, 100)
    trial = Trial(engine, engine.load_adapter(adapter(base, seed=1)), examples, QUICK, Monitor())
    strengths = [Strength(0.0), Strength(0.5), Strength(0.0, adapter_scale=2.0)]
    losses = trial.losses(strengths)
    assert losses[Strength(0.0)] == 0
    assert losses[Strength(0.5)] != 0
    assert losses[Strength(0.0, adapter_scale=2.0)] != 0


def test_what_the_evaluation_has_answered_is_not_asked_again(
    base: Path, adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.of(load_base(base))
    items = [Item(prompt=row["prompt"], completion=row["completion"]) for row in ROWS[:3]]
    examples, _ = fit(engine.base, items, 256, 100)
    known = {Strength(0.0): ["One.", "Two.", "Three."]}
    monitor = Heard()
    trial = Trial(
        engine, engine.load_adapter(adapter(base, seed=1)), examples, QUICK, monitor, known
    )
    with monitor.stage(Stage.STRENGTH):
        found = trial.answers([Strength(0.0), Strength(0.5)])
    assert found[Strength(0.0)] == known[Strength(0.0)]
    assert len(found[Strength(0.5)]) == 3
    assert [step.total for step in monitor.steps] == [1]
