"""Messages to token ids through the base's own chat template."""

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from langchain_cope.errors import InputError

Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``."""

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
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool
) -> list[int]:
    """Token ids of ``messages``. Tokenized once, by the template alone, so no BOS is doubled.

    A system message that the template refuses is merged into the first user turn.
    Raises ``InputError`` where the template refuses the conversation for another reason.
    """
    try:
        return _apply(tokenizer, messages, add_generation_prompt)
    except TemplateError as error:
        merged = merge_system(messages)
        if merged == list(messages):
            raise _refused(error) from error
        try:
            return _apply(tokenizer, merged, add_generation_prompt)
        except TemplateError as second:
            raise _refused(second) from second


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


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
    ids: Any = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
    )
    return list(ids)


def _refused(error: TemplateError) -> InputError:
    return InputError(f"the base's chat template refuses this conversation: {error}")
