"""Counting tokens, for those who shorten conversations: every part of one has a count."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    trim_messages,
)
from tiny import CHATML, NO_SYSTEM, TOOLS

from langchain_cope import ChatCoPe
from langchain_cope.errors import InputError

# Mistral's way: roles alternate, the user begins and ends.
STRICT = (
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.last and m['role'] != 'user' %}{{ raise_exception('the user ends') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# No conversation suits it.
REFUSING = "{{ raise_exception('never') }}"
TALK: list[BaseMessage] = [
    SystemMessage("Be brief."),
    HumanMessage("What is 2 and 3?"),
    AIMessage("", tool_calls=[{"name": "add", "args": {"a": 2, "b": 3}, "id": "1"}]),
    ToolMessage("5", tool_call_id="1"),
    AIMessage("It is 5."),
    HumanMessage("Thank you."),
    AIMessage("You are welcome."),
]


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM, TOOLS, STRICT, REFUSING])
def test_every_part_of_a_conversation_has_a_count(template: str, tiny: Callable[..., Path]) -> None:
    chat = ChatCoPe(model=str(tiny("llama", template=template)), store="memory://counts")
    assert chat.get_num_tokens_from_messages([]) == 0
    for start, end in combinations(range(len(TALK) + 1), 2):
        assert chat.get_num_tokens_from_messages(TALK[start:end]) > 0
    for message in TALK:
        assert chat.get_num_tokens_from_messages([message, message]) > 0
    whole = chat.get_num_tokens_from_messages(TALK)
    assert all(chat.get_num_tokens_from_messages(TALK[:end]) <= whole for end in range(len(TALK)))


@pytest.mark.parametrize("template", [CHATML, STRICT])
@pytest.mark.parametrize("strategy", ["last", "first"])
def test_trimming_keeps_to_its_limit_with_the_chat_as_counter(
    template: str, strategy: str, tiny: Callable[..., Path]
) -> None:
    chat = ChatCoPe(model=str(tiny("llama", template=template)), store="memory://counts")
    for limit in (5, 40, 60, 1000):
        kept = trim_messages(TALK, strategy=strategy, token_counter=chat, max_tokens=limit)
        assert chat.get_num_tokens_from_messages(kept) <= limit
    assert kept == TALK


def test_a_prompt_is_counted_as_it_is_read(tiny: Callable[..., Path]) -> None:
    chat = ChatCoPe(model=str(tiny("llama", template=STRICT)), store="memory://counts")
    asked = [HumanMessage("Hi"), AIMessage("Hello"), HumanMessage("Who are you?")]
    usage = chat.invoke(asked, max_tokens=1).usage_metadata
    assert usage is not None
    assert chat.get_num_tokens_from_messages(asked) == usage["input_tokens"]


def test_an_image_has_no_count(tiny: Callable[..., Path]) -> None:
    chat = ChatCoPe(model=str(tiny("llama")), store="memory://counts")
    with pytest.raises(InputError, match="text only"):
        chat.get_num_tokens_from_messages([HumanMessage([{"type": "image", "url": "x"}])])
