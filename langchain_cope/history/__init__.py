"""What users wrote, from files, rows, Chroma and an app's own chats, as one list of items a user.

Read `items.py` first (what an item is), then `read.py` (files and rows in memory), `formats.py`
(the table of formats) and `reader.py` (how rows become items). Knows no torch and no training.
Names are loaded when first used.
"""

from typing import TYPE_CHECKING

from langchain_cope._front_door import lazy_names

if TYPE_CHECKING:
    from langchain_cope.history.chroma import ChromaHistory
    from langchain_cope.history.items import Item, Message, Target, UserHistory
    from langchain_cope.history.read import as_history, read_history, read_users
    from langchain_cope.history.recorded import RecordedChatHistory

__all__ = [
    "ChromaHistory",
    "Item",
    "Message",
    "RecordedChatHistory",
    "Target",
    "UserHistory",
    "as_history",
    "read_history",
    "read_users",
]

_MODULES = {
    "ChromaHistory": "chroma",
    "Item": "items",
    "Message": "items",
    "RecordedChatHistory": "recorded",
    "Target": "items",
    "UserHistory": "items",
    "as_history": "read",
    "read_history": "read",
    "read_users": "read",
}
if not TYPE_CHECKING:  # type checkers read the imports above instead
    __getattr__, __dir__ = lazy_names(__name__, _MODULES)
