"""Pairs that the history gives reach DPO as they are, beside mined ones.

On a tiny model that is really trained.
"""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from training.tiny import make_item, pairs_in
from transformers import AutoModelForCausalLM

from langchain_cope.history.items import Item
from langchain_cope.training import dpo
from langchain_cope.training.encode import encode, fit
from langchain_cope.training.negatives import given_pairs
from langchain_cope.training.pipeline import train_user

WORSE = ("nothing of the sort", "no, never")


def log_prob(base, folder, item, text):
    """Of an answer to the item's prompt, by a plain forward in float64 of a model loaded anew."""
    model = AutoModelForCausalLM.from_pretrained(base.name, dtype=torch.float64)
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder)
    prompt, completion = encode(base, item.messages, text)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([prompt + completion])).logits[0]
    scores = logits.log_softmax(-1)
    return scores[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None]).sum().item()


@pytest.fixture
def mixed(items):
    """Six items; of the second and the fifth it is known what was rejected."""
    known = {1: WORSE[:1], 4: WORSE}
    return [item.with_rejected(known.get(index, ())) for index, item in enumerate(items)]


@pytest.fixture
def trained_pairs(monkeypatch):
    """Everything that DPO was given, overheard."""
    heard = []
    trainer = dpo.dpo_trainer

    def overheard(base, pairs, *rest):
        heard.extend(pairs)
        return trainer(base, pairs, *rest)

    monkeypatch.setattr(dpo, "dpo_trainer", overheard)
    return heard


def test_given_pairs_are_the_chosen_and_rejected_texts_as_token_ids(base, mixed, recipe):
    examples, _ = fit(base, mixed, 2048, 768)
    pairs, notes = given_pairs(base, examples, recipe)
    assert [(pair.index, pair.rejected, pair.reward) for pair in pairs] == [
        (1, WORSE[0], None),
        (4, WORSE[0], None),
        (4, WORSE[1], None),
    ]
    for pair in pairs:
        item = mixed[pair.index]
        prompt, chosen = encode(base, item.messages, item.completion)
        assert (pair.prompt_ids, pair.chosen_ids) == (prompt, chosen)
        assert (pair.prompt_ids, pair.rejected_ids) == encode(base, item.messages, pair.rejected)
    assert notes == [
        "3 pairs of a chosen and a rejected answer were given; no negative is mined for their items"
    ]


def test_given_and_mined_pairs_train_together(engine, mixed, recipe, tmp_path, trained_pairs):
    result = train_user(engine, mixed, recipe, tmp_path)
    assert [pair.index for pair in trained_pairs] == [0, 1, 2, 3, 4, 4, 5]
    given = [pair for pair in trained_pairs if pair.reward is None]
    assert [(pair.index, pair.rejected) for pair in given] == [
        (1, WORSE[0]),
        (4, WORSE[0]),
        (4, WORSE[1]),
    ]
    assert pairs_in(tmp_path) == trained_pairs
    mined = [pair for pair in trained_pairs if pair.index not in (1, 4)]
    assert all(isinstance(pair.reward, float) for pair in mined)
    said = "3 pairs of a chosen and a rejected answer were given"
    assert any(note.startswith(said) for note in result.notes)


def test_what_is_mined_for_the_others_does_not_depend_on_the_pairs(
    engine, items, recipe, tmp_path, trained_pairs
):
    train_user(engine, [*items[:5], items[5].with_rejected(WORSE[:1])], recipe, tmp_path / "pair")
    train_user(engine, items, recipe, tmp_path / "none")
    with_pair, without = pairs_in(tmp_path / "pair"), pairs_in(tmp_path / "none")
    assert with_pair[:5] == without[:5]  # SFT learns the same items either way
    assert with_pair[5] != without[5]


def test_of_a_history_of_pairs_alone_the_rejected_answers_lose_most(engine, recipe, tmp_path):
    rejected = "nothing of the sort"
    items = [make_item(number).with_rejected([rejected]) for number in range(6)]
    harder = replace(recipe, dpo=replace(recipe.dpo, epochs=4, beta=0.1))
    result = train_user(engine, items, harder, tmp_path)
    assert [pair.rejected for pair in pairs_in(tmp_path)] == [rejected] * 6

    def margin(folder):
        gains = [
            log_prob(engine.base, folder, item, item.completion)
            - log_prob(engine.base, folder, item, rejected)
            for item in items
        ]
        return sum(gains) / len(gains)

    assert margin(None) < margin(result.sft) < margin(result.dpo) - 1


def test_a_rejected_answer_is_cut_like_a_completion(base, recipe):
    long = Item(prompt="two?", completion="2", rejected=("x" * 400, "one two three"))
    examples, _ = fit(base, [long], 2048, 768)
    pairs, _ = given_pairs(base, examples, recipe)
    assert len(pairs[0].prompt_ids) + len(pairs[0].rejected_ids) == base.context == 256
    assert base.tokenizer.decode(pairs[1].rejected_ids) == "one two three<|end|>"
    examples, notes = fit(base, [long.model_copy(update={"rejected": ("one two three",)})], 2048, 2)
    assert examples[0].item.rejected == ("one two",)
    assert notes == ["1 of 1 items had a field of more than 2 words, cut there"]


def test_a_pair_without_room_for_its_rejected_answer_is_dropped(base, recipe):
    item = Item(prompt="two?", completion="2", rejected=("no",))
    (example,), _ = fit(base, [item], 2048, 768)
    too_short = replace(recipe, max_length=len(example.prompt_ids))
    pairs, notes = given_pairs(base, [example], too_short)
    assert pairs == []
    assert notes[1] == "1 of them dropped: the prompt leaves no room for the rejected answer"
