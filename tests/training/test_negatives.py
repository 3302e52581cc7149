import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import DEVICE, THINKS_FIRST, make_adapter, make_model
from training.tiny import Heard, make_item
from transformers import AutoModelForCausalLM, AutoTokenizer

from langchain_cope.engine import STARTER, Completion, Engine, load_base
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
        self.requests, self.answers, self.scored = [], [], []

    def generate_each(self, requests, should_stop):
        requests = list(requests)
        self.requests += requests
        for answer in self.engine.generate_each(requests, should_stop):
            self.answers.append(answer)
            yield answer

    def score(self, sequences, adapter, should_stop):
        self.scored.append((sequences, adapter))
        return self.engine.score(sequences, adapter, should_stop)


class Scripted(Overheard):
    """The engine, except that it answers what the test says."""

    def __init__(self, engine, answers):
        super().__init__(engine)
        self.script = iter(answers)

    def generate_each(self, requests, should_stop):
        for _ in requests:
            text, reason = next(self.script)
            yield Completion(text, (1,), reason, 0.0)


def independent_model(base, folder=None):
    """The base, or with an adapter, loaded by itself in float64."""
    model = AutoModelForCausalLM.from_pretrained(base.source, dtype=torch.float64)
    return (PeftModel.from_pretrained(model, folder) if folder else model).eval()


@torch.no_grad()
def log_probs(model, prompt, completion):
    """By a plain forward of its own."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    scores = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return scores.gather(1, torch.tensor(completion)[:, None])


def test_mined_negative_is_the_argmin_of_independently_computed_rewards(
    engine, mining, recipe, monitor
):
    examples, sft = mining
    overheard = Overheard(engine)
    pairs, notes = mine_negatives(overheard, examples, recipe, engine.load_adapter(sft), monitor)
    assert [pair.index for pair in pairs] == list(range(6))
    closing = closing_ids(engine.base)
    reasons = Counter(answer.finish_reason for answer in overheard.answers)
    by_base, by_sft = independent_model(engine.base), independent_model(engine.base, sft)
    for index, (example, pair) in enumerate(zip(examples, pairs, strict=True)):
        rewards = {}
        for answer in overheard.answers[index * 3 : index * 3 + 3]:
            if answer.text.strip():
                prompt, completion = encode(engine.base, example.item.messages, answer.text)
                if answer.finish_reason != "stop":
                    completion = completion[: -len(closing)]
                means = [
                    log_probs(model, prompt, completion).mean().item()
                    for model in (by_sft, by_base)
                ]
                rewards[answer.text] = (means[0] - means[1], completion)
        text, (reward, completion) = min(rewards.items(), key=lambda pair: pair[1][0])
        assert (pair.rejected, pair.rejected_ids) == (text, completion)
        assert pair.reward == pytest.approx(reward, abs=1e-5)
        assert (pair.prompt_ids, pair.chosen_ids) == (
            example.prompt_ids,
            example.completion_ids,
        )
        for ids, known in (
            (pair.chosen_ids, pair.chosen_base_log_prob),
            (pair.rejected_ids, pair.rejected_base_log_prob),
        ):
            expected = log_probs(by_base, pair.prompt_ids, ids).sum().item()
            assert known == pytest.approx(expected, abs=1e-4)
    assert reasons["length"] > 0
    assert reasons["stop"] > 0, "some whose template text after the end is read as well"
    num_empty = sum(not answer.text.strip() for answer in overheard.answers)
    assert [note.split()[0] for note in notes] == [str(num_empty)] * bool(num_empty)


@pytest.fixture(scope="module")
def starter():
    """The engine of a pretrained base, which writes words as a tokenizer does."""
    engine = Engine.of(load_base(STARTER, device=DEVICE, dtype="float32"))
    yield engine
    engine.close()


def test_the_base_scores_only_what_it_did_not_sample(starter, recipe, monitor, tmp_path):
    recipe = replace(recipe, max_new_tokens=24)
    examples, _ = fit(starter.base, [make_item(number) for number in range(4)], 2048, 768)
    train_sft(starter.base, examples, recipe, tmp_path, monitor)
    overheard = Overheard(starter)
    adapter = starter.load_adapter(tmp_path)
    pairs, _ = mine_negatives(overheard, examples, recipe, adapter, monitor)
    rewritten = []
    for index, answer in enumerate(overheard.answers):
        item = examples[index // 3].item
        prompt, completion = encode(starter.base, item.messages, answer.text)
        sampled = [*starter.base.prompt_ids(item.messages), *answer.token_ids]
        if answer.text.strip() and (prompt + completion)[: len(sampled)] != sampled:
            rewritten.append(answer.text)
    assert len(rewritten) < len(overheard.answers) / 2
    assert {answer.finish_reason for answer in overheard.answers} == {"stop", "length"}
    by_base = [sequences for sequences, adapter in overheard.scored if adapter is None]
    ids = [completion for of_call in by_base for _, completion in of_call]
    texts = [starter.base.tokenizer.decode(each, skip_special_tokens=True) for each in ids]
    own = [example.item.completion for example in examples]
    assert sorted(text.strip() for text in texts) == sorted(
        text.strip() for text in own + rewritten
    )
    model, by_sft = independent_model(starter.base), independent_model(starter.base, tmp_path)
    for pair in pairs:
        base = log_probs(model, pair.prompt_ids, pair.rejected_ids)
        reward = (log_probs(by_sft, pair.prompt_ids, pair.rejected_ids) - base).mean().item()
        assert pair.reward == pytest.approx(reward, abs=1e-5)
        assert pair.rejected_base_log_prob == pytest.approx(base.sum().item(), abs=1e-3)


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
        "5 of 6 candidates dropped: empty or nearly the user's own text",
        "1 of 2 items skip DPO: no usable candidate",
    ]


def test_near_copies_of_the_users_text_are_dropped(engine, recipe, monitor, mining):
    _, sft = mining
    item = make_item(0).model_copy(update={"completion": "Meet me at the old bridge at nine."})
    examples, _ = fit(engine.base, [item], 2048, 768)
    answers = ["meet me at the old bridge at ten!", "Let us meet another day, not now.", ""]
    script = Scripted(engine, [(answer, "stop") for answer in answers])
    pairs, _ = mine_negatives(script, examples, recipe, engine.load_adapter(sft), monitor)
    assert [pair.rejected for pair in pairs] == [answers[1]]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """An engine of a base whose replies begin in a thought, which most of them end."""
    folder = make_model(
        tmp_path_factory.mktemp("thinker"), template=THINKS_FIRST, marks=("<think>", "</think>")
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("</think>")
    with torch.no_grad():
        model.get_output_embeddings().weight[end] *= 4
    model.save_pretrained(folder)
    engine = Engine.of(load_base(folder, device=DEVICE))
    yield engine
    engine.close()


def test_what_the_base_thought_is_no_part_of_a_negative(thinker, items, recipe, monitor, tmp_path):
    adapter = make_adapter(tmp_path / "sft", Path(thinker.base.name), seed=1)
    examples, _ = fit(thinker.base, items, 200, 768)
    overheard = Overheard(thinker)
    pairs, notes = mine_negatives(
        overheard,
        examples,
        replace(recipe, max_new_tokens=16),
        thinker.load_adapter(adapter),
        monitor,
    )
    shown = [
        [token for token in answer.token_ids if token not in thinker.base.hidden_ids]
        for answer in overheard.answers
    ]
    replies = [thinker.base.tokenizer.decode(ids) for ids in shown]
    thought = re.compile(r"<think>.*?(</think>[ \t\n\r\f\v]*|$)", re.DOTALL)
    answers = [thought.sub("", f"<think>{reply}") for reply in replies]
    assert [answer.text for answer in overheard.answers] == answers
    assert {pair.rejected for pair in pairs} <= set(answers) - {""}
    assert len(pairs) > 3
    assert (
        notes[0]
        == f"{answers.count('')} of 18 candidates dropped: empty or nearly the user's own text"
    )


def test_mining_stops_between_batches(engine, mining, recipe, monkeypatch):
    examples, sft = mining
    monkeypatch.setattr(negatives, "ITEMS_A_BATCH", 2)
    monitor = Heard(stop=lambda steps: len(steps) == 2)
    with pytest.raises(Cancelled, match="'negatives'"), monitor.stage(Stage.NEGATIVES):
        mine_negatives(engine, examples, recipe, engine.load_adapter(sft), monitor)
    assert [(progress.step, progress.total) for progress in monitor.steps] == [(2, 6), (4, 6)]
