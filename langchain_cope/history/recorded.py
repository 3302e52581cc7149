"""An app's chats as they happen become a user's history.

`RecordedChatHistory` stands where the app has a chat history of LangChain's; the messages stay
there, and what the user wrote in them goes to a `ChromaHistory` as well.
"""

from collections.abc import Sequence
from datetime import UTC, datetime

from langchain_core.chat_history import BaseChatMessageHistory
from langchain_core.messages import BaseMessage
from langchain_core.runnables.config import run_in_executor

from langchain_cope.history.chroma import ChromaHistory
from langchain_cope.history.items import Item, Target
from langchain_cope.history.messages import OTHER_SIDE
from langchain_cope.history.reader import MESSAGE_INSTRUCTION, TURNS_KEPT
from langchain_cope.history.rows import checked_id
from langchain_cope.history.talk import Talk, Turn, turns_of

_COMPARED = 50  # of a session's newest items


class RecordedChatHistory(BaseChatMessageHistory):
    """A chat history of LangChain's that writes each finished turn to the user's history too.

    ```python
    history = ChromaHistory("chroma-folder")
    chat = RecordedChatHistory(anything_langchain_has, history, user_id="alice", session_id="1")
    chat.add_messages([HumanMessage("…"), AIMessage("…")])
    PersonalizeUser(history=history).invoke({"user_id": "alice"})
    ```

    A turn is finished when the other side has spoken after it, and is written once, with the time
    of then: also where the chat shows a window of its messages, or a summary in front of them. The
    prompts hold the whole talk. The items of a session are one conversation, never split between
    training and held-out items. A chat that was kept before is recorded whole at its next message;
    `record` does that at once. `clear` clears the chat, not what was written to the history
    (`history.delete_user` does that).

    Every method that writes raises HistoryError where the history cannot be written: the chat has
    the messages then, and they are recorded with the next.

    Args:
        chat: Keeps the messages.
        history: Gets what is learnt.
        user_id: The user in `history`.
        session_id: The name of the conversation in `history`.
        target: The side that is learnt, the user's or the assistant's.
    """

    def __init__(
        self,
        chat: BaseChatMessageHistory,
        history: ChromaHistory,
        *,
        user_id: str,
        session_id: str,
        target: Target = "user",
    ) -> None:
        self.chat = chat
        self.history = history
        self.user_id = checked_id("user", user_id)
        self.session_id = checked_id("session", session_id)
        self.target: Target = target
        self._seen: list[BaseMessage] = []
        """The newest messages that went through here; the chat may show fewer of them."""

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]
        """The messages of the chat."""
        return self.chat.messages

    async def aget_messages(self) -> list[BaseMessage]:
        """Return the messages of the chat."""
        return await self.chat.aget_messages()

    def add_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Add messages to the chat, and the turns that they finish to the user's history."""
        before = list(self.chat.messages)
        self.chat.add_messages(messages)
        self._record(before, messages)

    async def aadd_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Do as `add_messages`; the history is written in a thread."""
        before = list(await self.chat.aget_messages())
        await self.chat.aadd_messages(messages)
        await run_in_executor(None, self._record, before, messages)

    def clear(self) -> None:
        """Clear the chat."""
        self.chat.clear()
        self._seen = []

    async def aclear(self) -> None:
        """Clear the chat."""
        await self.chat.aclear()
        self._seen = []

    def record(self) -> None:
        """Write every finished turn of the chat to the user's history."""
        self._record(list(self.chat.messages), [])

    def _record(self, before: Sequence[BaseMessage], added: Sequence[BaseMessage]) -> None:
        """Write the turns of the target that are finished and not written yet."""
        shown = Talk(before).extended_back(self._seen)
        talk = Talk([*shown.messages, *added])
        self._seen = talk.messages[-2 * TURNS_KEPT :]
        end = talk.last_of(OTHER_SIDE[self.target])
        earlier, start = self._recorded(shown)
        if end is None or not any(turn.role == self.target for turn in talk.turns(start, end)):
            return
        # What is written already is context: it is not learnt a second time.
        context = [{"role": turn.role, "content": turn.text, "weight": 0} for turn in earlier]
        row = {
            "messages": [*talk.systems(start), *context, *talk.plain(start, end)],
            "conversation": self.session_id,
            "created_at": datetime.now(UTC),
        }
        self.history.add(self.user_id, [row], target=self.target)

    def _recorded(self, shown: Talk) -> tuple[list[Turn], int]:
        """Return the talk as it was recorded last, and where in `shown` what came after it begins.

        A chat that shows nothing of what was recorded is a new one, unless it begins with an
        answer: then that is the answer to the last recorded turn.
        """
        if not shown.messages:
            return [], 0
        items = self.history.fetch(self.user_id, self.session_id)[-_COMPARED:]
        best: tuple[int, int, list[Turn]] = 0, 0, []
        for item in reversed(items):
            turns = self._turns(item)
            length, end = shown.longest_match(turns)
            if length > best[0]:
                best = length, end, turns
        if best[0] == 0 and items and shown.begins_with(OTHER_SIDE[self.target]):
            return self._turns(items[-1]), 0
        return best[2], best[1]

    def _turns(self, item: Item) -> list[Turn]:
        """Return the talk that an item ends, with the roles of the chat."""
        turns = turns_of(item.messages)
        if self.target == "user":
            turns = [Turn(OTHER_SIDE[turn.role], turn.text) for turn in turns]
        if turns and turns[0].text == (self.history.instruction or MESSAGE_INSTRUCTION):
            turns = turns[1:]
        return [*turns, Turn(self.target, item.completion)]
