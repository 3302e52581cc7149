"""Messages to token ids through the base's own chat template."""

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from langchain_cope.errors import InputError

Message = dict[str, Any]
"""``{"role": "system" | "user" | "assistant", "content": text}``; templates with tools take ``tool_calls`` and role ``tool``."""

PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{{ eos_token or '' }}\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For bases that come without a template: a line a turn, each ended by the end-of-sequence token."""


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give the tokenizer the plain template where it has none; True where that was so."""
    if tokenizer.chat_template:
        return False
    tokenizer.chat_template = PLAIN_TEMPLATE
    return True


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    tools: Sequence[dict[str, Any]] = (),
) -> list[int]:
    """Token ids of ``messages``. Tokenized once, by the template alone, so no BOS is doubled.

    A template that refuses them as they are is given fewer turns: system messages merged into the first user turn, then turns
    of one role in a row merged into one. ``tools`` go to the template as they are. Raises ``InputError`` where nothing helps.
    """
    forms = [list(messages)]
    for merge in (merge_system, merge_same_role):
        forms += [form for form in [merge(forms[-1])] if form != forms[-1]]
    for form in forms:
        try:
            return _apply(tokenizer, form, add_generation_prompt, tools)
        except TemplateError as error:
            refusal = error
    raise InputError(f"the base's chat template refuses this conversation: {refusal}") from refusal


def merge_system(messages: Sequence[Message]) -> list[Message]:
    """The same conversation without a system role: leading system messages become the head of the first user turn."""
    turns = list(messages)
    system: list[str] = []
    while turns and turns[0]["role"] == "system":
        system.append(turns.pop(0)["content"])
    if not system:
        return turns
    if turns and turns[0]["role"] == "user":
        system.append(turns.pop(0)["content"])
    return [{"role": "user", "content": "\n\n".join(system)}, *turns]


def merge_same_role(messages: Sequence[Message]) -> list[Message]:
    """The same conversation with at most one user or assistant turn in a row."""
    turns: list[Message] = []
    for message in messages:
        plain = message.keys() == {"role", "content"} and message["role"] in ("user", "assistant")
        if (
            plain
            and turns
            and turns[-1].keys() == {"role", "content"}
            and turns[-1]["role"] == message["role"]
        ):
            turns[-1] = {**message, "content": f"{turns[-1]['content']}\n\n{message['content']}"}
        else:
            turns.append(message)
    return turns


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    tools: Sequence[dict[str, Any]],
) -> list[int]:
    ids: Any = tokenizer.apply_chat_template(
        list(messages),
        tools=list(tools) or None,
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=False,
    )
    return list(ids)
