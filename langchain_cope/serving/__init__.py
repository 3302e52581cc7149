"""The server: every user's own voice over the OpenAI protocol.

`app.py` is the way in: the table of routes, each with the scope that a key needs for it.
`access.py` decides who asks, `principals.py` as whom they may speak, `routes/chat.py` answers.
HTTP ends here: what lies below knows nothing of it. Names are loaded when first used.
"""

from typing import TYPE_CHECKING

from langchain_cope._front_door import lazy_names

if TYPE_CHECKING:
    from langchain_cope.serving.app import create_app
    from langchain_cope.serving.run import serve
    from langchain_cope.serving.settings import ServeSettings
    from langchain_cope.serving.state import ServerState

__all__ = ["ServeSettings", "ServerState", "create_app", "serve"]

_MODULES = {
    "ServeSettings": "settings",
    "ServerState": "state",
    "create_app": "app",
    "serve": "run",
}
if not TYPE_CHECKING:  # type checkers read the imports above instead
    __getattr__, __dir__ = lazy_names(__name__, _MODULES)
