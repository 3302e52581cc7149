from dataclasses import replace

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file
from training.tiny import Heard, make_item, pairs_in

from langchain_cope.engine import Completion, Contrast, Engine, Request, Sampling
from langchain_cope.errors import Cancelled, HistoryError
from langchain_cope.evaluation.evaluate import evaluate, item_nll
from langchain_cope.evaluation.ways import WAYS
from langchain_cope.history.items import Item
from langchain_cope.training.encode import encode
from langchain_cope.training.pipeline import train_user
from langchain_cope.training.progress import Monitor, Stage

FILES = ("adapter_model.safetensors", "adapter_config.json")


def content(folder):
    return {
        f"{stage}/{file}": (folder / stage / file).read_bytes()
        for stage in ("sft", "dpo")
        for file in FILES
    }


@pytest.fixture
def held_out():
    return [make_item(number) for number in range(20, 23)]


def test_a_history_becomes_two_adapters_with_everything_said_about_it(
    engine, items, recipe, tmp_path
):
    monitor = Heard()
    result = train_user(engine, items, replace(recipe, max_new_tokens=None), tmp_path, monitor)
    assert (result.sft, result.dpo) == (tmp_path / "sft", tmp_path / "dpo")
    assert set(monitor.timings) == {"sft", "negatives", "dpo"}
    assert [pair.index for pair in pairs_in(tmp_path)] == list(range(6))
    assert result.notes == []
    completions = [encode(engine.base, item.messages, item.completion)[1] for item in items]
    longest = max(len(completion) for completion in completions)  # of six, all count
    assert result.recipe == replace(recipe, max_new_tokens=longest)
    stages = [progress.stage for progress in monitor.steps]
    assert list(dict.fromkeys(stages)) == ["sft", "negatives", "dpo"]
    assert all(p.step == p.total for p in monitor.steps if p.seconds_left == 0)


def test_training_another_user_changes_neither_adapter_nor_base(engine, items, recipe, tmp_path):
    weights = {name: tensor.clone() for name, tensor in engine.base.model.state_dict().items()}
    train_user(engine, items, recipe, tmp_path / "a")
    first = content(tmp_path / "a")
    others = [make_item(number, "never ever") for number in range(9)]
    train_user(engine, others, recipe, tmp_path / "b")
    assert content(tmp_path / "a") == first
    assert all(
        torch.equal(tensor, weights[name])
        for name, tensor in engine.base.model.state_dict().items()
    )
    # The second user's adapter holds nothing of the first's: it is the one that a process without
    # the first makes.
    train_user(engine, others, recipe, tmp_path / "b alone")
    assert content(tmp_path / "b") == content(tmp_path / "b alone")
    one, other = (load_file(tmp_path / user / "dpo" / FILES[0]) for user in ("a", "b"))
    assert not torch.equal(one.popitem()[1], other.popitem()[1])
    assert len(pairs_in(tmp_path / "b alone")) == 9


def test_without_any_negative_dpo_is_skipped_with_a_note(
    engine, items, recipe, tmp_path, monkeypatch
):
    empty = Completion("", (1,), "stop", 0.0)
    monkeypatch.setattr(engine, "generate_each", lambda requests, _: (empty for _ in requests))
    result = train_user(engine, items, recipe, tmp_path)
    files = content(tmp_path)
    assert all(files[f"sft/{file}"] == files[f"dpo/{file}"] for file in FILES)
    assert pairs_in(tmp_path) == []
    said = "DPO was skipped, as no item has a usable negative: the adapter is the one of SFT"
    assert result.notes[-1] == said


def test_a_recipe_without_negatives_mines_none(engine, items, recipe, tmp_path, monkeypatch):
    monkeypatch.delattr(Engine, "generate_each")
    result = train_user(engine, items, replace(recipe, negatives=None), tmp_path)
    files = content(tmp_path)
    assert all(files[f"sft/{file}"] == files[f"dpo/{file}"] for file in FILES)
    assert result.notes == [
        "DPO was skipped, as the recipe mines no negatives and the history has no rejected "
        "answers: the adapter is the one of SFT"
    ]


def test_given_pairs_are_trained_on_without_mining(engine, items, recipe, tmp_path):
    given = [items[0].model_copy(update={"rejected": ("not that",)}), *items[1:]]
    train_user(engine, given, replace(recipe, negatives=None), tmp_path)
    assert [(pair.index, pair.rejected) for pair in pairs_in(tmp_path)] == [(0, "not that")]
    files = content(tmp_path)
    assert files[f"sft/{FILES[0]}"] != files[f"dpo/{FILES[0]}"]


def test_where_dpo_was_skipped_nothing_is_evaluated_twice(
    engine, items, held_out, recipe, tmp_path, monkeypatch
):
    asked = []
    generate_each = engine.generate_each

    def overheard(requests, should_stop):
        asked.extend(requests)
        return generate_each(asked, should_stop)

    result = train_user(engine, items, replace(recipe, negatives=None), tmp_path)
    monkeypatch.setattr(engine, "generate_each", overheard)
    monitor = Monitor()
    with monitor.stage(Stage.EVALUATE):
        evaluation = evaluate(engine, held_out, result.recipe, tmp_path, monitor)
    assert len(asked) == 3 * len(held_out)  # base, SFT alone, SFT with contrast
    assert evaluation.metrics["dpo"] == evaluation.metrics["sft"]
    assert evaluation.item_nll["dpo"] == evaluation.item_nll["sft"]
    assert evaluation.item_nll["sft"] != evaluation.item_nll["base"]


def test_what_was_cut_is_said(engine, items, recipe, tmp_path):
    long = Item(prompt="word " * 200, completion=items[0].completion)
    result = train_user(engine, [*items, long], recipe, tmp_path)
    assert result.notes == ["1 of 7 items had a prompt too long for 256 tokens in all, cut"]


@pytest.mark.parametrize("stage", ["sft", "negatives", "dpo"])
def test_a_stop_is_heard_in_every_stage(engine, items, recipe, tmp_path, stage):
    monitor = Heard(stop=lambda steps: bool(steps) and steps[-1].stage == stage)
    several_steps = replace(recipe, dpo=replace(recipe.dpo, batch_size=2))
    with pytest.raises(Cancelled):
        train_user(engine, items, several_steps, tmp_path, monitor)
    assert monitor.steps[-1].stage == stage
    assert not (tmp_path / "dpo").exists()


@pytest.mark.parametrize("history", [[], [make_item(0)]])
def test_history_without_a_usable_item_is_refused(engine, recipe, tmp_path, history):
    refusal = f"none of the history's {len(history)} items can be trained on"
    with pytest.raises(HistoryError, match=refusal):
        train_user(engine, history, replace(recipe, max_length=5), tmp_path)


def test_an_evaluation_holds_the_metrics_and_the_texts_behind_them(
    engine, items, held_out, recipe, tmp_path
):
    result = train_user(engine, items, recipe, tmp_path)
    monitor = Heard()
    with monitor.stage(Stage.EVALUATE):
        evaluation = evaluate(engine, held_out, result.recipe, tmp_path, monitor)
    metrics, texts = evaluation.metrics, evaluation.texts
    assert list(metrics) == [way.name for way in WAYS]
    assert {name: set(values) for name, values in metrics.items()} == {
        "base": {"rouge1", "rougeL", "nll"},
        "sft": {"rouge1", "rougeL", "nll"},
        "dpo": {"rouge1", "rougeL", "nll"},
        "cope": {"rouge1", "rougeL"},
    }
    assert metrics["sft"]["nll"] < metrics["base"]["nll"]
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    for name, values in metrics.items():
        scores = [scorer.score(text["reference"], text[name])["rougeL"].fmeasure for text in texts]
        assert values["rougeL"] == pytest.approx(sum(scores) / 3)
    assert [text["reference"] for text in texts] == [item.completion for item in held_out]
    prompt = engine.base.prompt_ids(held_out[0].messages)
    dpo = engine.load_adapter(result.dpo)
    requests = [
        Request(prompt, adapter=adapter, contrast=Contrast(alpha), sampling=Sampling(8))
        for adapter, alpha in ((None, 0.0), (dpo, 0.0), (dpo, 0.1))
    ]
    answers = [completion.text for completion in engine.generate(requests)]
    assert answers == [texts[0][name] for name in ("base", "dpo", "cope")]
    assert [(p.stage, p.step, p.total) for p in monitor.steps] == [
        ("evaluate", step, 3) for step in (1, 2, 3)
    ]


def test_item_nll_is_that_of_a_plain_forward_over_completions(engine, held_out, recipe):
    plain = []
    for item in held_out:
        prompt, completion = encode(engine.base, item.messages, item.completion)
        with torch.no_grad():
            ids = torch.tensor([prompt + completion], device=engine.base.device)
            logits = engine.base.model(input_ids=ids).logits[0].cpu()
        scores = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        plain.append(-scores.gather(1, torch.tensor(completion)[:, None]).mean().item())
    assert item_nll(engine, held_out, recipe) == pytest.approx(plain, abs=1e-5)


def test_evaluation_without_items_is_refused(engine, recipe, tmp_path):
    with pytest.raises(ValueError, match="none of 0 items can be evaluated on: there are none"):
        evaluate(engine, [], recipe, tmp_path, Monitor())
    refusal = "none of 1 items can be evaluated on: 1 of 1 items dropped"
    with pytest.raises(ValueError, match=refusal):
        item_nll(engine, [make_item(0)], replace(recipe, max_length=5))
