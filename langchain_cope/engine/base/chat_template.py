"""Messages to token ids through the base's own chat template.

Every message's text is in the prompt once and in order, or the conversation is refused: a form of
it (`forms.py`) is chosen by rendering marks in the place of the texts. Contents stay text
(`contents.py`).
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from langchain_cope.engine.base.contents import Contents
from langchain_cope.engine.base.forms import Message, Step, forms, reshaped
from langchain_cope.errors import InputError

PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}{{ eos_token or '' }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For bases without a template: a line a turn, each ended by the end-of-sequence token."""
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError)
_SHAPES_KEPT = 2048
_MARK = re.compile(r"(?:Text|Call)mark\d+z")
_A_TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}

Shape = tuple[tuple[str, tuple[str, ...], int | None, int], ...]
"""Per message its role, its other fields, its text, and its number of calls.

The text is None where there is none, and else how many messages before it the same text stands
first: templates drop a system turn that repeats an earlier one.
"""


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give the tokenizer the plain template where it has none; return whether that was needed."""
    if tokenizer.chat_template:
        return False
    tokenizer.chat_template = PLAIN_TEMPLATE
    return True


class ChatTemplate:
    """The chat template of one tokenizer. Safe to use from several threads."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, native_tools: bool, thinks: bool = False
    ) -> None:
        """Prepare to render with the template of `tokenizer`.

        Args:
            tokenizer: has a chat template.
            native_tools: whether the template itself writes calls and results.
            thinks: whether it writes thoughts.
        """
        self._tokenizer = tokenizer
        self._native_tools = native_tools
        self._thinks = thinks
        self._contents = Contents(tokenizer)
        self._form = lru_cache(_SHAPES_KEPT)(self._find_form)

    def text_ids(self, text: str) -> list[int]:
        """Return the token ids of a text on its own, in which nothing is a control token."""
        return self._contents.ids(self._contents.hide(text))

    def ids(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[dict[str, Any]] = (),
    ) -> list[int]:
        """Return the token ids of `messages`, tokenized once, so no BOS is doubled.

        Args:
            messages: the conversation.
            add_generation_prompt: end with the beginning of the assistant's turn.
            tools: given to the template.

        Raises:
            InputError: the template takes no form of the conversation with all its texts.
        """
        steps = self._form(_shape(messages), add_generation_prompt, bool(tools))
        turns = reshaped(self._contents.hide(list(messages)), steps)
        try:
            text = self._render(turns, add_generation_prompt, self._contents.hide(list(tools)))
        except _REFUSALS as error:
            raise _refused(error) from error
        return self._contents.ids(text)

    def _find_form(
        self, shape: Shape, add_generation_prompt: bool, has_tools: bool
    ) -> tuple[Step, ...]:
        """Return the steps to the first form of which the template writes every text.

        Where there is such a form that also serves with the answer that is to follow, or without
        the one at the end, it is preferred: training, serving and the next turn then read the
        same. Raises InputError, with the message that is left out, or why the template refuses.
        """
        tools = [_A_TOOL] if has_tools else []
        other = _with_answer(shape) if add_generation_prompt else _without_answer(shape)
        faults: list[int | Exception] = []
        only_this: tuple[Step, ...] | None = None
        knows_developer = "developer" in str(self._tokenizer.chat_template)
        tried: list[list[Message]] = []
        for steps in forms(
            native_tools=self._native_tools,
            native_results=self._thinks,  # a user's turn ends that of which it shows the thoughts
            knows_developer=knows_developer,
        ):
            turns = reshaped(_marked(_with_answer(shape)), steps)
            if turns in tried:
                continue
            tried.append(turns)
            fault = self._fault(steps, shape, add_generation_prompt, tools)
            if fault is not None:
                faults.append(fault)
            elif not other or self._fault(steps, other, not add_generation_prompt, tools) is None:
                return steps
            elif only_this is None:
                only_this = steps
        if only_this is not None:
            return only_this
        raise _failure(faults, shape)

    def _fault(
        self, steps: Sequence[Step], shape: Shape, add_generation_prompt: bool, tools: Sequence[Any]
    ) -> int | Exception | None:
        """Return the index of a message that the template does not write once, or its refusal."""
        messages = _marked(shape)
        turns = reshaped(messages, steps)
        try:
            found = _MARK.findall(self._render(turns, add_generation_prompt, tools))
        except _REFUSALS as error:
            return error
        return None if _is_whole(found, turns) else _first_lost(found, messages)

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Any]
    ) -> str:
        text: Any = self._tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        return str(text)


def _refused(error: Exception) -> InputError:
    return InputError(f"the base's chat template refuses this conversation: {error}")


def _failure(faults: Sequence[int | Exception], shape: Shape) -> InputError:
    """Return what a caller is told when no form will do."""
    for fault in faults:
        if isinstance(fault, int):
            return InputError(
                "the base's chat template would not write every message once and in order: it "
                f"fails at message {fault + 1} of {len(shape)} (role {shape[fault][0]!r}); "
                "leave that one out, or give it another role or place"
            )
    refusal = faults[-1]
    assert isinstance(refusal, Exception)
    failure = _refused(refusal)
    failure.__cause__ = refusal
    return failure


def _shape(messages: Sequence[Message]) -> Shape:
    """Return all of a conversation on which a template's choice of what it writes may rest."""
    first: dict[str, int] = {}
    return tuple(
        (
            message["role"],
            tuple(sorted(message.keys() - {"role", "content", "tool_calls"})),
            index - first.setdefault(text, index) if text else None,
            len(message.get("tool_calls", ())),
        )
        for index, message in enumerate(messages)
        for text in (message["content"].strip(),)
    )


def _with_answer(shape: Shape) -> Shape:
    return (*shape, ("assistant", (), 0, 0))


def _without_answer(shape: Shape) -> Shape:
    """Return the shape without the answer at its end; none where it ends otherwise."""
    return shape[:-1] if shape[-1:] == _with_answer(())[-1:] else ()


def _marked(shape: Shape) -> list[Message]:
    """Return a conversation of that shape with a mark in the place of each text and each call."""
    messages: list[Message] = []
    for index, (role, fields, text, num_calls) in enumerate(shape):
        content = "" if text is None else f"Textmark{index - text}z"
        message: Message = {"role": role, "content": content}
        message |= dict.fromkeys(fields, "call00000")  # some want ids of nine characters
        if num_calls:
            message["tool_calls"] = [_marked_call(index * 1000 + call) for call in range(num_calls)]
        messages.append(message)
    return messages


def _marked_call(number: int) -> dict[str, Any]:
    function = {"name": "look", "arguments": {"at": f"Callmark{number}z"}}
    return {"type": "function", "id": "call00000", "function": function}


def _is_whole(found: Sequence[str], turns: Sequence[Message]) -> bool:
    """Return whether the marks in `turns` were all found, those of texts in their order."""
    expected = _MARK.findall(str(turns))
    return sorted(found) == sorted(expected) and _texts(found) == _texts(expected)


def _texts(marks: Sequence[str]) -> list[str]:
    return [mark for mark in marks if mark.startswith("Text")]


def _first_lost(found: Sequence[str], messages: Sequence[Message]) -> int:
    """Return the index of the first message whose marks were not found as often as they stand."""
    expected = _MARK.findall(str(messages))
    for index, message in enumerate(messages):
        marks = _MARK.findall(str(message))
        if any(found.count(mark) != expected.count(mark) for mark in marks):
            return index
    return 0
