"""`/v1/erase`: all that is kept of a user goes, in one act."""

import asyncio

from fastapi import Request
from fastapi.responses import JSONResponse

from langchain_cope.forgetting import forget
from langchain_cope.serving.errors import ApiError
from langchain_cope.serving.route import Route
from langchain_cope.serving.state import State, UserBody, user_in_body


class EraseBody(UserBody):
    """Whom to erase; the name twice, so that no slip does it."""

    confirm: str


async def erase(body: EraseBody, request: Request, state: State) -> JSONResponse:
    """Erase adapters, history, jobs and what this process remembers; say what was done."""
    user = user_in_body(request, body)
    if body.confirm != user:
        raise ApiError(
            400, "not_confirmed", "`confirm` must be the name of the user", param="confirm"
        )

    def work() -> JSONResponse:
        state.store.erase_user(user)  # first: a training under way cannot publish any more
        has_ended = state.runner.forget(user)
        receipt = forget(user, store=state.store, history=state.history, jobs=state.runner.work)
        is_done = has_ended and receipt.is_complete
        # Without the entries' texts: they name folders of this machine.
        failed = [entry.partition(":")[0] for entry in receipt.failed]
        failed += [] if has_ended else ["training"]
        removed = [entry.partition(":")[0] for entry in receipt.removed]
        body = {"user": user, "erased": is_done, "removed": removed, "failed": failed}
        return JSONResponse(body, 200 if is_done else 500)

    return await asyncio.to_thread(work)


ROUTES = (Route("POST", "/v1/erase", "erase", erase),)
