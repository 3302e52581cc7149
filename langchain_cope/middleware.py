"""The user of an agent's run, from its context to the model; needs `langchain` (extra `agents`)."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from langchain_cope.chat.user import user_of_run
from langchain_cope.errors import InputError

try:
    from langchain.agents.middleware import AgentMiddleware
    from langchain.agents.middleware.types import ModelRequest, ModelResponse
except ImportError as error:
    raise ImportError(
        "agents need the package langchain: pip install 'langchain-cope[agents]'"
    ) from error


class CoPeUserMiddleware(AgentMiddleware[Any, Any]):
    """Middleware with which every model call of an agent answers as the user in its run's context.

    ```python
    @dataclass
    class Context:
        user_id: str

    of_user = CoPeUserMiddleware()
    agent = create_agent(ChatCoPe(), tools, middleware=[of_user], context_schema=Context)
    agent.invoke({"messages": [("user", "…")]}, context=Context(user_id="alice"))
    ```

    The context is the app's own: unlike `configurable` no client sends it, and no trace copies it.
    Models of other providers, in a fallback for example, are not told of it. A run without a user
    raises `InputError`, so that none is answered in another user's manner by mistake; None as the
    user is the base alone.
    """

    def __init__(self, field: str = "user_id") -> None:
        """Take the name of the context's field, or key, that names the user."""
        super().__init__()
        self._field = field

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Call the model as the run's user."""
        token = user_of_run.set(self._user(request))
        try:
            return handler(request)
        finally:
            user_of_run.reset(token)

    async def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> ModelResponse[Any]:
        """Do as `wrap_model_call` for an event loop."""
        token = user_of_run.set(self._user(request))
        try:
            return await handler(request)
        finally:
            user_of_run.reset(token)

    def _user(self, request: ModelRequest[Any]) -> tuple[str | None]:
        fields = _fields(getattr(request.runtime, "context", None))
        if self._field not in fields:
            raise InputError(
                f"the run's context has no {self._field!r}: give create_agent a context_schema "
                "with it, and each run a context"
            )
        return (fields[self._field],)


def _fields(context: object) -> Mapping[str, Any]:
    """Return the fields of a context, which is a mapping, an object or None."""
    if isinstance(context, Mapping):
        return context
    if hasattr(context, "__dict__"):
        return vars(context)
    return {}
