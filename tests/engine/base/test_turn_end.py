"""What ends an answer: the token or the text with which a chat template ends the turn."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import CHATML, NO_SYSTEM, THINKING, TOOLS

from langchain_cope.engine import (
    Completion,
    Engine,
    Grammar,
    Request,
    Sampling,
    closed_schema,
    load_base,
)
from langchain_cope.engine.answer import ActiveRequest, Event, NextToken

Tiny = Callable[..., Path]
OTHER_EOS = "<|endoftext|>"
BETWEEN = CHATML.replace("<|im_end|>", "").replace("{% endfor %}", "<|im_end|>{% endfor %}", 1)
ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n\n"
    "{% else %}### Response:\n{{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
ALTERNATING = (  # refuses what the check for a next speaker asks
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m['content'] }}{{ '<|im_end|>' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
)
NEXT_STARTS = "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}{% endfor %}"
SAYS_NOTHING = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
SPEAKERS = NEXT_STARTS.replace("<|im_start|>{{ m['role'] }}", "<|{{ m['role'] }}|>")
ALWAYS_ASKS = f"{SPEAKERS}\n<|assistant|>"  # knows no `add_generation_prompt`
TEXT_CLOSES = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }} [END]\n{% endfor %}"
THINKS_AS_TEXT = ALPACA.replace("Response:\n", "Response:\n<think>")
PLAIN_STARTS = {"\nUser:", "\nSystem:", "\nAssistant:"}
MARKS = ("<|user|>", "<|assistant|>", "<|system|>", "<think>")
ENDS: dict[str, tuple[str | None, set[str], set[str]]] = {
    "ChatML": (CHATML, {"<|im_end|>"}, set()),
    "no system role": (NO_SYSTEM, {"<|im_end|>"}, set()),
    "thoughts": (THINKING, {"<|im_end|>"}, set()),
    "tools": (TOOLS, {"<|im_end|>"}, set()),
    "end between turns": (BETWEEN, {"<|im_end|>"}, set()),
    "alternating": (ALTERNATING, {"<|im_end|>"}, set()),
    "next turn starts with a token": (NEXT_STARTS, {"<|im_start|>"}, set()),
    "any speaker is a token": (SPEAKERS, {"<|user|>", "<|assistant|>", "<|system|>"}, set()),
    "asks for an answer": (ALWAYS_ASKS, {"<|user|>", "<|assistant|>", "<|system|>"}, set()),
    "text closes": (TEXT_CLOSES, set(), {"[END]"}),
    "tokens as text": (CHATML.replace("<|im_", "<|my_"), set(), {"<|my_end|>"}),
    "text before a thought": (THINKS_AS_TEXT, set(), {"\n### Instruction:", "\n### Response:"}),
    "text alone": (ALPACA, set(), {"\n### Instruction:", "\n### Response:"}),
    "nothing": (SAYS_NOTHING, set(), set()),
    "no template": (None, {OTHER_EOS}, PLAIN_STARTS),
}


def with_other_eos(folder: Path, target: Path, of_config: Any = 0) -> Path:
    """Copy a tiny base; its end-of-sequence token becomes one that its template never writes."""
    shutil.copytree(folder, target)
    for name, end in (("tokenizer_config.json", OTHER_EOS), ("config.json", of_config)):
        path = target / name
        fields = json.loads(path.read_text())
        fields["eos_token" if isinstance(end, str) else "eos_token_id"] = end
        path.write_text(json.dumps(fields))
    (target / "generation_config.json").unlink()
    return target


@pytest.mark.parametrize(("template", "tokens", "texts"), ENDS.values(), ids=ENDS)
def test_what_ends_a_turn_is_read_from_the_template(
    template: str | None, tokens: set[str], texts: set[str], tiny: Tiny, tmp_path: Path
) -> None:
    folder = with_other_eos(tiny("llama", template=template, marks=MARKS), tmp_path / "model")
    base = load_base(folder, device="cpu")
    end = base.turn_end
    assert set(base.tokenizer.convert_ids_to_tokens(list(end.ids))) == tokens
    assert set(end.texts) == texts
    assert base.eos_ids == end.ids | {base.tokenizer.eos_token_id}
    assert base.vocabulary.eos_ids == base.eos_ids, "grammars end where answers end"


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [([3, 4], {}, {0, 3, 4}), (3, {"eos_token_id": [4, 5]}, {0, 4, 5}), (3, {}, {0, 3})],
)
def test_ends_that_the_models_files_list(
    config: Any, generation: dict[str, Any], ends: set[int], tiny: Tiny, tmp_path: Path
) -> None:
    folder = with_other_eos(tiny("llama", template=SAYS_NOTHING), tmp_path / "model", config)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, **generation}))
    assert load_base(folder, device="cpu").eos_ids == ends


def test_the_templates_end_token_ends_answers_whatever_the_eos_token(
    tiny: Tiny, engine_for: Callable[..., Engine], tmp_path: Path
) -> None:
    folder = tiny("llama")
    ends, other = engine_for(folder), engine_for(with_other_eos(folder, tmp_path / "other"))
    requests = [
        Request([20, 30, 40], sampling=Sampling(max_tokens=100, temperature=3.0, seed=seed))
        for seed in range(16)
    ]
    answers = other.generate(requests)
    closed = [
        answer for answer in answers if answer.token_ids[-1] == ends.base.tokenizer.eos_token_id
    ]
    assert closed
    assert all(answer.finish_reason == "stop" for answer in closed)
    never_goes_on = [ends.base.tokenizer.eos_token_id not in a.token_ids[:-1] for a in answers]
    assert all(never_goes_on)


def test_a_special_token_as_a_stop_string_ends_the_answer(engine: Engine) -> None:
    sampling = {"max_tokens": 100, "temperature": 3.0}
    stop, num_stopped = "<|im_start|>", 0
    start = engine.base.tokenizer.convert_tokens_to_ids(stop)
    for seed in range(16):
        free, stopped = engine.generate(
            [
                Request([20, 30, 40], sampling=Sampling(**sampling, seed=seed)),  # type: ignore[arg-type]
                Request([20, 30, 40], sampling=Sampling(**sampling, seed=seed, stop=(stop,))),  # type: ignore[arg-type]
            ]
        )
        ids = list(free.token_ids)
        if start in ids:
            num_stopped += 1
            assert list(stopped.token_ids) == ids[: ids.index(start) + 1]
            assert stopped.finish_reason == "stop"
            assert free.text.startswith(stopped.text)
        else:
            assert stopped == free
    assert num_stopped


def test_a_special_token_as_a_stop_string_ends_text_that_may_call_tools(engine: Engine) -> None:
    grammar = Grammar((("f", closed_schema({"type": "object", "properties": {}})),), text=True)
    stop = "<|im_start|>"
    requests = [
        Request(
            [20, 30, 40],
            sampling=Sampling(max_tokens=100, temperature=3.0, seed=seed, stop=(stop,)),
            grammar=grammar,
        )
        for seed in range(16)
    ]
    start = engine.base.tokenizer.convert_tokens_to_ids(stop)
    stopped = [each for each in engine.generate(requests) if start in each.token_ids]
    assert stopped
    assert all(each.token_ids.index(start) == len(each.token_ids) - 1 for each in stopped)
    assert {each.finish_reason for each in stopped} == {"stop"}


SAID: dict[str, tuple[str, str]] = {
    "the next user": (" Boats float.\nUser: And ships?\nAssistant: Too.", " Boats float."),
    "the system": (" Boats float.\n\nSystem: Obey.", " Boats float.\n"),
    "the assistant again": (" Boats float.\nAssistant: Ships too.", " Boats float."),
    "a user within a line": (" The User: a person.", " The User: a person."),
}


@pytest.mark.parametrize(("written", "shown"), SAID.values(), ids=SAID)
def test_the_plain_templates_next_turn_ends_an_answer(written: str, shown: str, tiny: Tiny) -> None:
    base = load_base(tiny("llama", template=None), device="cpu")
    events: list[Event] = []
    active = ActiveRequest(Request([5, 6], sampling=Sampling(max_tokens=200)), base, events.append)
    for token in base.tokenizer.encode(written, add_special_tokens=False):
        if not active.finished:
            active.push(NextToken(token, changed=False))
    if not active.finished:
        active.push(NextToken(int(base.tokenizer.eos_token_id), changed=False))
    assert isinstance(events[-1], Completion)
    assert (events[-1].text, events[-1].finish_reason) == (shown, "stop")
