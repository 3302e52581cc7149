"""The user of an agent's run, from its context to the model. Needs ``langchain`` (extra ``agents``)."""

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
    """Every model call of an agent answers as the user in its run's context.

    Example:
        .. code-block:: python

            @dataclass
            class Context:
                user_id: str


            agent = create_agent(ChatCoPe(), tools, middleware=[CoPeUserMiddleware()], context_schema=Context)
            agent.invoke({"messages": [("user", "…")]}, context=Context(user_id="alice"))

    The context is the app's own: unlike ``configurable`` no client sends it, and no trace copies it. Models of other providers, in
    a fallback say, are told nothing of it. Raises ``InputError`` for a run without a user, so that nobody is answered in another's
    manner by mistake; None as the user is the base alone.
    """

    def __init__(self, field: str = "user_id") -> None:
        """``field``: the context's field, or key, that names the user."""
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
        """`wrap_model_call` for an event loop."""
        token = user_of_run.set(self._user(request))
        try:
            return await handler(request)
        finally:
            user_of_run.reset(token)

    def _user(self, request: ModelRequest[Any]) -> tuple[str | None]:
        context = getattr(request.runtime, "context", None)
        known: Any = (
            context
            if isinstance(context, Mapping)
            else vars(context)
            if hasattr(context, "__dict__")
            else {}
        )
        if self._field not in known:
            raise InputError(
                f"the run's context has no {self._field!r}: give create_agent a context_schema with it, and each run a context"
            )
        return (known[self._field],)
