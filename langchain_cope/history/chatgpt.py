"""A conversation of ChatGPT's data export (`conversations.json`) as a row of messages.

The export keeps a conversation as a graph, with a branch for each edited question and each new try
at an answer. `current_node` is the end of the branch that the user saw last; from there `parent`
leads to the root.
"""

from collections import Counter
from typing import Any, NamedTuple

from langchain_cope.errors import HistoryError
from langchain_cope.history.messages import OTHER_SIDE
from langchain_cope.history.rows import Located, Row, parse_time, shown

_HIDDEN = "is_visually_hidden_from_conversation"
_SIDES = tuple(OTHER_SIDE)  # in a tuple anything can be looked for, a list too
_PARTS = ("text", "multimodal_text")
"""Types of content that have parts."""
# What else there is by its type, in words.
_NAMES = {
    "image_asset_pointer": "image",
    "audio_asset_pointer": "recording",
    "real_time_user_audio_video_asset_pointer": "recording",
    "video_container_asset_pointer": "video",
    "thoughts": "thoughts",
    "reasoning_recap": "thoughts",
    "code": "code for a tool",
    "user_editable_context": "settings",
    "model_editable_context": "settings",
}
_UNSAID = ("thoughts", "reasoning_recap", "user_editable_context", "model_editable_context")
_NOTHING = "nothing"
"""A message that is blank, as where the user stopped the answer."""


class _Spoken(NamedTuple):
    """A message of the branch: who wrote it, its texts, and why parts of it are left out."""

    role: str
    texts: list[str]
    left_out: list[str]
    weight: Any = None


def chatgpt_rows(row: Row) -> list[Row]:
    """Return the conversation: what user and assistant said on the current branch.

    A turn without any text, an image say, stays as a mark that is not learnt: else its neighbours,
    which one side wrote at different times, would become one text. Nor is an answer learnt to what
    is not there.

    Raises HistoryError for a graph that does not lead from `current_node` to a root, and for a node
    that is not a message.
    """
    messages: list[dict[str, Any]] = []
    lost: _Spoken | None = None  # the newest message without text since the last one kept
    branch = _branch(row)
    for spoken in map(_spoken, branch):
        if spoken is None:
            continue
        if not spoken.texts:
            if spoken.left_out:
                lost = spoken
            continue
        weight = spoken.weight
        if lost is not None and _is_between(messages, lost, spoken):
            mark = f"[{lost.left_out[0]}]"
            messages.append({"role": OTHER_SIDE[spoken.role], "content": mark, "weight": 0})
            weight = 0 if spoken.role == "assistant" else weight
        messages.append({"role": spoken.role, "content": "\n".join(spoken.texts), "weight": weight})
        lost = None
    conversation: dict[str, Any] = {"messages": messages, "created_at": _time(row, branch)}
    name = row.get("conversation_id", row.get("id"))
    if name:
        conversation["conversation"] = name
    return [row.with_fields(conversation)]


def chatgpt_left_out(row: Row) -> Counter[str]:
    """Return what has no text, or was not said by one side to the other, and how often."""
    reasons: Counter[str] = Counter()
    for node in _branch(row):
        spoken = _spoken(node)
        if spoken is not None:
            reasons.update(reason for reason in spoken.left_out if reason != _NOTHING)
    return reasons


def _is_between(messages: list[dict[str, Any]], lost: _Spoken, spoken: _Spoken) -> bool:
    """Tell whether a message without text stands for a turn of the other side."""
    if lost.role == spoken.role:
        return False
    if not messages:
        return spoken.role == "assistant"
    return bool(messages[-1]["role"] == spoken.role)


def _time(row: Row, branch: list[Row]) -> Any:
    """Return when the conversation began, else when its first message with a time was sent."""
    times = [row.get("create_time"), *(_message_time(node) for node in branch)]
    return next((time for time in times if time is not None), row.get("update_time"))


def _message_time(node: Row) -> Any:
    message = node.get("message") or {}
    time = message.get("create_time")
    try:
        return None if time is None else parse_time(time)
    except ValueError:
        return None


def _branch(row: Row) -> list[Row]:
    """Return the nodes from the root to `current_node`."""
    mapping = row.field("mapping").row()
    named_by, name = "current_node", row.get("current_node")
    if name is None:
        raise HistoryError(
            f"{row.where}: a mapping without current_node; "
            "expected the name of the conversation's last node"
        )
    branch: dict[str, Row] = {}
    while name is not None:
        if not isinstance(name, str) or name not in mapping:
            raise HistoryError(
                f"{row.where}: {named_by} is {shown(name)}, which is not one of the "
                f"{len(mapping.value)} nodes in mapping; expected the name of one"
            )
        if name in branch:
            raise HistoryError(
                f"{row.where}: mapping goes round in a circle at {shown(name)}; "
                "expected parents that lead to a root"
            )
        branch[name] = Located(f"{mapping.where}[{shown(name)}]", mapping[name]).row()
        named_by, name = f"the parent of {shown(name)}", branch[name].get("parent")
    return list(reversed(branch.values()))


def _spoken(node: Row) -> _Spoken | None:
    """Return what was said in a node, None where there is nothing that anybody could miss."""
    if node.get("message") is None:
        return None
    message = node.field("message").row()
    role = message.field("author").row().get("role")
    content = message.field("content").row()
    kind = content.get("content_type")
    if role == "system":
        return None
    if role not in _SIDES:
        # A tool speaks in the assistant's turn.
        return _Spoken("assistant", [], [f"{shown(role)[1:-1]} output"])
    if message.get("metadata") and message.field("metadata").row().get(_HIDDEN):
        return _Spoken(role, [], ["hidden message"])
    if message.get("recipient") not in ("all", None) or kind in _UNSAID:
        return _Spoken(role, [], [_name(kind)])
    texts, left_out = _parts(node, content)
    return _Spoken(role, texts, left_out, message.get("weight"))


def _parts(node: Row, content: Row) -> tuple[list[str], list[str]]:
    """Return the texts of a message's content, and the names of its parts without text."""
    kind = content.get("content_type")
    parts = content.get("parts")
    if parts is None and kind not in _PARTS:
        text = content.get("text")
        if text is None:
            return [], [_name(kind)]
        parts = [text]
    if not isinstance(parts, list):
        raise HistoryError(
            f"{node.where}: the content's parts are {shown(parts)}; expected a list of texts"
        )
    texts: list[str] = []
    left_out: list[str] = []
    for part in Located(f"{node.where}: parts", parts).entries():
        text, name = _part(part)
        if text.strip():
            texts.append(text)
        elif name:
            left_out.append(name)
    return texts, left_out or ([] if texts else [_NOTHING])


def _part(part: Located) -> tuple[str, str | None]:
    """Return the text of a part, and the name of one that has none."""
    if part.value is None or isinstance(part.value, str):
        return ("" if part.value is None else part.text()), None
    fields = part.row()
    if fields.get("text") is not None:
        return fields.field("text").text(), None
    return "", _name(fields.get("content_type"))


def _name(kind: Any) -> str:
    if not isinstance(kind, str):
        return "part of an unknown kind"
    return _NAMES.get(kind, kind.replace("_", " "))
