"""How rows become items, once ``history_shapes`` has put every format into one of three forms.

    {"messages": [{"role", "content", "weight"}, …]}    a conversation; one item a target turn
    {"prompt", "completion", "rejected": [text, …]}     one item; without rejected answers, or with some
    {"prompt", "rejected": [text, …]}                   answers that were disliked, and none that was liked

A prompt is a text or messages. Knows no files: ``where`` ("user.jsonl:3") is only what an error names.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

from langchain_cope.errors import HistoryError
from langchain_cope.history.items import (
    Item,
    Message,
    Target,
    checked_name,
    checked_text,
    parse_time,
    shown,
)

MESSAGE_INSTRUCTION = "Write the next message in your own words."
TEXT_INSTRUCTION = "Write a text in your own style."

TURNS_KEPT = 199
"""The newest turns of a conversation in a prompt; odd, so that with a user's turn at its end it begins with one. Of system messages
as many, the oldest."""
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
_TEXT_PARTS = (
    "text",
    "input_text",
    "output_text",
)  # no set: what stands in a file may not be hashable


class _Turn(NamedTuple):
    role: str
    texts: list[str]
    learnt: bool = True

    @property
    def text(self) -> str:
        return "\n\n".join(self.texts)

    @property
    def message(self) -> Message:
        return {"role": self.role, "content": self.text}


class Disliked(NamedTuple):
    """An answer that the user did not like, and nothing that the user liked better."""

    prompt: str | list[Message]
    answer: str
    num_before: int
    """How many items had been read: what those say was said earlier."""


@dataclass
class RowReader:
    """Reads the rows of one user, and remembers what it had to decide, for ``notes``.

    ``target`` says whose turns of a conversation are the completions. With ``"user"`` the roles of the prompt are
    swapped: the model takes the user's part, so the user's own earlier turns become "assistant" and the assistant's
    become "user", and the prompt alternates and ends in a "user" turn as chat templates want it. A prompt that would be
    empty or begin with an "assistant" turn gets ``instruction`` as first user turn. In a prompt/completion row the
    completion is what the user wrote, whatever the target. A row or turn of ``weight`` 0 is not learnt; the turn stays
    in the prompts of those that are.
    """

    target: Target = "assistant"
    instruction: str | None = None
    used_instruction: str | None = None
    num_instructed: int = 0
    num_joined: int = 0
    num_other_parts: int = 0
    num_weightless: int = 0
    num_shortened: int = 0
    disliked: list[Disliked] = field(default_factory=list)
    """After ``read_all``: the disliked answers for which no item has the same prompt."""
    conversations: dict[str, str] = field(default_factory=dict)

    def read_all(self, rows: Sequence[Located]) -> list[Item]:
        """Return the items of all rows, in order; items of one conversation share its name.

        Raises HistoryError that names ``where`` and what is wrong.
        """
        self.conversations = _name_conversations(rows)
        self.disliked = []
        items: list[Item] = []
        for where, row in rows:
            items += self._read(checked_row(row, where), where, len(items))
        return self._paired(items)

    def notes(self) -> list[str]:
        """Sentences on what was decided while reading."""
        said = []
        if self.num_instructed:
            said.append(
                f"items that had no prompt: {self.num_instructed}; theirs is {self.used_instruction!r}"
            )
        if self.num_joined:
            said.append(
                f"turns joined to the one before, so that roles alternate: {self.num_joined}"
            )
        if self.num_other_parts:
            said.append(
                f"parts of messages left out because they are no text: {self.num_other_parts}"
            )
        if self.num_shortened:
            said.append(
                f"prompts that hold only the newest {TURNS_KEPT} turns before the completion: {self.num_shortened}"
            )
        if self.num_weightless:
            said.append(
                f"turns of weight 0, which are context and not learnt: {self.num_weightless}"
            )
        if self.disliked:
            said.append(
                f"disliked answers left out, as no liked one has the same prompt: {len(self.disliked)}"
            )
        return said

    def _read(self, row: Mapping[str, Any], where: str, num_before: int) -> list[Item]:
        if not _is_learnt(row.get("weight"), where):
            self.num_weightless += 1
            return []
        if "messages" in row:
            return self._conversation(row, where)
        if "completion" in row:
            return [self._pair(row, where)]
        prompt = self._prompt_of(row, where)
        self.disliked += [
            Disliked(prompt, answer, num_before) for answer in self._rejected(row, where)
        ]
        return []

    def _paired(self, items: list[Item]) -> list[Item]:
        """Give each disliked answer to the newest item of the same prompt; one that was liked before, it takes back."""
        if not self.disliked:
            return items
        known = {(_prompt_key(d.prompt), d.answer): d.num_before for d in self.disliked}
        kept = [
            item
            for place, item in enumerate(items)
            if place >= known.get((_prompt_key(item.prompt), item.completion), 0)
        ]
        newest = {_prompt_key(item.prompt): place for place, item in enumerate(kept)}
        liked = {(_prompt_key(item.prompt), item.completion) for item in kept}
        unmatched = []
        for disliked in self.disliked:
            key = _prompt_key(disliked.prompt)
            if (place := newest.get(key)) is None:
                unmatched.append(disliked)
            elif (key, disliked.answer) not in liked:  # else it was liked later on
                kept[place] = kept[place].with_rejected([disliked.answer])
        self.disliked = unmatched
        return kept

    def instructed(self, default: str = TEXT_INSTRUCTION) -> str:
        """Return the fixed instruction, which is one and the same for all items of this user."""
        self.used_instruction = self.used_instruction or self.instruction or default
        self.num_instructed += 1
        return self.used_instruction

    def _pair(self, row: Mapping[str, Any], where: str) -> Item:
        completion = checked_text(row["completion"], "completion", where)
        if not completion.strip():
            raise HistoryError(f"{where}: completion is blank: there is nothing to learn from")
        item = self._item(row, self._prompt_of(row, where), completion, where)
        return item.with_rejected(self._rejected(row, where)) if row.get("rejected") else item

    def _prompt_of(self, row: Mapping[str, Any], where: str) -> str | list[Message]:
        prompt = row.get("prompt")
        if isinstance(prompt, str) or prompt is None:
            text = checked_text(prompt or "", "prompt", where)
            return text if text.strip() else self.instructed()
        systems: list[str] = []
        dialogue: list[_Turn] = []
        for turn in self._turns(prompt, where, "prompt"):
            if turn.role == "system":
                systems.append(turn.text)
            else:
                self._append(dialogue, turn)
        if dialogue and dialogue[-1].role == "assistant":
            raise HistoryError(
                f"{where}: prompt ends in an assistant turn, so the completion answers nobody"
            )
        return self._prompt(systems, [turn.message for turn in dialogue], TEXT_INSTRUCTION)

    def _rejected(self, row: Mapping[str, Any], where: str) -> list[str]:
        answers = row.get("rejected")
        if not isinstance(answers, list | tuple):
            raise HistoryError(
                f"{where}: rejected must be a list of texts, not {type(answers).__name__}"
            )
        return [checked_text(answer, "rejected", where) for answer in answers]

    def _conversation(self, row: Mapping[str, Any], where: str) -> list[Item]:
        systems: list[str] = []
        dialogue: list[_Turn] = []
        num_systems: list[int] = []  # how many system messages came before each turn
        for turn in self._turns(row["messages"], where, "messages"):
            if turn.role == "system":
                systems.append(turn.text)
            elif self._append(dialogue, turn):
                num_systems.append(len(systems))
        if all(turn.role != self.target for turn in dialogue):
            roles = ", ".join(dict.fromkeys(turn.role for turn in dialogue)) or "none"
            raise HistoryError(
                f"{where}: no {self.target} turn with text in messages; roles with text: {roles}"
            )
        plain = [
            swapped(turn.message) if self.target == "user" else turn.message for turn in dialogue
        ]
        items = []
        for index, turn in enumerate(dialogue):
            if turn.role == self.target and turn.learnt:
                # Else a conversation of n turns would hold n² / 2 of them, and no model could read them.
                before = plain[max(0, index - TURNS_KEPT) : index]
                before_all = systems[: min(num_systems[index], TURNS_KEPT)]
                self.num_shortened += index > TURNS_KEPT
                prompt = self._prompt(before_all, before, MESSAGE_INSTRUCTION)
                items.append(self._item(row, prompt, turn.text, where))
        self.num_weightless += sum(
            turn.role == self.target and not turn.learnt for turn in dialogue
        )
        return items

    def _prompt(
        self, systems: Sequence[str], dialogue: list[Message], default: str
    ) -> str | list[Message]:
        head = [{"role": "system", "content": "\n\n".join(systems)}] if systems else []
        if dialogue and dialogue[0]["role"] == "user":
            return head + dialogue
        instruction = self.instructed(default)
        first = {"role": "user", "content": instruction}
        return [*head, first, *dialogue] if head or dialogue else instruction

    def _item(
        self, row: Mapping[str, Any], prompt: str | list[Message], completion: str, where: str
    ) -> Item:
        time = next((row[key] for key in TIME_KEYS if row.get(key) is not None), None)
        named = row.get("conversation")
        conversation = (
            self.conversations.get(where)
            if named is None
            else checked_name(named, "conversation", where)
        )
        return Item(
            prompt=prompt,
            completion=completion,
            created_at=parse_time(time, where),
            conversation=conversation,
        )

    def _append(self, dialogue: list[_Turn], turn: _Turn) -> bool:
        """Add a turn, or join it to the last one of the same role; True if there is one turn more."""
        if dialogue and dialogue[-1].role == turn.role:
            last = dialogue[-1]
            last.texts.extend(turn.texts)
            # What is not to be learnt must not be learnt as part of something else.
            dialogue[-1] = last._replace(learnt=last.learnt and turn.learnt)
            self.num_joined += 1
            return False
        dialogue.append(turn)
        return True

    def _turns(self, messages: Any, where: str, what: str) -> list[_Turn]:
        """Check and flatten messages; what a tool answered is a user turn, or left out where the user is the target."""
        if not isinstance(messages, list):
            raise HistoryError(f"{where}: {what} must be a list, not {type(messages).__name__}")
        turns = []
        for index, message in enumerate(messages):
            here = f"{where}: {what}[{index}]"
            role = checked_row(message, here).get("role")
            if not is_role(role):
                raise HistoryError(
                    f"{here} has the role {shown(role)}; known roles: {', '.join(_ROLES)}"
                )
            role = _ROLES[role]
            text, num_other_parts = content_text(message.get("content"), here)
            self.num_other_parts += num_other_parts
            learnt = _is_learnt(message.get("weight"), here)
            if role == "tool":
                role = "user" if self.target == "assistant" else ""
            if role and text.strip():
                turns.append(_Turn(role, [text], learnt))
        return turns


def content_text(content: Any, where: str) -> tuple[str, int]:
    """Return the text of a message's content, and how many of its parts are none (images, thoughts, calls)."""
    if content is None:  # a turn that only calls tools
        return "", 0
    if not isinstance(content, list):
        return checked_text(content, "content", where), 0
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(checked_text(part, "content", where))
        elif checked_row(part, where).get("type") in _TEXT_PARTS:
            texts.append(checked_text(part.get("text"), "content", where))
    return "\n".join(texts), len(content) - len(texts)


def is_role(role: Any) -> TypeGuard[str]:
    """Whether a message may have that role."""
    return isinstance(role, str) and role in _ROLES


def _is_learnt(weight: Any, where: str) -> bool:
    """OpenAI's two weights: 1, also where there is none, is learnt, 0 is not."""
    if weight is None or (isinstance(weight, int | float) and weight == 1):
        return True
    if isinstance(weight, int | float) and weight == 0:
        return False
    raise HistoryError(
        f"{where}: the weight is {shown(weight)}; expected 1 (learnt) or 0 (context that is not learnt)"
    )


def _prompt_key(prompt: str | list[Message]) -> str:
    return Item(prompt=prompt, completion="").key


def swapped(turn: Message) -> Message:
    """Return the turn as seen from the other side."""
    return {"role": _SWAPPED[turn["role"]], "content": turn["content"]}


def checked_row(row: Any, where: str) -> Mapping[str, Any]:
    """Return ``row`` if it is a mapping, else raise HistoryError."""
    if not isinstance(row, Mapping):
        raise HistoryError(
            f"{where}: expected an object with named fields, found {type(row).__name__}"
        )
    return row


def named(row: Mapping[str, Any]) -> str:
    """The keys of a row for a message, at most ten."""
    keys = [f"{key!r:.40}" for key in list(row)[:10]]
    return ", ".join(keys) + (", …" if len(row) > 10 else "") if keys else "none"


def owner_of(
    row: Mapping[str, Any], where: str, keys: Sequence[str] = ("user_id", "user")
) -> str | None:
    """Return the user that a row names, None where it names none."""
    value = next((row[key] for key in keys if row.get(key) is not None), None)
    return None if value is None else checked_name(value, "the user id", where)


def _name_conversations(rows: Sequence[Located]) -> dict[str, str]:
    """Give each ``messages`` row (by its ``where``) the name of its conversation.

    Logs often repeat a conversation from its beginning in each row. A row that begins with all messages of another
    row therefore shares that row's name, provided that more than a greeting is common to both.
    """
    digests: dict[str, list[str]] = {}
    for where, row in rows:
        if isinstance(row, Mapping) and isinstance(row.get("messages"), list):
            try:
                digests[where] = _prefix_digests(row["messages"])
            except RecursionError:
                raise HistoryError(f"{where}: a message nested too deeply") from None
    whole = {prefixes[-1] for prefixes in digests.values()}
    return {
        where: next(digest for digest in found if digest in whole)
        for where, found in digests.items()
    }


def _prefix_digests(messages: Sequence[Any]) -> list[str]:
    """One digest for each beginning of the conversation that holds a user's turn and something after it."""
    running = hashlib.sha256()
    found = []
    asked = False
    for message in messages:
        role, content = (
            (message.get("role"), message.get("content"))
            if isinstance(message, Mapping)
            else ("", "")
        )
        running.update(json.dumps([role, content], default=str).encode() + b"\n")
        if asked:
            found.append(running.hexdigest()[:16])
        asked = asked or role == "user"
    return found or [running.hexdigest()[:16]]
