"""How one row, in any format people have, becomes items.

A row is a mapping: ``{"prompt", "completion"}``, a conversation ``{"messages"}``, or a profile entry of the LaMP and
LongLaMP benchmarks. Knows no files: ``where`` ("user.jsonl:3") is only what an error names.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_cope.errors import HistoryError
from langchain_cope.history_items import Item, Message, Target, checked_name, checked_text, parse_time

MESSAGE_INSTRUCTION = "Write the next message in your own words."
TEXT_INSTRUCTION = "Write a text in your own style."

TIME_KEYS = ("created_at", "date", "timestamp")
"""Where a row may carry its time."""
Located = tuple[str, Any]
"""Where a row stands ("user.jsonl:3"), and the row."""
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_SWAPPED = {"user": "assistant", "assistant": "user"}
_TEXT_PARTS = {"text", "input_text", "output_text"}


@dataclass
class RowReader:
    """Reads the rows of one user, and remembers what it had to decide, for ``notes``.

    ``target`` says whose turns of a conversation are the completions. With ``"user"`` the roles of the prompt are
    swapped: the model takes the user's part, so the user's own earlier turns become "assistant" and the assistant's
    become "user", and the prompt alternates and ends in a "user" turn as chat templates want it. A prompt that would be
    empty or begin with an "assistant" turn gets ``instruction`` as first user turn. In a prompt/completion row the
    completion is what the user wrote, whatever the target.
    """

    target: Target = "assistant"
    instruction: str | None = None
    used_instruction: str | None = None
    num_instructed: int = 0
    num_joined: int = 0
    num_other_parts: int = 0
    conversations: dict[str, str] = field(default_factory=dict)

    def read(self, row: Any, where: str) -> list[Item]:
        """Return the items of one row, oldest first; raise HistoryError that names ``where`` and what is wrong."""
        row = checked_row(row, where)
        if "messages" in row:
            return self._conversation(row, where)
        if "completion" in row:
            return [self._pair(row, where)]
        raise HistoryError(
            f"{where}: no text to learn from: expected the keys prompt and completion, or messages, "
            f"or user_id with history or profile; found {named(row)}"
        )

    def read_all(self, rows: Sequence[Located]) -> list[Item]:
        """Return the items of all rows, in order; items of one conversation share its name."""
        self.conversations = _name_conversations(rows)
        return [item for where, row in rows for item in self.read(row, where)]

    def notes(self) -> list[str]:
        """Sentences on what was decided while reading."""
        said = []
        if self.num_instructed:
            said.append(f"items that had no prompt: {self.num_instructed}; theirs is {self.used_instruction!r}")
        if self.num_joined:
            said.append(f"turns joined to the one before, so that roles alternate: {self.num_joined}")
        if self.num_other_parts:
            said.append(f"parts of messages left out because they are no text: {self.num_other_parts}")
        return said

    def instructed(self, default: str = TEXT_INSTRUCTION) -> str:
        """Return the fixed instruction, which is one and the same for all items of this user."""
        self.used_instruction = self.used_instruction or self.instruction or default
        self.num_instructed += 1
        return self.used_instruction

    def _pair(self, row: Mapping[str, Any], where: str) -> Item:
        completion = checked_text(row["completion"], "completion", where)
        if not completion.strip():
            raise HistoryError(f"{where}: completion is blank: there is nothing to learn from")
        prompt = row.get("prompt")
        if isinstance(prompt, str) or prompt is None:
            text = checked_text(prompt or "", "prompt", where)
            return self._item(row, text if text.strip() else self.instructed(), completion, where)
        systems, dialogue = self._dialogue(prompt, where, what="prompt")
        if dialogue and dialogue[-1]["role"] == "assistant":
            raise HistoryError(f"{where}: prompt ends in an assistant turn, so the completion answers nobody")
        return self._item(row, self._prompt(systems, dialogue, TEXT_INSTRUCTION), completion, where)

    def _conversation(self, row: Mapping[str, Any], where: str) -> list[Item]:
        systems: list[str] = []
        dialogue: list[Message] = []
        num_systems: list[int] = []  # how many system messages came before each turn
        for message in self._messages(row["messages"], where, "messages"):
            if message["role"] == "system":
                systems.append(message["content"])
            elif self._append(dialogue, message):
                num_systems.append(len(systems))
        swap = self.target == "user"
        items = []
        for index, turn in enumerate(dialogue):
            if turn["role"] == self.target:
                before = [swapped(earlier) for earlier in dialogue[:index]] if swap else dialogue[:index]
                prompt = self._prompt(systems[: num_systems[index]], before, MESSAGE_INSTRUCTION)
                items.append(self._item(row, prompt, turn["content"], where))
        if not items:
            roles = ", ".join(dict.fromkeys(turn["role"] for turn in dialogue)) or "none"
            raise HistoryError(f"{where}: no {self.target} turn with text in messages; roles with text: {roles}")
        return items

    def _prompt(self, systems: Sequence[str], dialogue: list[Message], default: str) -> str | list[Message]:
        head = [{"role": "system", "content": "\n\n".join(systems)}] if systems else []
        if dialogue and dialogue[0]["role"] == "user":
            return head + dialogue
        instruction = self.instructed(default)
        first = {"role": "user", "content": instruction}
        return [*head, first, *dialogue] if head or dialogue else instruction

    def _item(self, row: Mapping[str, Any], prompt: str | list[Message], completion: str, where: str) -> Item:
        time = next((row[key] for key in TIME_KEYS if row.get(key) is not None), None)
        named = row.get("conversation")
        conversation = self.conversations.get(where) if named is None else checked_name(named, "conversation", where)
        return Item(prompt=prompt, completion=completion, created_at=parse_time(time, where), conversation=conversation)

    def _dialogue(self, messages: Any, where: str, what: str) -> tuple[list[str], list[Message]]:
        systems: list[str] = []
        dialogue: list[Message] = []
        for message in self._messages(messages, where, what):
            if message["role"] == "system":
                systems.append(message["content"])
            else:
                self._append(dialogue, message)
        return systems, dialogue

    def _append(self, dialogue: list[Message], message: Message) -> bool:
        """Add a turn, or join it to the last one of the same role; True if there is one turn more."""
        if dialogue and dialogue[-1]["role"] == message["role"]:
            joined = f"{dialogue[-1]['content']}\n\n{message['content']}"
            dialogue[-1] = {"role": message["role"], "content": joined}
            self.num_joined += 1
            return False
        dialogue.append(message)
        return True

    def _messages(self, messages: Any, where: str, what: str) -> list[Message]:
        """Check and flatten messages; what a tool answered is a user turn, or left out where the user is the target."""
        if not isinstance(messages, list):
            raise HistoryError(f"{where}: {what} must be a list, not {type(messages).__name__}")
        plain = []
        for index, message in enumerate(messages):
            here = f"{where}: {what}[{index}]"
            role = checked_row(message, here).get("role")
            if not isinstance(role, str) or role not in _ROLES:
                raise HistoryError(f"{here} has the role {role!r:.60}; known roles: {', '.join(_ROLES)}")
            role = _ROLES[role]
            text = self._content(message.get("content"), here)
            if role == "tool":
                role = "user" if self.target == "assistant" else ""
            if role and text.strip():
                plain.append({"role": role, "content": text})
        return plain

    def _content(self, content: Any, where: str) -> str:
        if content is None:  # a turn that only calls tools
            return ""
        if not isinstance(content, list):
            return checked_text(content, "content", where)
        texts = []
        for part in content:
            if isinstance(part, str):
                texts.append(checked_text(part, "content", where))
            elif checked_row(part, where).get("type") in _TEXT_PARTS:
                texts.append(checked_text(part.get("text"), "content", where))
            else:
                self.num_other_parts += 1
        return "\n".join(texts)


def swapped(turn: Message) -> Message:
    """Return the turn as seen from the other side."""
    return {"role": _SWAPPED[turn["role"]], "content": turn["content"]}


def checked_row(row: Any, where: str) -> Mapping[str, Any]:
    """Return ``row`` if it is a mapping, else raise HistoryError."""
    if not isinstance(row, Mapping):
        raise HistoryError(f"{where}: expected an object with named fields, found {type(row).__name__}")
    return row


def named(row: Mapping[str, Any]) -> str:
    """The keys of a row for a message, at most ten."""
    keys = [f"{key!r:.40}" for key in list(row)[:10]]
    return ", ".join(keys) + (", …" if len(row) > 10 else "") if keys else "none"


def in_memory(rows: Sequence[Mapping[str, Any] | Item], user_id: str | None = None) -> list[Located]:
    """Locate rows that are already in memory as "history[3]"; raise HistoryError where two users meet."""
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise HistoryError(f"history must be a list of rows, not {type(rows).__name__}")
    located = []
    for index, row in enumerate(rows):
        where = f"history[{index}]"
        plain = row.model_dump() if isinstance(row, Item) else checked_row(row, where)
        owner = owner_of(plain, where)
        user_id = user_id or owner
        if owner not in (None, user_id):
            raise HistoryError(f"{where}: belongs to the user {owner!r:.80}, not to {user_id!r:.80}")
        located.append((where, plain))
    return located


def owner_of(row: Mapping[str, Any], where: str, keys: Sequence[str] = ("user_id", "user")) -> str | None:
    """Return the user that a row names, None where it names none."""
    value = next((row[key] for key in keys if row.get(key) is not None), None)
    return None if value is None else checked_name(value, "the user id", where)


def _name_conversations(rows: Sequence[Located]) -> dict[str, str]:
    """Give each ``messages`` row (by its ``where``) the name of its conversation.

    Logs often repeat a conversation from its beginning in each row. A row that begins with all messages of another
    row therefore shares that row's name, provided that more than a greeting is common to both.
    """
    conversations = {
        where: row["messages"]
        for where, row in rows
        if isinstance(row, Mapping) and isinstance(row.get("messages"), list)
    }
    try:
        digests = {where: _prefix_digests(messages) for where, messages in conversations.items()}
    except RecursionError:
        raise HistoryError("a message nested too deeply") from None
    whole = {prefixes[-1] for prefixes in digests.values()}
    return {where: next(digest for digest in found if digest in whole) for where, found in digests.items()}


def _prefix_digests(messages: Sequence[Any]) -> list[str]:
    """One digest for each beginning of the conversation that holds a user's turn and something after it."""
    running = hashlib.sha256()
    found = []
    asked = False
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else ("", "")
        running.update(json.dumps([role, content], default=str).encode() + b"\n")
        if asked:
            found.append(running.hexdigest()[:16])
        asked = asked or role == "user"
    return found or [running.hexdigest()[:16]]
