from dataclasses import replace

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from safetensors.torch import load_file
from training.tiny import example

from langchain_cope.engine import Completion, Contrast, Request, Sampling
from langchain_cope.errors import Cancelled, HistoryError
from langchain_cope.evaluation.evaluate import evaluate, mean_nll
from langchain_cope.training.encode import encode
from langchain_cope.training.pipeline import train_user

FILES = ("adapter_model.safetensors", "adapter_config.json")


def content(folder):
    return {
        f"{stage}/{file}": (folder / stage / file).read_bytes()
        for stage in ("sft", "dpo")
        for file in FILES
    }


@pytest.fixture
def held_out():
    return [example(number) for number in range(20, 23)]


def test_a_history_becomes_two_adapters_with_everything_said_about_it(
    engine, examples, recipe, tmp_path
):
    heard = []
    result = train_user(
        engine, examples, replace(recipe, max_new_tokens=None), tmp_path, on_progress=heard.append
    )
    assert (result.sft, result.dpo) == (tmp_path / "sft", tmp_path / "dpo")
    assert set(result.timings) == {"sft", "negatives", "dpo"}
    assert [negative.index for negative in result.negatives] == list(range(6))
    assert result.notes == []
    longest = max(len(encode(engine.base, e.prompt, e.completion)[1]) for e in examples)
    assert result.recipe == replace(recipe, max_new_tokens=longest)
    assert list(dict.fromkeys(progress.stage for progress in heard)) == ["sft", "negatives", "dpo"]
    assert all(p.step == p.total for p in heard if p.seconds_left == 0)


def test_training_another_user_changes_neither_the_first_users_adapter_nor_the_base(
    engine, examples, recipe, tmp_path
):
    weights = {name: tensor.clone() for name, tensor in engine.base.model.state_dict().items()}
    train_user(engine, examples, recipe, tmp_path / "a")
    first = content(tmp_path / "a")
    others = [example(number, "never ever") for number in range(9)]
    train_user(engine, others, recipe, tmp_path / "b")
    assert content(tmp_path / "a") == first
    assert all(
        torch.equal(tensor, weights[name])
        for name, tensor in engine.base.model.state_dict().items()
    )
    # The second user's adapter holds nothing of the first's: it is the one that a process without the first makes.
    alone = train_user(engine, others, recipe, tmp_path / "b alone")
    assert content(tmp_path / "b") == content(tmp_path / "b alone")
    assert not torch.equal(
        *(load_file(tmp_path / user / "dpo" / FILES[0]).popitem()[1] for user in ("a", "b"))
    )
    assert len(alone.negatives) == 9


def test_without_any_negative_dpo_is_skipped_and_that_is_said(
    engine, examples, recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        engine,
        "generate",
        lambda requests, _: [Completion("", (1,), "stop", 0.0) for _ in requests],
    )
    result = train_user(engine, examples, recipe, tmp_path)
    made = content(tmp_path)
    assert all(made[f"sft/{file}"] == made[f"dpo/{file}"] for file in FILES)
    assert result.negatives == []
    assert (
        result.notes[-1]
        == "DPO was skipped, as no item has a usable negative: the adapter is the one of SFT"
    )


def test_what_was_cut_is_said(engine, examples, recipe, tmp_path):
    long = [{"role": "user", "content": "word " * 200}]
    result = train_user(engine, [*examples, replace(examples[0], prompt=long)], recipe, tmp_path)
    assert result.notes == ["1 of 7 items had a prompt too long for 256 tokens in all, cut"]


@pytest.mark.parametrize("stage", ["sft", "negatives", "dpo"])
def test_a_stop_is_heard_in_every_stage(engine, examples, recipe, tmp_path, stage):
    heard = []
    with pytest.raises(Cancelled):
        train_user(
            engine,
            examples,
            replace(recipe, dpo=replace(recipe.dpo, batch_size=2)),
            tmp_path,
            on_progress=heard.append,
            should_stop=lambda: bool(heard) and heard[-1].stage == stage,
        )
    assert heard[-1].stage == stage
    assert not (tmp_path / "dpo").exists()


@pytest.mark.parametrize("history", [[], [example(0)]])
def test_history_without_a_usable_item_is_refused(engine, recipe, tmp_path, history):
    with pytest.raises(
        HistoryError, match=f"none of the history's {len(history)} items can be trained on"
    ):
        train_user(engine, history, replace(recipe, max_length=5), tmp_path)


def test_evaluation_holds_the_contracts_metrics_and_the_texts_behind_them(
    engine, examples, held_out, recipe, tmp_path
):
    result = train_user(engine, examples, recipe, tmp_path)
    heard = []
    found = evaluate(
        engine, held_out, result.recipe, sft=result.sft, dpo=result.dpo, on_progress=heard.append
    )
    assert {name: set(values) for name, values in found.metrics.items()} == {
        "base": {"rouge1", "rougeL", "nll"},
        "sft": {"rouge1", "rougeL", "nll"},
        "dpo": {"rouge1", "rougeL", "nll"},
        "cope": {"rouge1", "rougeL"},
    }
    assert found.metrics["sft"]["nll"] < found.metrics["base"]["nll"]
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    for name, values in found.metrics.items():
        scores = [
            scorer.score(text["reference"], text[name])["rougeL"].fmeasure for text in found.texts
        ]
        assert values["rougeL"] == pytest.approx(sum(scores) / 3)
    assert [text["reference"] for text in found.texts] == [item.completion for item in held_out]
    dpo = engine.load_adapter(result.dpo)
    requests = [
        Request(
            engine.base.prompt_ids(held_out[0].prompt),
            adapter=adapter,
            contrast=Contrast(alpha),
            sampling=Sampling(8),
        )
        for adapter, alpha in ((None, 0.0), (dpo, 0.0), (dpo, 0.1))
    ]
    texts = [completion.text for completion in engine.generate(requests)]
    assert texts == [found.texts[0][name] for name in ("base", "dpo", "cope")]
    assert [(p.stage, p.step, p.total) for p in heard] == [("evaluate", 3, 3)]


def test_mean_nll_is_that_of_a_plain_forward_over_completion_tokens_only(engine, held_out, recipe):
    total, count = 0.0, 0
    for item in held_out:
        prompt, completion = encode(engine.base, item.prompt, item.completion)
        with torch.no_grad():
            scores = (
                engine.base.model(input_ids=torch.tensor([prompt + completion]))
                .logits[0]
                .log_softmax(-1)
            )
        total -= (
            scores[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None]).sum().item()
        )
        count += len(completion)
    assert mean_nll(engine, held_out, recipe) == pytest.approx(total / count, abs=1e-5)


def test_evaluation_without_items_is_refused(engine, recipe, tmp_path):
    with pytest.raises(ValueError, match="none of 0 items can be evaluated on: there are none"):
        evaluate(engine, [], recipe, sft=tmp_path, dpo=tmp_path)
    with pytest.raises(
        ValueError, match="none of 1 items can be evaluated on: 1 of 1 items dropped"
    ):
        mean_nll(engine, [example(0)], replace(recipe, max_length=5))
