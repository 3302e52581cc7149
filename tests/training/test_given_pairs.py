"""Pairs that the history gives reach DPO as they are, beside mined ones; on a tiny model that is really trained."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from training.tiny import example
from transformers import AutoModelForCausalLM

from langchain_cope.training import dpo
from langchain_cope.training.encode import Example, encode, fit
from langchain_cope.training.negatives import given_pairs
from langchain_cope.training.pipeline import train_user

WORSE = ("nothing of the sort", "no, never")


def log_prob(base, folder, item, text):
    """Of an answer to the item's prompt: a plain forward in float64 of a separately loaded model."""
    model = AutoModelForCausalLM.from_pretrained(base.name, dtype=torch.float64)
    model = model if folder is None else PeftModel.from_pretrained(model, folder)
    prompt, completion = encode(base, item.prompt, text)
    with torch.no_grad():
        scores = (
            model.eval()(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        )
    return scores[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None]).sum().item()


@pytest.fixture
def mixed(examples):
    """Six items; of the second and the fifth it is known what was rejected."""
    known = {1: WORSE[:1], 4: WORSE}
    return [replace(item, rejected=known.get(place, ())) for place, item in enumerate(examples)]


@pytest.fixture
def trained_pairs(monkeypatch):
    """Everything that DPO was given, overheard."""
    heard = []
    trainer = dpo.dpo_trainer
    monkeypatch.setattr(
        dpo,
        "dpo_trainer",
        lambda base, pairs, *rest: heard.extend(pairs) or trainer(base, pairs, *rest),
    )
    return heard


def test_given_pairs_are_the_chosen_and_rejected_texts_as_token_ids(base, mixed, recipe):
    items, _ = fit(base, mixed, 2048, 768)
    pairs, notes = given_pairs(base, items, recipe)
    assert [(pair.index, pair.rejected, pair.reward) for pair in pairs] == [
        (1, WORSE[0], None),
        (4, WORSE[0], None),
        (4, WORSE[1], None),
    ]
    for pair in pairs:
        prompt, chosen = encode(base, mixed[pair.index].prompt, mixed[pair.index].completion)
        assert (pair.prompt_ids, pair.chosen_ids) == (prompt, chosen)
        assert (pair.prompt_ids, pair.rejected_ids) == encode(
            base, mixed[pair.index].prompt, pair.rejected
        )
    assert notes == [
        "3 pairs of a chosen and a rejected answer were given; no negative is mined for their items"
    ]


def test_given_and_mined_pairs_train_together_and_only_items_without_pairs_are_mined(
    engine, mixed, recipe, tmp_path, trained_pairs
):
    result = train_user(engine, mixed, recipe, tmp_path)
    assert [pair.index for pair in trained_pairs] == [0, 1, 2, 3, 4, 4, 5]
    given = [pair for pair in trained_pairs if pair.reward is None]
    assert [(pair.index, pair.rejected) for pair in given] == [
        (1, WORSE[0]),
        (4, WORSE[0]),
        (4, WORSE[1]),
    ]
    assert [(n.index, n.text, n.reward) for n in result.negatives] == [
        (pair.index, pair.rejected, pair.reward) for pair in trained_pairs
    ]
    assert all(isinstance(n.reward, float) for n in result.negatives if n.index not in (1, 4))
    assert any(
        note.startswith("3 pairs of a chosen and a rejected answer were given")
        for note in result.notes
    )


def test_what_is_mined_for_the_others_does_not_depend_on_the_pairs(
    engine, examples, recipe, tmp_path, trained_pairs
):
    pairs = [*examples[:5], replace(examples[5], rejected=WORSE[:1])]
    with_pair = train_user(engine, pairs, recipe, tmp_path / "pair").negatives
    without = train_user(engine, examples, recipe, tmp_path / "none").negatives
    assert with_pair[:5] == without[:5]  # SFT learns the same items either way
    assert with_pair[5] != without[5]


def test_a_history_of_pairs_alone_is_trained_and_the_rejected_answer_loses_most(
    engine, recipe, tmp_path
):
    rejected = "nothing of the sort"
    items = [replace(example(number), rejected=(rejected,)) for number in range(6)]
    harder = replace(recipe, dpo=replace(recipe.dpo, epochs=4, beta=0.1))
    result = train_user(engine, items, harder, tmp_path)
    assert [negative.text for negative in result.negatives] == [rejected] * 6

    def margin(folder):
        gains = [
            log_prob(engine.base, folder, item, item.completion)
            - log_prob(engine.base, folder, item, rejected)
            for item in items
        ]
        return sum(gains) / len(gains)

    assert margin(None) < margin(result.sft) < margin(result.dpo) - 1


def test_a_rejected_answer_is_cut_like_a_completion(base, recipe):
    long = Example([{"role": "user", "content": "two?"}], "2", ("x" * 400, "one two three"))
    items, _ = fit(base, [long], 2048, 768)
    pairs, _ = given_pairs(base, items, recipe)
    assert len(pairs[0].prompt_ids) + len(pairs[0].rejected_ids) == base.context == 256
    assert base.tokenizer.decode(pairs[1].rejected_ids) == "one two three<|end|>"
    items, notes = fit(base, [replace(long, rejected=("one two three",))], 2048, 2)
    assert items[0].example.rejected == ("one two",)
    assert notes == ["1 of 1 items had a field of more than 2 words, cut there"]


def test_a_pair_without_room_for_its_rejected_answer_is_dropped_and_that_is_said(base, recipe):
    (item,), _ = fit(
        base, [Example([{"role": "user", "content": "two?"}], "2", ("no",))], 2048, 768
    )
    pairs, notes = given_pairs(base, [item], replace(recipe, max_length=len(item.prompt_ids)))
    assert pairs == []
    assert notes[1] == "1 of them dropped: the prompt leaves no room for the rejected answer"
