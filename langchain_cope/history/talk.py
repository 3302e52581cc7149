"""What a chat shows of a talk, and where in it stands what is known already.

A chat may show a window of its newest messages, or a summary in front of them. Both sides are
therefore compared from the end, paragraph by paragraph, since turns of one side may have been
joined into one.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from langchain_core.messages import BaseMessage

from langchain_cope.history.messages import OTHER_SIDE, content_text, plain_message
from langchain_cope.history.rows import Located


class Turn(NamedTuple):
    """What one side said, without what is not text."""

    role: str
    text: str


class _Paragraph(NamedTuple):
    role: str
    text: str
    message: int
    """The index of its message; of an item's, of its turn."""


def turns_of(messages: Iterable[Any]) -> list[Turn]:
    """Return what user and assistant said in messages of any form."""
    turns = (_turn(message) for message in messages)
    return [turn for turn in turns if turn is not None]


class Talk:
    """Messages as a chat shows them, without a summary that LangChain marks as one."""

    def __init__(self, messages: Sequence[BaseMessage]) -> None:
        self.messages = [
            message
            for message in messages
            if message.additional_kwargs.get("lc_source") != "summarization"
        ]

    def extended_back(self, known: Sequence[BaseMessage]) -> "Talk":
        """Return the talk, longer at its beginning where `known` ends as it does.

        One message in front, a summary, may be new.
        """
        mine, theirs = turns_of(self.messages), turns_of(known)
        length = _common_end(mine, theirs)
        if length == 0 or len(mine) - length > 1 or len(theirs) <= length:
            return self
        return Talk([*(m for m in self.messages if _role(m) == "system"), *known])

    def last_of(self, role: str, end: int | None = None) -> int | None:
        """Return the index of the role's last message before `end`, None without one."""
        messages = self.messages[:end]
        found = (n for n in reversed(range(len(messages))) if _role(messages[n]) == role)
        return next(found, None)

    def turns(self, start: int, end: int) -> list[Turn]:
        """Return what was said from `start` to `end`."""
        return turns_of(self.messages[start:end])

    def systems(self, end: int) -> list[Any]:
        """Return the system messages before `end`, each as `{"role", "content"}`."""
        return [plain for plain in self.plain(0, end) if plain["role"] == "system"]

    def plain(self, start: int, end: int) -> list[Any]:
        """Return the messages from `start` to `end`, each as `{"role", "content"}`."""
        return [plain_message(message) for message in self.messages[start:end]]

    def begins_with(self, role: str) -> bool:
        """Tell whether that side speaks first."""
        turns = turns_of(self.messages)
        return bool(turns) and turns[0].role == role

    def longest_match(self, turns: Sequence[Turn]) -> tuple[int, int]:
        """Return how many paragraphs before some message are those that `turns` end with.

        The second number is the index of that message: of the longest match, the first. The other
        side has spoken since: before that, no turn is recorded.
        """
        last = self.last_of(OTHER_SIDE[turns[-1].role])
        paragraphs = _paragraphs(
            (index, turn)
            for index, message in enumerate(self.messages)
            if (turn := _turn(message)) is not None
        )
        known = [(role, text) for role, text, _ in _paragraphs(enumerate(turns))]
        said = [(role, text) for role, text, _ in paragraphs]
        best = (0, 0)
        for end in range(1, len(said) + 1):
            is_in_turn = end < len(said) and paragraphs[end].role == paragraphs[end - 1].role
            if is_in_turn or last is None or last < paragraphs[end - 1].message:
                continue
            length = _common_end(said[:end], known)
            if length > best[0]:
                best = length, paragraphs[end - 1].message + 1
        return best


def _common_end(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return with how many entries both end."""
    length = 0
    for mine, theirs in zip(reversed(one), reversed(other), strict=False):
        if mine != theirs:
            break
        length += 1
    return length


def _paragraphs(turns: Iterable[tuple[int, Turn]]) -> list[_Paragraph]:
    return [
        _Paragraph(turn.role, text.strip(), index)
        for index, turn in turns
        for text in turn.text.split("\n\n")
        if text.strip()
    ]


def _role(message: Any) -> Any:
    return plain_message(message)["role"]


def _turn(message: Any) -> Turn | None:
    """Return what user or assistant said in a message, None where neither said a thing."""
    plain = plain_message(message)
    if plain["role"] not in OTHER_SIDE:
        return None
    text, _ = content_text(Located("message", plain.get("content")))
    return Turn(plain["role"], text) if text.strip() else None
