import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from langchain_cope.training.recipe import DPO, SFT, Negatives, Recipe, recipe_for


@dataclass
class Sized:
    num_parameters: int


@dataclass
class TaskTrained(Sized):
    task_adapter: Path | None


def test_paper_recipe_holds_the_papers_numbers():
    paper = Recipe.paper()
    assert paper.sft == SFT(
        1e-4, 2, 4, 0.01, 0.3, 0.1, rank=8, lora_alpha=8, dropout=0.05, targets="attention"
    )
    assert paper.negatives == Negatives(candidates=3, temperature=1.0, top_p=0.95)
    assert paper.dpo == DPO(5e-6, 1, 8, 0.01, 0.3, 0.1, beta=0.01)
    assert (paper.alpha, paper.tau) == (0.1, 0.1)
    assert (paper.max_length, paper.max_words, paper.max_new_tokens) == (2048, 768, 100)
    long_form = replace(paper, max_new_tokens=600, repetition_penalty=1.2)
    assert Recipe.paper(long_form=True) == long_form


def test_default_recipe_is_the_papers_at_seven_billion_parameters():
    recipe = Recipe.for_model(Sized(7_000_000_000), range(60))
    assert (recipe.alpha, recipe.tau) == (None, None)  # chosen for each user
    assert replace(recipe, max_new_tokens=100, alpha=0.1, tau=0.1) == Recipe.paper()


def test_smaller_models_get_larger_steps_up_to_those_that_work():
    rates = [
        Recipe.for_model(Sized(n), range(60)).sft.learning_rate
        for n in (10**6, 7_377_152, 134_515_008, 10**9, 10**10)
    ]
    assert rates == sorted(rates, reverse=True)
    assert rates[:3] == pytest.approx([1.5e-3, 1.5e-3, 1.5e-3], rel=0.01)
    assert rates[-1] == 1e-4


@pytest.mark.parametrize(("num_parameters", "mines"), [(134_515_008, False), (10**9, True)])
def test_small_models_mine_no_negatives(num_parameters, mines):
    recipe = Recipe.for_model(Sized(num_parameters), range(60))
    assert recipe.negatives == (Negatives() if mines else None)
    assert json.loads(json.dumps(recipe.as_dict()))["negatives"] == (
        asdict(Negatives()) if mines else None
    )


@pytest.mark.parametrize(
    ("num_items", "epochs"), [(5, 6), (8, 6), (15, 3), (20, 3), (21, 2), (1000, 2)]
)
def test_short_histories_get_more_epochs(num_items, epochs):
    assert Recipe.for_model(Sized(7_377_152), range(num_items)).sft.epochs == epochs


@pytest.mark.parametrize(
    ("num_parameters", "num_items", "rate"),
    [
        (134_515_008, 0, 3.1e-4),
        (134_515_008, 6, 7.5e-4),
        (134_515_008, 8, 8.7e-4),
        (134_515_008, 24, 1.5e-3),
        (134_515_008, 80, 1.5e-3),
        (7_000_000_000, 6, 1e-4),
    ],
)
def test_short_histories_on_a_task_adapter_get_smaller_steps(num_parameters, num_items, rate):
    task_trained = TaskTrained(num_parameters, Path("task"))
    recipe = Recipe.for_model(task_trained, range(num_items))
    assert recipe.sft.learning_rate == pytest.approx(rate)
    assert recipe.dpo.learning_rate == pytest.approx(rate / 20)
    plain = Recipe.for_model(Sized(num_parameters), range(num_items))
    assert plain == Recipe.for_model(TaskTrained(num_parameters, None), range(num_items))


@pytest.mark.parametrize(
    ("kind", "option", "value", "message"),
    [
        (SFT, "learning_rate", 0, "SFT.learning_rate must be a number > 0, not 0$"),
        (SFT, "learning_rate", float("nan"), "SFT.learning_rate must be a number > 0, not nan"),
        (SFT, "rank", 2.5, "SFT.rank must be a whole number ≥ 1, not 2.5"),
        (SFT, "rank", True, "SFT.rank must be .*, not True"),
        (
            SFT,
            "dropout",
            1.0,
            "SFT.dropout must be a share of the inputs, ≥ 0 and below 1, not 1.0",
        ),
        (
            SFT,
            "targets",
            "all",
            'SFT.targets must be "attention", "linear" or a tuple of .*, not \'all\'',
        ),
        (SFT, "targets", (), r"SFT.targets must be .*, not \(\)"),
        (DPO, "beta", -1, "DPO.beta must be a number > 0, not -1"),
        (DPO, "warmup", 1, "DPO.warmup must be a share of the steps, .*, not 1$"),
        (Negatives, "candidates", 0, "Negatives.candidates must be a whole number ≥ 1, not 0"),
        (Negatives, "top_p", 1.5, "Negatives.top_p must be a number > 0 and ≤ 1, not 1.5"),
        (Recipe, "alpha", -0.1, "^Recipe.alpha must be a finite number ≥ 0, not -0.1: 0 is"),
        (Recipe, "alpha", 2.1, "^Recipe.alpha must be 2 at most, not 2.1"),
        (Recipe, "tau", 0, "^Recipe.tau must be a number > 0 and ≤ 1, not 0: 0.1 is"),
        (Recipe, "max_new_tokens", "many", "Recipe.max_new_tokens must be .*, not 'many'"),
        (Recipe, "seed", 2**32, "Recipe.seed must be below .*, not 4294967296"),
        (Recipe, "sft", {"rank": 8}, "Recipe.sft must be an instance of SFT, not "),
        (Recipe, "sft", None, "Recipe.sft must be an instance of SFT, not None"),
        (Recipe, "negatives", 3, "Recipe.negatives must be an instance of Negatives or None, not"),
    ],
)
def test_a_wrong_number_is_refused_with_what_was_expected(kind, option, value, message):
    with pytest.raises(ValueError, match=message):
        kind(**{option: value})


def test_a_choice_of_recipe_is_a_recipe_a_function_or_the_default():
    base, items = Sized(10**8), range(9)
    assert recipe_for(None, base, items) == Recipe.for_model(base, items)
    assert recipe_for(Recipe.paper(), base, items) == Recipe.paper()
    seeded = recipe_for(partial(Recipe.for_model, seed=3), base, items)
    assert seeded == replace(Recipe.for_model(base, items), seed=3)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="learning_rates"):
        SFT(learning_rates=1e-4)


def test_recipe_as_plain_data_survives_json():
    plain = Recipe(sft=SFT(targets=("q_proj",))).as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["sft"]["targets"] == ["q_proj"]


def test_recipe_and_pipeline_import_without_torch():
    modules = "langchain_cope.training.recipe, langchain_cope.training.pipeline"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "False"


def test_a_task_adapter_is_the_papers_with_larger_steps_for_smaller_bases() -> None:
    paper, small = (
        Recipe.for_task(Sized(number), []).sft for number in (7_000_000_000, 135_000_000)
    )
    assert (paper.rank, paper.lora_alpha, paper.epochs, paper.batch_size) == (16, 16, 3, 8)
    assert paper.learning_rate == 1e-4
    assert small == replace(paper, learning_rate=small.learning_rate)
    assert small.learning_rate == pytest.approx(4.8e-4)
