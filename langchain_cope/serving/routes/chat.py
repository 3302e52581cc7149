"""`/v1/chat/completions`: one request, from its checks to its last piece.

Read `completions` first. Nothing is sent before the first piece is there, so that whatever goes
wrong until then has a status of its own.
"""

import hashlib
import json
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Request
from langchain_core.messages import BaseMessage, convert_to_messages
from starlette.responses import JSONResponse, Response

from langchain_cope.chat.user import PINNED
from langchain_cope.serving import chat_answer
from langchain_cope.serving.chat_request import ChatRequest, split_model
from langchain_cope.serving.disconnect import unless_gone
from langchain_cope.serving.errors import ApiError, api_error
from langchain_cope.serving.merged import merged
from langchain_cope.serving.principals import Principal
from langchain_cope.serving.route import Route
from langchain_cope.serving.sse import DONE, event, event_stream
from langchain_cope.serving.state import Caller, ServerState, State, user_of

if TYPE_CHECKING:
    from langchain_cope.chat.call import Call
    from langchain_cope.engine import Completion, Piece
    from langchain_cope.engine import Request as EngineRequest


async def completions(
    body: ChatRequest, request: Request, caller: Caller, state: State
) -> Response:
    """Answer a conversation, in a user's own voice where one is named and has an adapter."""
    body.check(state.settings.max_choices)
    if body.logprobs:
        caller.require("logprobs")
    user = user_of(request, _offers(body, state))
    state.admission.check(caller.id)
    started = time.monotonic()
    call = await unless_gone(request, _prepared(body, caller, state, user))
    state.engine = call.engine  # another one, should the former have stopped
    answering = Answering(body, call, caller, state, started, request.state.log)
    if not body.stream:
        return JSONResponse(await unless_gone(request, answering.whole()))
    events = answering.events()
    first = await unless_gone(request, anext(events))
    return event_stream(_with_first(first, events))


@dataclass
class Answering:
    """One call on its way: it holds its place in the server, and keeps the books."""

    body: ChatRequest
    call: "Call"
    caller: Principal
    state: ServerState
    started: float
    log: dict[str, Any]
    answers: "dict[int, Completion]" = field(default_factory=dict)
    """The completions so far, by their choice's index."""
    num_pieces: int = 0
    last: float = 0.0
    """When the last piece came."""

    def __post_init__(self) -> None:
        version = self.call.user.version
        self.heading = chat_answer.Heading(
            id=chat_answer.new_id(),
            created=int(time.time()),
            model=self.state.settings.name,
            fingerprint=_fingerprint(self.call, None if version is None else version.digest),
        )

    async def whole(self) -> dict[str, Any]:
        """Return the whole answer."""
        pieces: list[list[Piece]] = [[] for _ in range(self.body.num_choices)]
        async with aclosing(self._pieces()) as coming:
            async for index, piece in coming:
                if index not in self.answers:
                    pieces[index].append(piece)  # type: ignore[arg-type]
        answers = self._in_order()
        choices = [
            chat_answer.whole_choice(index, self.call, pieces[index], answer)
            for index, answer in enumerate(answers)
        ]
        return self.heading.completion(
            choices,
            usage=chat_answer.usage(self.call, answers),
            cope=chat_answer.extension(self.call, answers),
        )

    async def events(self) -> AsyncGenerator[str]:
        """Yield the events of a stream; what goes wrong after the first is one of them."""
        options = self.body.stream_options
        with_usage = options is not None and options.include_usage
        usage: dict[str, Any] = {"usage": None} if with_usage else {}
        begun: set[int] = set()
        try:
            async with aclosing(self._pieces()) as coming:
                async for index, piece in coming:
                    chunks = self._chunks(index, piece, is_first=index not in begun)
                    begun.add(index)
                    yield "".join(event({**chunk, **usage}) for chunk in chunks)
            if with_usage:
                usage["usage"] = chat_answer.usage(self.call, self._in_order())
                yield event({**self.heading.chunk([]), **usage})
        except Exception as error:
            if not begun:
                raise
            told = api_error(error)
            self.log.update(error=told.code, detail=told.detail)
            yield event(told.body)
        yield DONE

    def _chunks(
        self, index: int, piece: "Piece | Completion", *, is_first: bool
    ) -> Iterator[dict[str, Any]]:
        """Yield the chunks that a piece becomes; the last one of a choice has our own part."""
        chunk = self.heading.chunk
        if is_first:
            yield chunk([chat_answer.first_choice(index)])
        ended = self.answers.get(index)
        if ended is not None:
            own = chat_answer.extension(self.call, [ended])
            yield chunk([chat_answer.last_choice(index, self.call, ended)], cope=own)
            return
        for choice in chat_answer.piece_choices(index, piece):  # type: ignore[arg-type]
            yield chunk([choice])

    async def _pieces(self) -> "AsyncGenerator[tuple[int, Piece | Completion]]":
        """Yield every choice's pieces as they come; its completion is in `answers` by then."""
        from langchain_cope.engine import Completion

        requests = self._requests()
        rows = len(requests) * self.call.request.num_rows
        with self.state.limits.running(self.caller, len(requests)):
            async with self.state.admission.place(self.caller.id, rows) as waited:
                self.log["queue_seconds"] = round(waited, 4)
                try:
                    async with aclosing(merged(self.call.engine, requests)) as coming:
                        async for index, piece in coming:
                            self._note_time(one_answer=len(requests) == 1)
                            if isinstance(piece, Completion):
                                self.answers[index] = piece
                            yield index, piece
                finally:
                    self._settle()

    def _requests(self) -> "list[EngineRequest]":
        """Return a request for each choice: the same one under seeds that follow each other."""
        first = self.call.request
        requests = [first]
        for index in range(1, self.body.num_choices):
            sampling = replace(first.sampling, seed=first.sampling.seed + index)
            requests.append(replace(first, sampling=sampling))
        return requests

    def _note_time(self, *, one_answer: bool) -> None:
        now, metrics = time.monotonic(), self.state.metrics
        if not self.num_pieces:
            metrics.first_token.observe(now - self.started)
            self.log["first_token_seconds"] = round(now - self.started, 4)
        elif one_answer:
            metrics.between_tokens.observe(now - self.last)
        self.num_pieces += 1
        self.last = now

    def _settle(self) -> None:
        """Count what was read and written, whether or not the answer came to its end."""
        metrics, answers = self.state.metrics, self._in_order()
        counted = chat_answer.usage(self.call, answers)
        # Of what was broken off only the pieces are known.
        written = max(counted["completion_tokens"], self.num_pieces)
        self.state.limits.take_tokens(self.caller, counted["prompt_tokens"] + written)
        reasons = [self.call.metadata(answer)["finish_reason"] for answer in answers]
        reasons += ["abort"] * (self.body.num_choices - len(answers))
        for reason in reasons:
            metrics.success.labels(reason).inc()
        for answer in answers:
            metrics.queue.observe(answer.queue_seconds + self.log["queue_seconds"])
        metrics.prompt_tokens.inc(counted["prompt_tokens"])
        metrics.whole.observe(time.monotonic() - self.started)
        self.log.update(
            prompt_tokens=counted["prompt_tokens"],
            answer_tokens=written,
            finish_reason=",".join(sorted(set(reasons))),
            personal=self.call.request.personal,
        )

    def _in_order(self) -> "list[Completion]":
        return [self.answers[index] for index in sorted(self.answers)]


async def _with_first(first: str, events: AsyncGenerator[str]) -> AsyncGenerator[str]:
    async with aclosing(events):
        yield first
        async for each in events:
            yield each


def _offers(body: ChatRequest, state: ServerState) -> dict[str, object]:
    """Return what names a user in a request, by the field that does."""
    offers: dict[str, object] = {}
    if "user" in body.model_fields_set:
        offers["user"] = body.user
    suffix = split_model(body.model, state.settings.name)
    if suffix is not None:
        offers["model"] = suffix
    return offers


async def _prepared(
    body: ChatRequest, caller: Principal, state: ServerState, user: str | None
) -> "Call":
    """Return the call, ready to run; the event loop goes on meanwhile.

    Many wait for the store at a time, few compute. Raises ApiError, and what `ChatCoPe.prepare`
    raises.
    """
    options = body.options
    version = options.pop("adapter_version", None)
    find = partial(state.chat.pin, user_id=user, adapter_version=version)
    pinned = await state.finding.run(caller.id, find)
    options[PINNED] = pinned
    return await state.preparing.run(caller.id, partial(_prepare, body, caller, state, options))


def _prepare(
    body: ChatRequest, caller: Principal, state: ServerState, options: dict[str, Any]
) -> "Call":
    """Return the call, which it renders and compiles; the store is not asked."""
    call = state.chat.prepare(_messages(body), stop=body.stops, **options)
    user = call.user.user_id
    context = call.engine.base.context
    asked = body.max_completion_tokens or body.max_tokens or 0
    if asked > context:
        raise ApiError(
            400,
            "invalid_value",
            f"an answer of {asked} tokens was asked for; the model's context holds {context}",
            param="max_tokens",
        )
    if user is not None and call.user.version is None and body.cope.on_missing == "error":
        raise ApiError(404, "adapter_not_found", "this user has no adapter", param="user")
    owner = (caller.id, user)
    request = replace(call.request, cache_owner=owner, public_prefix=state.public_prefix)
    return replace(call, request=request)


def _messages(body: ChatRequest) -> list[BaseMessage]:
    texts = [body.messages, body.tools, body.response_format, body.tool_choice, body.stop]
    try:
        json.dumps(texts, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        message = "a text holds half of a surrogate pair: send whole characters"
        raise ApiError(400, "invalid_value", message, param="messages") from None
    messages: list[BaseMessage] = []
    for index, turn in enumerate(body.messages):
        if turn.get("role") == "assistant":  # whose calls may stand alone
            turn = {"content": "", **turn}
        try:
            _check_parts(turn.get("content"))
            messages += convert_to_messages([turn])
        except Exception:  # of many kinds; their texts repeat the message
            where = f"messages.{index}"
            raise ApiError(
                400,
                "invalid_value",
                f"{where} is no message: it has a role (system, developer, user, assistant or "
                "tool), content, and for a tool a tool_call_id",
                param=where,
            ) from None
    return messages


def _check_parts(content: object) -> None:
    """Raise ValueError for a part of a content that is a text and has none."""
    for part in content if isinstance(content, list) else ():
        is_text = isinstance(part, dict) and part.get("type") == "text"
        if is_text and not isinstance(part.get("text"), str):
            raise ValueError("no text")


def _fingerprint(call: "Call", digest: str | None) -> str:
    parts = json.dumps(call.engine.base.fingerprint(), sort_keys=True)
    base = hashlib.sha256(parts.encode()).hexdigest()
    return f"fp_{base[:8]}_{digest[:8] if digest and call.request.personal else 'base'}"


_CONTENT: dict[str, dict[str, Any]] = {"application/json": {}, "text/event-stream": {}}
ROUTES = (
    Route(
        "POST",
        "/v1/chat/completions",
        "chat",
        completions,
        {"responses": {200: {"content": _CONTENT, "description": "The answer, or its stream."}}},
    ),
)
