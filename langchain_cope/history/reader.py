"""How rows become items, once `formats` has put every format into one of three forms.

    {"messages": [{"role", "content", "weight"}, …]}    a conversation; one item a target turn
    {"prompt", "completion", "rejected": [text, …]}     one item; `rejected` may be absent
    {"prompt", "rejected": [text, …]}                   disliked answers, without a liked one

A prompt is a text or messages. Knows no files and no formats.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from langchain_cope.errors import HistoryError
from langchain_cope.history.items import Item, Message, Target
from langchain_cope.history.messages import OTHER_SIDE, ROLES, calls_of, content_text, is_role
from langchain_cope.history.rows import Located, Row, shown

MESSAGE_INSTRUCTION = "Write the next message in your own words."
TEXT_INSTRUCTION = "Write a text in your own style."

TURNS_KEPT = 199
"""The newest turns of a conversation in a prompt, and the oldest of its system messages.

The number is odd, so that a prompt that ends in a user's turn begins with one.
"""


class _Turn(NamedTuple):
    role: str
    texts: list[str]
    is_learnt: bool = True
    fields: dict[str, Any] = {}  # noqa: RUF012 - of tools; never changed
    """`tool_calls` of an assistant's turn, `tool_call_id` and `name` of a tool's."""

    @property
    def text(self) -> str:
        return "\n\n".join(self.texts)

    @property
    def message(self) -> Message:
        return {"role": self.role, "content": self.text, **self.fields}

    @property
    def is_plain(self) -> bool:
        """Whether it is text of one side and nothing else."""
        return self.role in OTHER_SIDE and not self.fields


class Disliked(NamedTuple):
    """An answer that the user did not like, without one that the user liked better."""

    prompt: str | list[Message]
    answer: str
    num_before: int
    """Number of items read before it: an answer among them was liked earlier."""


@dataclass
class RowReader:
    """Reads the rows of one user, and remembers what it had to decide, for `notes`.

    The turns of `target` in a conversation are the completions. With `"user"` the roles of the
    prompt are swapped: the model takes the user's part, so the user's own earlier turns become
    "assistant" and the assistant's become "user", and the prompt alternates and ends in a "user"
    turn as chat templates want it. A prompt that would be empty or begin with an "assistant" turn
    gets `instruction` as first user turn. In a prompt/completion row the completion is what the
    user wrote, whatever the target. A row or turn of `weight` 0 is not learnt; the turn stays in
    the prompts of those that are.
    """

    target: Target = "assistant"
    instruction: str | None = None
    used_instruction: str | None = None
    num_instructed: int = 0
    num_joined: int = 0
    num_other_parts: int = 0
    num_weightless: int = 0
    num_with_calls: int = 0
    num_only_calls: int = 0
    num_shortened: int = 0
    disliked: list[Disliked] = field(default_factory=list)
    """After `read_all`: the disliked answers for which no item has the same prompt."""
    conversations: dict[str, str] = field(default_factory=dict)
    """After `read_all`: the name of the conversation in each row of messages, by location."""

    def read_all(self, rows: Sequence[Row]) -> list[Item]:
        """Return the items of all rows, in order; items of one conversation share its name.

        Raises HistoryError, with the location and what is wrong, for a row that cannot be read.
        """
        self.conversations = _name_conversations(rows)
        self.disliked = []
        items: list[Item] = []
        for row in rows:
            items += self._read(row, len(items))
        return self._match_disliked(items)

    def notes(self) -> list[str]:
        """Return sentences on what was decided while reading."""
        counts = [
            (self.num_joined, "turns joined to the one before, so that roles alternate"),
            (self.num_other_parts, "parts of messages left out because they are not text"),
            (
                self.num_shortened,
                f"prompts that hold only the newest {TURNS_KEPT} turns before the completion",
            ),
            (self.num_weightless, "turns of weight 0, which are context and not learnt"),
            (self.num_with_calls, "turns that call tools, which are context and not learnt"),
            (self.num_only_calls, "conversations left out, as every turn in them calls tools"),
            (len(self.disliked), "disliked answers left out, as no liked one has the same prompt"),
        ]
        notes = []
        if self.num_instructed:
            notes.append(
                f"items that had no prompt: {self.num_instructed}; "
                f"theirs is {self.used_instruction!r}"
            )
        notes += [f"{what}: {number}" for number, what in counts if number]
        return notes

    def _read(self, row: Row, num_before: int) -> list[Item]:
        if not _is_learnt(row):
            self.num_weightless += 1
            return []
        if "messages" in row:
            return self._conversation(row)
        if "completion" in row:
            return [self._pair(row)]
        prompt = self._prompt_of(row)
        for answer in _rejected(row):
            self.disliked.append(Disliked(prompt, answer, num_before))
        return []

    def _match_disliked(self, items: list[Item]) -> list[Item]:
        """Give each disliked answer to the newest item of the same prompt.

        An item that the user liked first and disliked later is left out.
        """
        if not self.disliked:
            return items
        num_before = {(_prompt_key(d.prompt), d.answer): d.num_before for d in self.disliked}
        liked: list[Item] = []
        for index, item in enumerate(items):
            if index >= num_before.get((_prompt_key(item.prompt), item.completion), 0):
                liked.append(item)
        newest = {_prompt_key(item.prompt): index for index, item in enumerate(liked)}
        liked_answers = {(_prompt_key(item.prompt), item.completion) for item in liked}
        unmatched = []
        for disliked in self.disliked:
            key = _prompt_key(disliked.prompt)
            if key not in newest:
                unmatched.append(disliked)
            elif (key, disliked.answer) not in liked_answers:  # else it was liked later on
                index = newest[key]
                liked[index] = liked[index].with_rejected([disliked.answer])
        self.disliked = unmatched
        return liked

    def _pair(self, row: Row) -> Item:
        completion = row.field("completion").text()
        if not completion.strip():
            raise HistoryError(f"{row.where}: completion is blank: there is nothing to learn from")
        item = self._item(row, self._prompt_of(row), completion)
        return item.with_rejected(_rejected(row)) if row.get("rejected") else item

    def _prompt_of(self, row: Row) -> str | list[Message]:
        prompt = row.field("prompt")
        if prompt.value is None:
            return self._instructed()
        if isinstance(prompt.value, str):
            text = prompt.text()
            return text if text.strip() else self._instructed()
        systems: list[str] = []
        dialogue: list[_Turn] = []
        for turn in self._turns(prompt):
            if turn.role == "system":
                systems.append(turn.text)
            else:
                self._append(dialogue, turn)
        if dialogue and dialogue[-1].role == "assistant":
            raise HistoryError(
                f"{prompt.where} ends in an assistant turn; "
                "expected a user turn at its end, which the completion answers"
            )
        return self._prompt(systems, [turn.message for turn in dialogue], TEXT_INSTRUCTION)

    def _conversation(self, row: Row) -> list[Item]:
        """Return an item for each turn of the target."""
        systems: list[str] = []
        dialogue: list[_Turn] = []
        num_systems: list[int] = []  # the number of system messages before each turn
        for turn in self._turns(row.field("messages")):
            if turn.role == "system":
                systems.append(turn.text)
            elif self._append(dialogue, turn):
                num_systems.append(len(systems))
        targets = [turn for turn in dialogue if turn.role == self.target]
        if targets and not any(turn.is_plain for turn in targets):
            self.num_only_calls += 1
            return []
        if not targets:
            roles = ", ".join(dict.fromkeys(turn.role for turn in dialogue)) or "none"
            raise HistoryError(
                f"{row.where}: no {self.target} turn with text in messages; "
                f"roles with text: {roles}"
            )
        messages = [turn.message for turn in dialogue]
        if self.target == "user":
            messages = [_swapped(message) for message in messages]
        items = []
        for index, turn in enumerate(dialogue):
            if turn.role != self.target:
                continue
            if not turn.is_plain:
                self.num_with_calls += 1
                continue
            if not turn.is_learnt:
                self.num_weightless += 1
                continue
            # With all turns before it in each prompt, n turns would make prompts of n² / 2 turns.
            before = messages[max(0, index - TURNS_KEPT) : index]
            if index > TURNS_KEPT:
                self.num_shortened += 1
                before = _from_first_user(before)
            first_systems = systems[: min(num_systems[index], TURNS_KEPT)]
            prompt = self._prompt(first_systems, before, MESSAGE_INSTRUCTION)
            items.append(self._item(row, prompt, turn.text))
        return items

    def _prompt(
        self, systems: Sequence[str], dialogue: list[Message], default: str
    ) -> str | list[Message]:
        """Return the prompt of one item: the instruction alone where nothing else was said."""
        system: list[Message] = []
        if systems:
            system.append({"role": "system", "content": "\n\n".join(systems)})
        if dialogue and dialogue[0]["role"] == "user":
            return system + dialogue
        instruction = self._instructed(default)
        if not system and not dialogue:
            return instruction
        return [*system, {"role": "user", "content": instruction}, *dialogue]

    def _instructed(self, default: str = TEXT_INSTRUCTION) -> str:
        """Return the fixed instruction, the same for all items of this user."""
        if self.used_instruction is None:
            self.used_instruction = self.instruction or default
        self.num_instructed += 1
        return self.used_instruction

    def _item(self, row: Row, prompt: str | list[Message], completion: str) -> Item:
        conversation = self.conversations.get(row.where)
        if row.get("conversation") is not None:
            conversation = row.field("conversation").name()
        return Item(
            prompt=prompt,
            completion=completion,
            created_at=row.time(),
            conversation=conversation,
        )

    def _append(self, dialogue: list[_Turn], turn: _Turn) -> bool:
        """Add a turn and return True, or join it to the last one of the same role.

        Calls and results stay as they are.
        """
        last_is_plain = bool(dialogue) and dialogue[-1].is_plain and turn.is_plain
        if not last_is_plain or dialogue[-1].role != turn.role:
            dialogue.append(turn)
            return True
        last = dialogue[-1]
        last.texts.extend(turn.texts)
        # What is not to be learnt must not be learnt as part of something else.
        dialogue[-1] = last._replace(is_learnt=last.is_learnt and turn.is_learnt)
        self.num_joined += 1
        return False

    def _turns(self, messages: Located) -> list[_Turn]:
        """Return the turns with text among the messages.

        Calls of tools and what they answered are context of the assistant's turns; where the user
        is the target, they are left out.
        """
        turns = []
        for entry in messages.entries():
            message = entry.row()
            role = message.get("role")
            if not is_role(role):
                raise HistoryError(
                    f"{message.where} has the role {shown(role)}; known roles: {', '.join(ROLES)}"
                )
            role = ROLES[role]
            text, num_other_parts = content_text(message.field("content"))
            self.num_other_parts += num_other_parts
            is_learnt = _is_learnt(message)
            fields = _tool_fields(message, role) if self.target == "assistant" else {}
            if role == "tool" and self.target == "user":
                continue
            if text.strip() or fields:
                turns.append(_Turn(role, [text], is_learnt, fields))
        return turns


def _tool_fields(message: Row, role: str) -> dict[str, Any]:
    """Return what a message has of tools beside its text, as chat templates take it."""
    if role == "assistant":
        calls = calls_of(message)
        return {"tool_calls": calls} if calls else {}
    if role != "tool":
        return {}
    call_id, name = message.get("tool_call_id"), message.get("name")
    fields = {"tool_call_id": call_id if isinstance(call_id, str) else ""}
    return fields | {"name": name} if isinstance(name, str) and name else fields


def _from_first_user(messages: list[Message]) -> list[Message]:
    """Return the messages from the first user turn on; all where there is none."""
    roles = [message["role"] for message in messages]
    return messages[roles.index("user") :] if "user" in roles else messages


def check_conversation(row: Row) -> None:
    """Raise what reading a row of messages would raise, but for a missing turn of the target."""
    RowReader()._turns(row.field("messages"))
    row.time()
    if row.get("conversation") is not None:
        row.field("conversation").name()


def _rejected(row: Row) -> list[str]:
    """Return the rejected answers of a row."""
    answers = row.get("rejected")
    if not isinstance(answers, list | tuple):
        raise HistoryError(
            f"{row.where}: rejected must be a list of texts, not {type(answers).__name__}"
        )
    return [answer.text() for answer in Located(f"{row.where}: rejected", list(answers)).entries()]


def _is_learnt(row: Row) -> bool:
    """Tell whether a row or message is learnt, by its weight.

    OpenAI has two weights: 1, also where there is none, is learnt, 0 is not.
    """
    weight = row.get("weight")
    if weight is None:
        return True
    if isinstance(weight, int | float) and weight in (0, 1):
        return weight == 1
    raise HistoryError(
        f"{row.where}: the weight is {shown(weight)}; "
        "expected 1 (learnt) or 0 (context that is not learnt)"
    )


def _prompt_key(prompt: str | list[Message]) -> str:
    return Item(prompt=prompt, completion="").key


def _swapped(message: Message) -> Message:
    """Return a message as the other side's."""
    return {"role": OTHER_SIDE[message["role"]], "content": message["content"]}


def _name_conversations(rows: Sequence[Row]) -> dict[str, str]:
    """Give each row of messages, by its location, the name of its conversation.

    Logs often repeat a conversation from its beginning in each row. A row that begins with all
    messages of another row therefore shares that row's name, provided that more than a greeting is
    common to both.
    """
    digests: dict[str, list[str]] = {}
    for row in rows:
        if isinstance(row.get("messages"), list):
            try:
                digests[row.where] = _prefix_digests(row["messages"])
            except RecursionError:
                raise HistoryError(f"{row.where}: a message nested too deeply") from None
    whole = {prefixes[-1] for prefixes in digests.values()}
    return {
        where: next(digest for digest in prefixes if digest in whole)
        for where, prefixes in digests.items()
    }


def _prefix_digests(messages: Sequence[Any]) -> list[str]:
    """Return a digest for each beginning of a conversation with a user's turn and more after it.

    Without such a beginning the only digest is that of all messages.
    """
    running = hashlib.sha256()
    digests = []
    has_user_turn = False
    for message in messages:
        role: Any = ""
        content: Any = ""
        if isinstance(message, Mapping):
            role, content = message.get("role"), message.get("content")
        running.update(json.dumps([role, content], default=str).encode() + b"\n")
        if has_user_turn:
            digests.append(running.hexdigest()[:16])
        has_user_turn = has_user_turn or role == "user"
    return digests or [running.hexdigest()[:16]]
