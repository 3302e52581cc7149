"""Every user answered in that user's own manner, on one local base model (CoPe).

`ChatCoPe` chats, `PersonalizeUser` trains; histories come from files (`read_history`), rows (`as_history`), Chroma
(`ChromaHistory`) and an app's chats (`RecordedChatHistory`). Everything else is imported from its own module. Names are loaded when
first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_cope.chat_models import ChatCoPe
    from langchain_cope.engine import EngineOptions
    from langchain_cope.history import Item, UserHistory, as_history, read_history
    from langchain_cope.history.chroma import ChromaHistory
    from langchain_cope.history.recorded import RecordedChatHistory
    from langchain_cope.middleware import CoPeUserMiddleware
    from langchain_cope.personalize import PersonalizeResult, PersonalizeUser
    from langchain_cope.training.recipe import Recipe

_MODULES = {
    "ChatCoPe": "chat_models",
    "ChromaHistory": "history.chroma",
    "CoPeUserMiddleware": "middleware",
    "EngineOptions": "engine.options",
    "Item": "history",
    "PersonalizeResult": "personalize",
    "PersonalizeUser": "personalize",
    "Recipe": "training.recipe",
    "RecordedChatHistory": "history.recorded",
    "UserHistory": "history",
    "as_history": "history",
    "read_history": "history",
}
__all__ = [
    "ChatCoPe",
    "ChromaHistory",
    "CoPeUserMiddleware",
    "EngineOptions",
    "Item",
    "PersonalizeResult",
    "PersonalizeUser",
    "Recipe",
    "RecordedChatHistory",
    "UserHistory",
    "as_history",
    "read_history",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}"
        )
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
