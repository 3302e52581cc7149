"""What a user wrote before, shown to the user's row as earlier turns of the conversation."""

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from langchain_cope.chat.messages import template_messages
from langchain_cope.errors import InputError
from langchain_cope.history.items import Item, UserHistory
from langchain_cope.history.similar import most_alike

_MESSAGES: dict[str, type[BaseMessage]] = {"user": HumanMessage, "assistant": AIMessage}


def items_of(history: Any, user_id: str) -> list[Item]:
    """Return the user's items in `history`: one with `fetch`, or one user's `UserHistory`.

    Raises InputError where there is no history, or the one given is another user's.
    """
    if isinstance(history, UserHistory):
        if history.user_id != user_id:
            raise InputError(
                f"the history given is of the user {history.user_id!r:.80}, not of {user_id!r:.80}"
            )
        return history.items
    if not hasattr(history, "fetch"):
        raise InputError(
            "retrieve shows what the user wrote before and needs to know where that is: "
            f"give history=ChromaHistory(…) or a UserHistory, not {history!r:.80}"
        )
    return list(history.fetch(user_id))


def examples_for(
    messages: Sequence[BaseMessage], items: Sequence[Item], number: int
) -> list[list[BaseMessage]]:
    """Return up to `number` of `items` as turns: those most like the last question, it last.

    Items with turns of tools or of a system are none, since their setting is another.
    """
    asked = [turn["content"] for turn in template_messages(messages) if turn["role"] == "user"]
    if not asked:
        return []
    plain = [item for item in items if all(turn["role"] in _MESSAGES for turn in item.messages)]
    return [
        [_MESSAGES[turn["role"]](str(turn["content"])) for turn in item.turns]
        for item in most_alike(plain, str(asked[-1]), number)
    ]


def with_examples(
    messages: Sequence[BaseMessage], examples: Sequence[Sequence[BaseMessage]]
) -> list[BaseMessage]:
    """Return the conversation with `examples` before it, after what the system says."""
    first = next(
        (at for at, message in enumerate(messages) if not isinstance(message, SystemMessage)),
        len(messages),
    )
    earlier = [message for example in examples for message in example]
    return [*messages[:first], *earlier, *messages[first:]]
