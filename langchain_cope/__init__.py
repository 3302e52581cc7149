"""Every user answered in that user's own manner, on one local base model (CoPe).

`ChatCoPe` chats, `PersonalizeUser` trains, `TrainTaskAdapter` teaches a base the task; histories
come from files (`read_history`), rows (`as_history`), Chroma (`ChromaHistory`) and an app's chats
(`RecordedChatHistory`); `forget` removes all that is kept of a user. Everything else is imported
from its own module. Names are loaded when first used, so that importing the package costs nothing.
It sets three environment variables that are not set (`_environment.py`).
"""

from typing import TYPE_CHECKING

from langchain_cope._environment import set_environment
from langchain_cope._front_door import lazy_names

if TYPE_CHECKING:
    from langchain_cope.chat_models import ChatCoPe
    from langchain_cope.engine import EngineOptions
    from langchain_cope.forgetting import ForgetReceipt, forget
    from langchain_cope.history import Item, UserHistory, as_history, read_history
    from langchain_cope.history.chroma import ChromaHistory
    from langchain_cope.history.recorded import RecordedChatHistory
    from langchain_cope.middleware import CoPeUserMiddleware
    from langchain_cope.personalize import PersonalizeResult, PersonalizeUser
    from langchain_cope.task_adapter import TrainTaskAdapter
    from langchain_cope.training.recipe import Recipe

__all__ = [
    "ChatCoPe",
    "ChromaHistory",
    "CoPeUserMiddleware",
    "EngineOptions",
    "ForgetReceipt",
    "Item",
    "PersonalizeResult",
    "PersonalizeUser",
    "Recipe",
    "RecordedChatHistory",
    "TrainTaskAdapter",
    "UserHistory",
    "as_history",
    "forget",
    "read_history",
]

_MODULES = {
    "ChatCoPe": "chat_models",
    "ChromaHistory": "history.chroma",
    "CoPeUserMiddleware": "middleware",
    "EngineOptions": "engine.options",
    "ForgetReceipt": "forgetting",
    "Item": "history",
    "PersonalizeResult": "personalize",
    "PersonalizeUser": "personalize",
    "Recipe": "training.recipe",
    "RecordedChatHistory": "history.recorded",
    "TrainTaskAdapter": "task_adapter",
    "UserHistory": "history",
    "as_history": "history",
    "forget": "forgetting",
    "read_history": "history",
}
set_environment()
if not TYPE_CHECKING:  # type checkers read the imports above instead
    __getattr__, __dir__ = lazy_names(__name__, _MODULES)
