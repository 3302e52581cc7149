"""What the gate hears: answers of adapters that were really trained to repeat themselves."""

from dataclasses import replace
from pathlib import Path

import pytest
from personal import QUICK
from topics import rows
from training.tiny import Heard

from langchain_cope import PersonalizeUser, Recipe
from langchain_cope.engine import Engine, load_base
from langchain_cope.evaluation.comparison import train_and_evaluate
from langchain_cope.evaluation.evaluate import Evaluation
from langchain_cope.history import as_history
from langchain_cope.personalization.choose_strength import Trial, recommendation, trial_of
from langchain_cope.personalization.hear import MOST_ASKED, _are_too_many, hear
from langchain_cope.strength import PAPER, Strength
from langchain_cope.training.progress import Monitor, Stage

RECIPE = replace(QUICK, negatives=None, max_new_tokens=16)
ALONE = Strength(0.0)
USUAL = recommendation(PAPER, "the paper's")
LOOP, FINE = "no no no no no no no", "no, not today"
OWN = [row["completion"] for row in rows(30, "{}, or so I heard!!")]


def heard(
    base: Path, folder: Path, manner: str, recipe: Recipe = RECIPE
) -> tuple[Trial, Evaluation]:
    """Train an adapter on answers of that manner, ask it 10 of another, and return both."""
    engine = Engine.of(load_base(base, device="cpu", dtype="float32"))
    trained, judges = as_history(rows(20, manner)).items, as_history(rows(30)).items[20:]
    monitor = Heard()
    training, evaluation = train_and_evaluate(engine, trained, judges, recipe, folder, monitor)
    return trial_of(engine, training, "sft", judges, evaluation, monitor), evaluation


@pytest.fixture(scope="module")
def looping(
    trained_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trial, Evaluation]:
    return heard(trained_base, tmp_path_factory.mktemp("looping"), LOOP)


def saying(trial: Trial, answers: dict[Strength, str]) -> Trial:
    """Return the trial as if the adapter had answered all items so at these strengths."""
    return replace(trial, known={one: [text] * 10 for one, text in answers.items()})


def test_an_adapter_that_learnt_to_repeat_itself_is_heard(
    looping: tuple[Trial, Evaluation],
) -> None:
    trial, evaluation = looping
    assert {PAPER, ALONE} <= set(trial.known), "what the evaluation answered is not asked again"
    recommended, fault = hear(trial, evaluation, OWN, USUAL)
    assert recommended == USUAL
    assert fault == "its answers repeat themselves: 10 of 10, where the base's do not fall apart"


def test_an_adapter_that_learnt_a_manner_is_no_fault(trained_base: Path, tmp_path: Path) -> None:
    short = replace(RECIPE, max_new_tokens=8)
    trial, evaluation = heard(trained_base, tmp_path, "{}, or so I heard!!", short)
    assert hear(trial, evaluation, OWN, USUAL) == (USUAL, None)


def test_likely_texts_and_broken_answers_publish_nothing(
    trained_base: Path, store_folder: Path
) -> None:
    words = ["lol", "ok", "so", "hm"]
    history = [
        {
            "prompt": row["prompt"],
            "completion": f"{'no ' * (1 + i % 2)}{words[i // 2 % 4]}{' no' * (1 + i % 2)}",
        }
        for i, row in enumerate(rows(30))
    ]
    chain = PersonalizeUser(
        model=str(trained_base), store=store_folder, recipe=RECIPE, dtype="float32", device="cpu"
    )
    result = chain.invoke({"user_id": "alice", "history": history})
    assert result.verdict
    assert result.verdict.probability > 0.99
    assert not result.published
    assert "sure it helps; but its answers repeat themselves: " in result.reason
    assert "texts that differ more" in str(result.verdict.advice)
    forced = chain.model_copy(update={"gate": "always"})
    forced_result = forced.invoke({"user_id": "alice", "history": history})
    assert forced_result.published
    assert "repeat themselves" in forced_result.reason, "whoever forces it is told"


def test_what_the_user_does_or_the_base_does_is_no_fault(
    looping: tuple[Trial, Evaluation],
) -> None:
    trial, evaluation = looping
    own = [*OWN[:20], *["no " * 20] * 10]
    assert hear(trial, evaluation, own, USUAL)[1] is None
    assert hear(trial, evaluation, [*OWN, LOOP], USUAL)[1] is not None, "once is no manner"
    texts = [{**one, "base": "oh oh oh oh"} for one in evaluation.texts]
    assert hear(trial, replace(evaluation, texts=texts), OWN, USUAL)[1] is None


def test_where_the_contrast_is_to_blame_it_is_left_out(looping: tuple[Trial, Evaluation]) -> None:
    trial, evaluation = looping
    said = saying(trial, {PAPER: LOOP, ALONE: FINE})
    recommended, fault = hear(said, evaluation, OWN, USUAL)
    assert fault is None
    assert (recommended.alpha, recommended.tau, recommended.adapter_scale) == (0, 0.1, 1)
    assert recommended.why.startswith("without contrast: with α 0.1 its answers repeat themselves")
    of_recipe = replace(said, recipe=replace(RECIPE, alpha=0.1))
    assert hear(of_recipe, evaluation, OWN, USUAL)[1] is not None, "an app's own α is kept"


def test_empty_answers_are_a_fault(looping: tuple[Trial, Evaluation]) -> None:
    trial, evaluation = looping
    silent = saying(trial, {PAPER: " ", ALONE: ""})
    _, fault = hear(silent, evaluation, OWN, USUAL)
    assert str(fault).startswith("its answers are empty: 10 of 10")


@pytest.mark.parametrize(("num_answers", "fewest"), [(3, 3), (4, 4), (6, 5), (8, 6), (12, 8)])
def test_so_many_broken_answers_no_working_adapter_shows(num_answers: int, fewest: int) -> None:
    assert _are_too_many(fewest, num_answers)
    assert not _are_too_many(fewest - 1, num_answers)
    assert not _are_too_many(2, 2), "two answers are too few to tell"


def test_half_of_the_answers_may_repeat_themselves(looping: tuple[Trial, Evaluation]) -> None:
    trial, evaluation = looping
    halves = replace(trial, known={PAPER: [LOOP] * 5 + [FINE] * 5})
    assert hear(halves, evaluation, OWN, USUAL)[1] is None


def test_at_another_strength_a_few_answers_are_asked_for(
    looping: tuple[Trial, Evaluation],
) -> None:
    trial, evaluation = looping
    monitor = Monitor()
    chosen = recommendation(Strength(0.3), "chosen", 8)
    with monitor.stage(Stage.PUBLISH):
        _, fault = hear(replace(trial, monitor=monitor), evaluation, OWN, chosen)
    assert f"{MOST_ASKED} of {MOST_ASKED}" in str(fault)
