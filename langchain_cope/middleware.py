"""The user of an agent's run, from its context to the model. Needs ``langchain`` (extra ``agents``)."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from langchain_cope.errors import InputError

try:
    from langchain.agents.middleware import AgentMiddleware
    from langchain.agents.middleware.types import ModelRequest, ModelResponse
except ImportError as error:
    raise ImportError("agents need the package langchain: pip install 'langchain-cope[agents]'") from error


class CoPeUserMiddleware(AgentMiddleware[Any, Any]):
    """Every model call of an agent answers as the user in its run's context.

    Example:
        .. code-block:: python

            @dataclass
            class Context:
                user_id: str


            agent = create_agent(ChatCoPe(), tools, middleware=[CoPeUserMiddleware()], context_schema=Context)
            agent.invoke({"messages": [("user", "…")]}, context=Context(user_id="alice"))

    The context is the app's own: unlike ``configurable`` no client sends it, and no trace copies it. Raises ``InputError`` for a
    run without a user, so that nobody is answered in another's manner by mistake; None as the user is the base alone.
    """

    def __init__(self, field: str = "user_id") -> None:
        """``field``: the context's field, or key, that names the user."""
        super().__init__()
        self._field = field

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Call the model as the run's user."""
        return handler(self._as_user(request))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """`wrap_model_call` for an event loop."""
        return await handler(self._as_user(request))

    def _as_user(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        context = getattr(request.runtime, "context", None)
        missing = object()
        found = (
            context.get(self._field, missing)
            if isinstance(context, Mapping)
            else getattr(context, self._field, missing)
        )
        if found is missing:
            raise InputError(
                f"the run's context has no {self._field!r}: give create_agent a context_schema with it, and each run a context"
            )
        return request.override(model_settings={**request.model_settings, "user_id": found})
