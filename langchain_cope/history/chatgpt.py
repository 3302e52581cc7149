"""A conversation of ChatGPT's data export (``conversations.json``) as a row of messages.

The export keeps a conversation as a graph, with a branch for each edited question and each new try at an answer.
``current_node`` is the end of the branch that the user saw last; from there ``parent`` leads to the root.
"""

from collections.abc import Mapping
from typing import Any

from langchain_cope.errors import HistoryError
from langchain_cope.history.items import shown
from langchain_cope.history.reader import Located, checked_row

_SPOKEN = (
    "text",
    "multimodal_text",
)  # the others are thoughts, code for tools, what tools returned, settings


def chatgpt_rows(row: Mapping[str, Any], where: str) -> list[Located]:
    """Return the conversation as (where, row): what user and assistant said to each other on the current branch.

    Raises HistoryError for a graph that does not lead from ``current_node`` to a root, and a node that is no message.
    """
    said = [_message(node, here) for here, node in _branch(row, where)]
    made: dict[str, Any] = {"messages": [message for message in said if message]}
    name = row.get("conversation_id", row.get("id"))
    made |= {"conversation": name} if name else {}
    made["created_at"] = row.get("create_time")
    return [(where, made)]


def _branch(row: Mapping[str, Any], where: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The nodes from the root to ``current_node``, each with its place."""
    mapping = checked_row(row["mapping"], f"{where}: mapping")
    named_by, name = "current_node", row.get("current_node")
    if name is None:
        raise HistoryError(
            f"{where}: a mapping without current_node; expected the name of the conversation's last node"
        )
    found: dict[str, Mapping[str, Any]] = {}
    while name is not None:
        if not isinstance(name, str) or name not in mapping:
            raise HistoryError(
                f"{where}: {named_by} is {shown(name)}, which is none of the {len(mapping)} nodes in mapping; "
                "expected the name of one"
            )
        if name in found:
            raise HistoryError(
                f"{where}: mapping goes round in a circle at {shown(name)}; expected parents that lead to a root"
            )
        found[name] = checked_row(mapping[name], f"{where}: mapping[{shown(name)}]")
        named_by, name = f"the parent of {shown(name)}", found[name].get("parent")
    return [(f"{where}: mapping[{shown(name)}]", node) for name, node in reversed(found.items())]


def _message(node: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """What a node says, None where it is nothing that user and assistant said to each other."""
    if node.get("message") is None:
        return None
    message = checked_row(node["message"], f"{where}: message")
    author = checked_row(message.get("author"), f"{where}: author")
    content = checked_row(message.get("content"), f"{where}: content")
    hidden = checked_row(message.get("metadata") or {}, f"{where}: metadata").get(
        "is_visually_hidden_from_conversation"
    )
    is_spoken = (
        content.get("content_type") in _SPOKEN
        and message.get("recipient") in ("all", None)
        and not hidden
    )
    if author.get("role") not in ("user", "assistant") or not is_spoken:
        return None
    parts = content.get("parts")
    if not isinstance(parts, list):
        raise HistoryError(
            f"{where}: the content's parts are {shown(parts)}; expected a list of texts"
        )
    texts = [part for part in parts if part]
    return (
        {"role": author["role"], "content": texts, "weight": message.get("weight")}
        if texts
        else None
    )
