"""The forms of one conversation that chat templates may take, the most faithful one first.

Templates differ: some know no system role, or take it at the beginning only, some want user and
assistant to alternate, some have no tools. Each step below gives up one of these differences and
keeps every text.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

Message = dict[str, Any]
"""`{"role": "system" | "user" | "assistant", "content": text}`.

With tools the assistant's may have `tool_calls`, and the role `tool` holds a result.
"""
Step = Callable[[Sequence[Message]], list[Message]]
"""What makes another form of a conversation."""

_ROLES = ("system", "user", "assistant", "tool")


def forms(
    *, native_tools: bool, native_results: bool, knows_developer: bool
) -> Iterator[tuple[Step, ...]]:
    """Yield the steps to each form.

    Args:
        native_tools: whether the template itself writes calls and results.
        native_results: whether it is to write the results, though not the calls.
        knows_developer: whether it has the role `developer`, which is else the system's.
    """
    first: tuple[Step, ...] = () if knows_developer else (developer_as_system,)
    as_text: tuple[Step | None, ...] = (calls_as_text,)
    if native_tools:
        as_text = (None, calls_as_text)
    elif native_results:
        as_text = (only_calls_as_text, calls_as_text)
    choices: tuple[tuple[Step | None, ...], ...] = (
        as_text,
        (None, other_roles_as_user),
        (None, one_system_in_front, system_as_user),
        (None, merge_same_role),
    )
    for chosen in product(*choices):
        yield (*first, *(step for step in chosen if step is not None))


def reshaped(messages: Sequence[Message], steps: Sequence[Step]) -> list[Message]:
    """Return the conversation after all `steps`."""
    turns = list(messages)
    for step in steps:
        turns = step(turns)
    return turns


def developer_as_system(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation with OpenAI's newer name for the system's role as the old one."""
    return [
        {**message, "role": "system"} if message["role"] == "developer" else message
        for message in messages
    ]


def other_roles_as_user(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation with the turns of unknown roles as the user's."""
    return [
        message if message["role"] in _ROLES else {**message, "role": "user"}
        for message in messages
    ]


def one_system_in_front(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation with all system messages as one, at the beginning."""
    texts = [message["content"] for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(texts)}, *others] if texts else others


def system_as_user(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation without a system role.

    The user's turn that follows begins with the text; where none does, it is one of its own.
    """
    turns: list[Message] = []
    texts: list[str] = []
    for message in messages:
        if message["role"] == "system":
            texts.append(message["content"])
        elif texts and message["role"] == "user":
            turns.append({**message, "content": "\n\n".join([*texts, message["content"]])})
            texts = []
        else:
            turns += _user_turn(texts)
            turns.append(message)
            texts = []
    return turns + _user_turn(texts)


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


def calls_as_text(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation with calls and results as text; results in a row are a user turn."""
    plain: list[Message] = []
    after_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        if not is_result:
            plain.append(_with_calls_as_text(message))
        elif after_result:
            plain[-1]["content"] += f"\n{_result_text(message)}"
        else:
            plain.append({"role": "user", "content": _result_text(message)})
        after_result = is_result
    return plain


def only_calls_as_text(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation with calls as text; results keep the role of a tool."""
    return [_with_calls_as_text(message) for message in messages]


def _user_turn(texts: Sequence[str]) -> list[Message]:
    return [{"role": "user", "content": "\n\n".join(texts)}] if texts else []


def _is_plain(message: Message) -> bool:
    """Return whether the message is text of the user or the assistant and nothing else."""
    return message.keys() == {"role", "content"} and message["role"] in ("user", "assistant")


def _with_calls_as_text(message: Message) -> Message:
    if not message.get("tool_calls"):
        return dict(message)
    texts = [message["content"]] if message["content"] else []
    for call in message["tool_calls"]:
        function = json.dumps(call["function"], ensure_ascii=False)
        texts.append(f"<tool_call>\n{function}\n</tool_call>")
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**others, "content": "\n".join(texts)}


def _result_text(message: Message) -> str:
    return f"<tool_response>\n{message['content']}\n</tool_response>"
