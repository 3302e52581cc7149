from collections import Counter
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from langchain_cope.engine import Completion
from langchain_cope.errors import Cancelled
from langchain_cope.training import negatives
from langchain_cope.training.encode import closing_ids, encode, fit
from langchain_cope.training.negatives import mine_negatives
from langchain_cope.training.progress import Watch
from langchain_cope.training.sft import train_sft


@pytest.fixture
def mining(engine, examples, recipe, watch, tmp_path):
    """Items and the folder of an SFT adapter for them."""
    items, _ = fit(engine.base, examples, 2048, 768)
    train_sft(engine.base, items, recipe, tmp_path / "sft", watch)
    return items, tmp_path / "sft"


class Overheard:
    """The engine, remembering what it answered."""

    def __init__(self, engine):
        self.engine, self.base = engine, engine.base
        self.requests, self.answers = [], []

    def generate(self, requests, should_stop):
        answers = self.engine.generate(requests, should_stop)
        self.requests += requests
        self.answers += answers
        return answers

    def score(self, *arguments):
        return self.engine.score(*arguments)


class Scripted(Overheard):
    """The engine, except that it answers what the test says."""

    def __init__(self, engine, answers):
        super().__init__(engine)
        self.script = iter(answers)

    def generate(self, requests, should_stop):
        return [
            Completion(text, (1,), reason, 0.0)
            for text, reason in [next(self.script) for _ in requests]
        ]


def mean_log_ratio(base, folder, prompt, completion):
    """The reward, by two plain forwards in float64 of separately loaded models."""
    means = []
    for adapter in (folder, None):
        model = AutoModelForCausalLM.from_pretrained(base.name, dtype=torch.float64)
        model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
        with torch.no_grad():
            scores = (
                model.eval()(input_ids=torch.tensor([prompt + completion]))
                .logits[0]
                .log_softmax(-1)
            )
        means.append(
            scores[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None]).mean().item()
        )
    return means[0] - means[1]


def test_mined_negative_is_the_argmin_of_independently_computed_rewards(
    engine, mining, recipe, watch
):
    items, sft = mining
    overheard = Overheard(engine)
    pairs, notes = mine_negatives(overheard, items, recipe, engine.load_adapter(sft), watch)
    assert [pair.index for pair in pairs] == list(range(6))
    closing = closing_ids(engine.base)
    reasons = Counter(answer.finish_reason for answer in overheard.answers)
    for place, (item, pair) in enumerate(zip(items, pairs, strict=True)):
        rewards = {}
        for answer in overheard.answers[place * 3 : place * 3 + 3]:
            if answer.text.strip():
                prompt, completion = encode(engine.base, item.example.prompt, answer.text)
                completion = (
                    completion if answer.finish_reason == "stop" else completion[: -len(closing)]
                )
                rewards[answer.text] = (
                    mean_log_ratio(engine.base, sft, prompt, completion),
                    completion,
                )
        text, (reward, completion) = min(rewards.items(), key=lambda pair: pair[1][0])
        assert (pair.rejected, pair.rejected_ids) == (text, completion)
        assert pair.reward == pytest.approx(reward, abs=1e-5)
        assert (pair.prompt_ids, pair.chosen_ids) == (item.prompt_ids, item.completion_ids)
    assert reasons["length"] > 0
    assert notes == []


def test_candidates_are_sampled_from_the_base_as_the_recipe_says_each_with_its_own_seed(
    engine, mining, recipe, watch
):
    items, sft = mining
    overheard = Overheard(engine)
    mine_negatives(overheard, items, recipe, engine.load_adapter(sft), watch)
    assert len({request.sampling.seed for request in overheard.requests}) == 18
    for request in overheard.requests:
        sampling = request.sampling
        assert request.adapter is None
        assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (1.0, 0.95, 8)


def test_same_seed_mines_the_same_negatives_however_items_are_batched(
    engine, mining, recipe, watch, monkeypatch
):
    items, sft = mining
    adapter = engine.load_adapter(sft)
    together = [p.rejected for p in mine_negatives(engine, items, recipe, adapter, watch)[0]]
    monkeypatch.setattr(negatives, "ITEMS_A_BATCH", 2)
    assert [
        p.rejected for p in mine_negatives(engine, items, recipe, adapter, watch)[0]
    ] == together
    other = mine_negatives(engine, items, replace(recipe, seed=1), adapter, watch)[0]
    assert [p.rejected for p in other] != together


def test_cut_candidates_have_no_end_of_turn_and_others_have_one(engine, mining, recipe, watch):
    items, sft = mining
    scripted = Scripted(engine, [("cut sho", "length")] * 3 + [("all of it", "stop")] * 3)
    pairs, _ = mine_negatives(scripted, items[:2], recipe, engine.load_adapter(sft), watch)
    assert [engine.base.tokenizer.decode(pair.rejected_ids) for pair in pairs] == [
        "cut sho",
        "all of it<|end|>",
    ]


def test_empty_candidates_and_copies_are_dropped_and_items_without_any_are_skipped(
    engine, mining, recipe, watch
):
    items, sft = mining
    copy = f" {items[1].example.completion}\n"
    script = [
        ("", "stop"),
        (" \n", "stop"),
        ("fine", "stop"),
        (copy, "stop"),
        (copy, "stop"),
        ("", "length"),
    ]
    pairs, notes = mine_negatives(
        Scripted(engine, script), items[:2], recipe, engine.load_adapter(sft), watch
    )
    assert [(pair.index, pair.rejected) for pair in pairs] == [(0, "fine")]
    assert notes == [
        "5 of 6 candidates dropped: empty or the user's own text",
        "1 of 2 items skip DPO: no usable candidate",
    ]


def test_mining_stops_between_batches(engine, mining, recipe, monkeypatch):
    items, sft = mining
    monkeypatch.setattr(negatives, "ITEMS_A_BATCH", 2)
    heard = []
    watch = Watch("negatives", heard.append, lambda: len(heard) == 2)
    with pytest.raises(Cancelled, match="'negatives'"):
        mine_negatives(engine, items, recipe, engine.load_adapter(sft), watch)
    assert [(progress.step, progress.total) for progress in heard] == [(2, 6), (4, 6)]
