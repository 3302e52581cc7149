"""What all requests share: the chat model, the store, the histories, the keys, the counts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from fastapi import Depends, Request
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage
from pydantic import BaseModel, ConfigDict

from adapter_store import AdapterStore
from langchain_cope.chat_models import ChatCoPe
from langchain_cope.engine import EngineOptions
from langchain_cope.history.chroma import ChromaHistory
from langchain_cope.personalize import PersonalizeUser
from langchain_cope.serving.admission import Admission
from langchain_cope.serving.heap import HeapTrimming
from langchain_cope.serving.jobs import WORK, JobRunner
from langchain_cope.serving.keys import KeyFile
from langchain_cope.serving.limits import KeyLimits
from langchain_cope.serving.metrics import Metrics
from langchain_cope.serving.principals import Principal, resolve_user
from langchain_cope.serving.settings import ServeSettings
from langchain_cope.serving.store_watch import StoreWatch
from langchain_cope.serving.workers import Workers
from langchain_cope.stores import open_store

if TYPE_CHECKING:
    from langchain_cope.engine import Engine

FINDING = 32  # requests that the store is asked for at a time; it is waiting, and no work
PREPARING = 2  # requests that are made ready at a time; it is work for a processor
STORING = 4  # questions to store and histories at a time; they wait for a disk or a network


@dataclass(eq=False)
class ServerState:
    """The server, as its routes see it. `ServerState.of` makes one; nothing is loaded yet."""

    settings: ServeSettings
    chat: ChatCoPe
    """Answers everyone; a request's user goes with each call."""
    store: AdapterStore
    history: ChromaHistory
    """What users wrote, all of them in one collection."""
    runner: JobRunner
    """Personalizations."""
    keys: KeyFile | None
    """None: no keys; whoever reaches the loopback address may do everything."""
    admission: Admission
    limits: KeyLimits
    store_watch: StoreWatch
    finding: Workers
    """Who asks the store which version answers a request."""
    preparing: Workers
    """Who makes requests ready for the engine: templates and grammars."""
    storing: Workers
    """Who asks store and histories for the other routes."""
    heap: HeapTrimming = field(default_factory=HeapTrimming)
    metrics: Metrics = field(default_factory=Metrics)
    engine: "Engine | None" = None
    """The engine that answers, once the base is loaded."""
    public_prefix: tuple[int, ...] = ()
    """Tokens with which prompts may begin and that are no secret."""
    draining: bool = False
    """True once the server is to stop: nothing new is begun."""
    at_drain: list[Callable[[], None]] = field(default_factory=list)
    """Called once the server is to stop, from a signal's handler: they must not wait."""
    at_close: list[Callable[[], None]] = field(default_factory=list)
    """Called, in a thread, after the last answer: they may wait."""

    @classmethod
    def of(cls, settings: ServeSettings) -> "ServerState":
        """Return the state of a new server.

        Raises:
            InputError: the key file is missing, readable by others, or none.
            AdapterStoreError: the store cannot be opened.
        """
        _make_private(settings.data)
        store = open_store(settings.store)
        history = ChromaHistory(settings.data / "history")
        base: dict[str, Any] = {
            "model": settings.model,
            "task_adapter": settings.task_adapter,
            "device": settings.device,
            "dtype": settings.dtype,
            "engine_options": settings.engine_options,
            "store": store,
            "trace_user_id": "hashed",
        }
        jobs = settings.data / "jobs"
        personalize = None
        if settings.train == "thread":
            personalize = PersonalizeUser(**base, history=history, job_dir=jobs / WORK)
        rows = (settings.engine_options or EngineOptions()).max_rows
        admission = Admission(rows, settings.max_waiting)
        runner = JobRunner(jobs, personalize, admission.is_busy)
        state = cls(
            settings=settings,
            chat=ChatCoPe(
                **base,
                max_tokens=settings.answer_tokens,
            ),
            store=store,
            history=history,
            runner=runner,
            keys=None if settings.keys is None else KeyFile(settings.keys),
            at_drain=[runner.begin_stop],
            at_close=[runner.close],
            admission=admission,
            limits=KeyLimits(settings.max_concurrent),
            store_watch=StoreWatch(store),
            finding=Workers("cope-find", FINDING, settings.max_waiting),
            preparing=Workers("cope-prepare", PREPARING, settings.max_waiting),
            storing=Workers("cope-store", STORING, settings.max_waiting),
        )
        state.metrics.watch(state)
        return state

    def load(self) -> None:
        """Load the base. Raises as `ChatCoPe.load` does."""
        self.chat.load()
        system = self.settings.public_prompt
        first: list[BaseMessage] = [] if system is None else [SystemMessage(system)]
        calls = [self.chat.prepare([*first, HumanMessage(text)]) for text in ("a", "b")]
        self.engine = calls[0].engine
        one, other = (call.request.prompt for call in calls)
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
        self.public_prefix = tuple(token for token, _ in shared)

    def start_watching(self) -> None:
        """Ask the store, and give memory back, again and again from now on."""
        self.store_watch.start()
        self.heap.start()

    def begin_drain(self) -> None:
        """Begin nothing new from now on."""
        self.draining = True
        for stop in self.at_drain:
            stop()

    def close(self) -> None:
        """Let go of everything."""
        self.store_watch.close()
        self.heap.close()
        self.finding.close()
        self.preparing.close()
        self.storing.close()
        for close in self.at_close:
            close()
        self.chat.close()


def _make_private(folder: Path) -> None:
    """Make a folder, or close one, so that nobody else of this machine reads what is in it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)


class UserBody(BaseModel):
    """A body that names a user."""

    model_config = ConfigDict(extra="forbid")

    user: Any = None
    """Checked by `resolve_user`, so that a wrong one is refused as everywhere."""


def state_of(request: Request) -> ServerState:
    """Return the state of the server that a request came to."""
    return cast(ServerState, request.app.state.server)


def caller_of(request: Request) -> Principal:
    """Return who asks. `access.guard` has found it before any endpoint runs."""
    return cast(Principal, request.state.principal)


def user_of(request: Request, offers: dict[str, object], *, required: bool = False) -> str | None:
    """Return the user of a request: one of `offers`, or of the trusted header.

    Raises ApiError as `resolve_user` does. An endpoint that touches anything of a user's calls this
    first.
    """
    principal, settings = caller_of(request), state_of(request).settings
    if settings.user_header and principal.trusted_header:
        named = request.headers.getlist(settings.user_header)
        if len(named) > 1:
            named = [""]  # which of them a proxy wrote cannot be told
        if named:
            offers = {**offers, settings.user_header: _as_utf8(named[0])}
    return resolve_user(principal, offers, required=required)


def _as_utf8(value: str) -> str:
    """Return what a header read as Latin-1 says in UTF-8; "" where it says nothing in that."""
    try:
        return value.encode("latin-1").decode()
    except UnicodeDecodeError:
        return ""


def user_in_query(request: Request) -> str:
    """Return the user whom the query names. Raises ApiError as `user_of` does."""
    names = request.query_params.getlist("user")
    offers: dict[str, object] = {} if not names else {"user": names[0] if len(names) == 1 else ""}
    return _required(user_of(request, offers, required=True))


def user_in_body(request: Request, body: UserBody) -> str:
    """Return the user whom the body names. Raises ApiError as `user_of` does."""
    offers = {"user": body.user} if "user" in body.model_fields_set else {}
    return _required(user_of(request, offers, required=True))


def _required(user: str | None) -> str:
    assert user is not None  # `resolve_user` has refused that
    return user


State = Annotated[ServerState, Depends(state_of)]
Caller = Annotated[Principal, Depends(caller_of)]
