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
from langchain_cope.history.items import Target
from langchain_cope.history.messages import plain_message
from langchain_cope.history.rows import checked_id


class RecordedChatHistory(BaseChatMessageHistory):
    """A chat history of LangChain's that writes each finished turn to the user's history too.

    ```python
    history = ChromaHistory("chroma-folder")
    chat = RecordedChatHistory(anything_langchain_has, history, user_id="alice", session_id="1")
    chat.add_messages([HumanMessage("…"), AIMessage("…")])
    PersonalizeUser(history=history).invoke({"user_id": "alice"})
    ```

    A turn is finished when the other side has spoken after it. The items of a session are one
    conversation, never split between training and held-out items. What is there already is not
    written twice, so a chat that was kept before is recorded whole at its next message; `record`
    does that at once. `clear` clears the chat, not what was written to the history
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

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]
        """The messages of the chat."""
        return self.chat.messages

    async def aget_messages(self) -> list[BaseMessage]:
        """Return the messages of the chat."""
        return await self.chat.aget_messages()

    def add_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Add messages to the chat, and the turns that they finish to the user's history."""
        self.chat.add_messages(messages)
        self.record()

    async def aadd_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Do as `add_messages`; the history is written in a thread."""
        await self.chat.aadd_messages(messages)
        await run_in_executor(None, self._record, await self.chat.aget_messages())

    def clear(self) -> None:
        """Clear the chat."""
        self.chat.clear()

    async def aclear(self) -> None:
        """Clear the chat."""
        await self.chat.aclear()

    def record(self) -> None:
        """Write every finished turn of the chat to the user's history."""
        self._record(self.chat.messages)

    def _record(self, messages: Sequence[BaseMessage]) -> None:
        other_side = "assistant" if self.target == "user" else "user"
        num_finished = 0
        for index, message in enumerate(messages):
            if plain_message(message)["role"] == other_side:
                num_finished = index
        if num_finished == 0:
            return
        row = {
            "messages": list(messages[:num_finished]),
            "conversation": self.session_id,
            "created_at": datetime.now(UTC),
        }
        self.history.add(self.user_id, [row], target=self.target)
