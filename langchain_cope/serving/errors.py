"""Errors as OpenAI's clients read them: a status, and `{"error": {message, type, param, code}}`.

An `ApiError` is raised for what the server itself refuses; `api_error` turns what lies below, the
engine's and the store's errors, into one. What a client cannot mend is told without its details,
which may name folders: those go to the log.
"""

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from adapter_store.errors import (
    AdapterNotFoundError,
    AdapterStoreError,
    BaseModelMismatchError,
    InvalidAdapterError,
    PublishConflictError,
    UserErasedError,
)
from langchain_cope.errors import (
    Cancelled,
    ContextOverflow,
    CopeError,
    EngineBusy,
    EngineClosed,
    InputError,
    ModelNotFound,
)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
BODY_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
        }
    },
    "required": ["error"],
}
"""What the body of every error is, for the OpenAPI document."""
_RETRY_LATER = 5  # seconds, where nothing better is known


class ApiError(Exception):
    """A request that is refused or has failed."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        detail: str = "",
    ) -> None:
        """Take what the client is told.

        Args:
            status: the HTTP status.
            code: what programs go by.
            message: what was wrong and what to do; it never holds what a key may not see.
            param: the field of the request that was wrong.
            retry_after: seconds after which the same request may do better.
            detail: what the log says beside; never a text of a user's.
        """
        super().__init__(_sendable(message))
        self.status = status
        self.code = code
        self.param = None if param is None else _sendable(param)
        self.retry_after = retry_after
        self.detail = detail

    @property
    def body(self) -> dict[str, Any]:
        """The body of the answer, or of an error event in a stream."""
        kind = _TYPES.get(self.status)
        if kind is None:
            kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of the answer: when to come again, or that it would be in vain."""
        if self.retry_after is not None:
            return {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.status in (409, 504):  # which OpenAI's clients would send again by themselves
            return {"x-should-retry": "false"}
        return {}

    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.body, self.status, dict(self.headers))


def _sendable(text: str) -> str:
    """Return a text without halves of surrogate pairs, which a request may have brought."""
    return text.encode(errors="replace").decode()


def api_error(error: Exception) -> ApiError:
    """Return what a client is told of an error of chat, engine, training or store."""
    told = error if isinstance(error, ApiError) else _told(error)
    told.__cause__ = None if told is error else error
    return told


def _told(error: Exception) -> ApiError:
    if isinstance(error, ContextOverflow):
        return ApiError(400, "context_length_exceeded", str(error), param="messages")
    if isinstance(error, ModelNotFound):
        return ApiError(404, "model_not_found", str(error), param="model")
    if isinstance(error, RecursionError):
        return ApiError(400, "invalid_value", "the request is nested too deeply")
    if isinstance(error, InputError | InvalidAdapterError):
        return ApiError(400, "invalid_value", str(error))
    if isinstance(error, AdapterNotFoundError | UserErasedError):
        message = "this user has no such adapter, or none that is active"  # not where they lie
        return ApiError(404, "adapter_not_found", message)
    if isinstance(error, BaseModelMismatchError):
        return ApiError(422, "adapter_of_another_base", str(error))
    if isinstance(error, PublishConflictError):
        return ApiError(409, "conflict", str(error))
    return _own_failure(error)


def _own_failure(error: Exception) -> ApiError:
    """Return what is told where the request was good and the server failed."""
    name = type(error).__name__
    if isinstance(error, EngineBusy):
        return ApiError(429, "server_busy", str(error), retry_after=_RETRY_LATER)
    if isinstance(error, AdapterStoreError):
        message = "the adapter store cannot be used now; no other voice stands in: try again later"
        return ApiError(
            503, "store_unavailable", message, retry_after=_RETRY_LATER, detail=f"{name}: {error}"
        )
    if isinstance(error, EngineClosed | Cancelled):
        message = "the server is stopping: try again later"
        return ApiError(503, "stopping", message, retry_after=_RETRY_LATER)
    if isinstance(error, TimeoutError):
        return ApiError(504, "timeout", "the answer was not done in time; it was stopped")
    detail = f"{name}: {error}" if isinstance(error, CopeError) else name
    message = "the server failed; its log says more under this request's id"
    return ApiError(500, "internal_error", message, detail=detail)
