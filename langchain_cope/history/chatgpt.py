"""A conversation of ChatGPT's data export (`conversations.json`) as a row of messages.

The export keeps a conversation as a graph, with a branch for each edited question and each new try
at an answer. `current_node` is the end of the branch that the user saw last; from there `parent`
leads to the root.
"""

from typing import Any

from langchain_cope.errors import HistoryError
from langchain_cope.history.rows import Located, Row, shown

# Other types of content are thoughts, code for tools, what tools returned, and settings.
_SPOKEN = ("text", "multimodal_text")
_HIDDEN = "is_visually_hidden_from_conversation"


def chatgpt_rows(row: Row) -> list[Row]:
    """Return the conversation: what user and assistant said on the current branch.

    Raises HistoryError for a graph that does not lead from `current_node` to a root, and for a node
    that is not a message.
    """
    messages = []
    for node in _branch(row):
        message = _message(node)
        if message is not None:
            messages.append(message)
    conversation: dict[str, Any] = {"messages": messages, "created_at": row.get("create_time")}
    name = row.get("conversation_id", row.get("id"))
    if name:
        conversation["conversation"] = name
    return [row.with_fields(conversation)]


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


def _message(node: Row) -> dict[str, Any] | None:
    """Return what user or assistant said to the other in a node, None where neither spoke."""
    if node.get("message") is None:
        return None
    message = node.field("message").row()
    role = message.field("author").row().get("role")
    content = message.field("content").row()
    is_spoken = _is_spoken(message, content)
    if role not in ("user", "assistant") or not is_spoken:
        return None
    parts = content.get("parts")
    if not isinstance(parts, list):
        raise HistoryError(
            f"{node.where}: the content's parts are {shown(parts)}; expected a list of texts"
        )
    texts = [part for part in parts if part]
    if not texts:
        return None
    return {"role": role, "content": texts, "weight": message.get("weight")}


def _is_spoken(message: Row, content: Row) -> bool:
    """Tell whether a message is shown to the user as a part of the conversation."""
    is_hidden = False
    if message.get("metadata"):
        is_hidden = bool(message.field("metadata").row().get(_HIDDEN))
    is_for_all = message.get("recipient") in ("all", None)
    return content.get("content_type") in _SPOKEN and is_for_all and not is_hidden
