from collections import Counter
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from training.tiny import Heard
from transformers import AutoModelForCausalLM

from langchain_cope.engine import Completion
from langchain_cope.errors import Cancelled
from langchain_cope.training import negatives
from langchain_cope.training.encode import closing_ids, encode, fit
from langchain_cope.training.negatives import mine_negatives
from langchain_cope.training.progress import Stage
from langchain_cope.training.sft import train_sft


@pytest.fixture
def mining(engine, items, recipe, monitor, tmp_path):
    """Items and the folder of an SFT adapter for them."""
    examples, _ = fit(engine.base, items, 2048, 768)
    train_sft(engine.base, examples, recipe, tmp_path / "sft", monitor)
    return examples, tmp_path / "sft"


class Overheard:
    """The engine, remembering what it answered."""

    def __init__(self, engine):
        self.engine, self.base = engine, engine.base
        self.requests, self.answers = [], []

    def generate_each(self, requests, should_stop):
        requests = list(requests)
        self.requests += requests
        for answer in self.engine.generate_each(requests, should_stop):
            self.answers.append(answer)
            yield answer

    def score(self, *arguments):
        return self.engine.score(*arguments)


class Scripted(Overheard):
    """The engine, except that it answers what the test says."""

    def __init__(self, engine, answers):
        super().__init__(engine)
        self.script = iter(answers)

    def generate_each(self, requests, should_stop):
        for _ in requests:
            text, reason = next(self.script)
            yield Completion(text, (1,), reason, 0.0)


def mean_log_ratio(base, folder, prompt, completion):
    """The reward, by two plain forwards in float64 of separately loaded models."""
    means = []
    for adapter in (folder, None):
        model = AutoModelForCausalLM.from_pretrained(base.name, dtype=torch.float64)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([prompt + completion])).logits[0]
        scores = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        means.append(scores.gather(1, torch.tensor(completion)[:, None]).mean().item())
    return means[0] - means[1]


def test_mined_negative_is_the_argmin_of_independently_computed_rewards(
    engine, mining, recipe, monitor
):
    examples, sft = mining
    overheard = Overheard(engine)
    pairs, notes = mine_negatives(overheard, examples, recipe, engine.load_adapter(sft), monitor)
    assert [pair.index for pair in pairs] == list(range(6))
    closing = closing_ids(engine.base)
    reasons = Counter(answer.finish_reason for answer in overheard.answers)
    for index, (example, pair) in enumerate(zip(examples, pairs, strict=True)):
        rewards = {}
        for answer in overheard.answers[index * 3 : index * 3 + 3]:
            if answer.text.strip():
                prompt, completion = encode(engine.base, example.item.messages, answer.text)
                if answer.finish_reason != "stop":
                    completion = completion[: -len(closing)]
                reward = mean_log_ratio(engine.base, sft, prompt, completion)
                rewards[answer.text] = (reward, completion)
        text, (reward, completion) = min(rewards.items(), key=lambda pair: pair[1][0])
        assert (pair.rejected, pair.rejected_ids) == (text, completion)
        assert pair.reward == pytest.approx(reward, abs=1e-5)
        assert (pair.prompt_ids, pair.chosen_ids) == (
            example.prompt_ids,
            example.completion_ids,
        )
    assert reasons["length"] > 0
    assert notes == []


def test_candidates_are_sampled_from_the_base_with_a_seed_each(engine, mining, recipe, monitor):
    examples, sft = mining
    overheard = Overheard(engine)
    mine_negatives(overheard, examples, recipe, engine.load_adapter(sft), monitor)
    assert len({request.sampling.seed for request in overheard.requests}) == 18
    for request in overheard.requests:
        sampling = request.sampling
        assert request.adapter is None
        assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (1.0, 0.95, 8)


def test_same_seed_mines_the_same_negatives_however_items_are_batched(
    engine, mining, recipe, monitor, monkeypatch
):
    examples, sft = mining
    adapter = engine.load_adapter(sft)

    def mined(recipe):
        pairs, _ = mine_negatives(engine, examples, recipe, adapter, monitor)
        return [pair.rejected for pair in pairs]

    together = mined(recipe)
    monkeypatch.setattr(negatives, "ITEMS_A_BATCH", 2)
    assert mined(recipe) == together
    assert mined(replace(recipe, seed=1)) != together


def test_cut_candidates_have_no_end_of_turn_and_others_have_one(engine, mining, recipe, monitor):
    examples, sft = mining
    scripted = Scripted(engine, [("cut sho", "length")] * 3 + [("all of it", "stop")] * 3)
    pairs, _ = mine_negatives(scripted, examples[:2], recipe, engine.load_adapter(sft), monitor)
    assert [engine.base.tokenizer.decode(pair.rejected_ids) for pair in pairs] == [
        "cut sho",
        "all of it<|end|>",
    ]


def test_empty_candidates_and_copies_are_dropped(engine, mining, recipe, monitor):
    examples, sft = mining
    copy = f" {examples[1].item.completion}\n"
    script = [
        ("", "stop"),
        (" \n", "stop"),
        ("fine", "stop"),
        (copy, "stop"),
        (copy, "stop"),
        ("", "length"),
    ]
    pairs, notes = mine_negatives(
        Scripted(engine, script), examples[:2], recipe, engine.load_adapter(sft), monitor
    )
    assert [(pair.index, pair.rejected) for pair in pairs] == [(0, "fine")]
    assert notes == [
        "5 of 6 candidates dropped: empty or the user's own text",
        "1 of 2 items skip DPO: no usable candidate",
    ]


def test_mining_stops_between_batches(engine, mining, recipe, monkeypatch):
    examples, sft = mining
    monkeypatch.setattr(negatives, "ITEMS_A_BATCH", 2)
    monitor = Heard(stop=lambda steps: len(steps) == 2)
    with pytest.raises(Cancelled, match="'negatives'"), monitor.stage(Stage.NEGATIVES):
        mine_negatives(engine, examples, recipe, engine.load_adapter(sft), monitor)
    assert [(progress.step, progress.total) for progress in monitor.steps] == [(2, 6), (4, 6)]
