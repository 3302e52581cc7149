"""Messages to token ids through the base's own chat template."""

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from langchain_cope.errors import InputError

Message = dict[str, Any]
"""`{"role": "system" | "user" | "assistant", "content": text}`.

Templates with tools also take `tool_calls` and the role `tool`.
"""

PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}{{ eos_token or '' }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For bases without a template: a line a turn, each ended by the end-of-sequence token."""


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give the tokenizer the plain template where it has none; return whether that was needed."""
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
    """Return the token ids of `messages`, tokenized once by the template, so no BOS is doubled.

    A template that refuses the messages is given fewer turns: first with the system messages merged
    into the first user turn, then with turns of one role in a row merged into one.

    Args:
        tokenizer: has a chat template.
        messages: the conversation.
        add_generation_prompt: end with the beginning of the assistant's turn.
        tools: given to the template as they are.

    Raises:
        InputError: the template refuses every form of the conversation.
    """
    forms = [list(messages)]
    for merge in (merge_system, merge_same_role):
        merged = merge(forms[-1])
        if merged != forms[-1]:
            forms.append(merged)
    for form in forms:
        try:
            return _apply(tokenizer, form, add_generation_prompt, tools)
        except TemplateError as error:
            refusal = error
    raise InputError(f"the base's chat template refuses this conversation: {refusal}") from refusal


def merge_system(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation without a system role: the first user turn begins with its text."""
    turns = list(messages)
    texts: list[str] = []
    while turns and turns[0]["role"] == "system":
        texts.append(turns.pop(0)["content"])
    if not texts:
        return turns
    if turns and turns[0]["role"] == "user":
        texts.append(turns.pop(0)["content"])
    return [{"role": "user", "content": "\n\n".join(texts)}, *turns]


def merge_same_role(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation with at most one user or assistant turn in a row."""
    turns: list[Message] = []
    for message in messages:
        last = turns[-1] if turns else {}
        if _is_plain(message) and _is_plain(last) and last["role"] == message["role"]:
            turns[-1] = {**message, "content": f"{last['content']}\n\n{message['content']}"}
        else:
            turns.append(message)
    return turns


def _is_plain(message: Message) -> bool:
    """Return whether the message is text of the user or the assistant and nothing else."""
    return message.keys() == {"role", "content"} and message["role"] in ("user", "assistant")


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
