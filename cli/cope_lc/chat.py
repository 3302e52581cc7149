"""``cope-lc chat``: a conversation, line by line, answered as it is written."""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cope_lc.options import Alpha, Device, Dtype, MaxTokens, Model, Seed, Store, Tau, Temperature

if TYPE_CHECKING:
    from langchain_core.messages import BaseMessage

    from langchain_cope import ChatCoPe

EXAMPLE = "Example: cope-lc chat --user alice"
_HELP = "/reset starts anew, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def chat(
    user: Annotated[
        str | None,
        typer.Option("--user", metavar="ID", help="In whose manner. Default: the base alone."),
    ] = None,
    model: Model = "starter",
    store: Store = None,
    version: Annotated[
        str | None,
        typer.Option(
            "--version", metavar="VERSION", help="Adapter version. Default: the active one."
        ),
    ] = None,
    alpha: Alpha = None,
    tau: Tau = None,
    temperature: Temperature = 0.0,
    max_tokens: MaxTokens = 256,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Chat with a user's model, or with the base where the user has none. A message a line; also from a pipe."""
    from cope_lc.quiet_libraries import prints_to_stderr
    from langchain_cope import ChatCoPe

    settings = {
        "model": model,
        "store": store,
        "adapter_version": version,
        "device": device,
        "dtype": dtype,
    }
    sampling = {
        "alpha": alpha,
        "tau": tau,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "seed": seed,
    }
    with prints_to_stderr():
        _note(_greeting(user, settings))
        model_of_user = ChatCoPe(user_id=user, **settings, **sampling)
    Conversation(model_of_user).run()


def _greeting(user: str | None, settings: dict[str, Any]) -> str:
    """Load what is needed, so that a wrong user or model is told now and not at the first message."""
    from adapter_store import AdapterNotFoundError
    from cope_lc.text import name_of
    from langchain_cope.engine import load_base
    from langchain_cope.stores import open_store

    base = load_base(settings["model"], device=settings["device"], dtype=settings["dtype"])
    if user is None:
        return f"{base.name} alone, as nobody in particular. {_HELP}"
    try:
        found = open_store(settings["store"]).resolve(
            user, settings["adapter_version"], base=base.fingerprint()
        )
    except AdapterNotFoundError:
        if settings["adapter_version"] is not None:
            raise
        return f"{name_of(user)} has no adapter yet: {base.name} alone answers. {_HELP}"
    return f"{name_of(user)} on {base.name}, version {found.version}. {_HELP}"


class Conversation:
    """The messages so far, and the loop that adds to them."""

    def __init__(self, model: "ChatCoPe") -> None:
        self._model = model
        self._messages: list[BaseMessage] = []

    def run(self) -> None:
        """Answer line after line until the input ends."""
        for line in _lines():
            if line == "/exit":
                return
            if line == "/reset":
                self._messages.clear()
                _note("a new conversation")
            elif line:
                self._answer(line)

    def _answer(self, line: str) -> None:
        from langchain_core.messages import AIMessage, HumanMessage

        from langchain_cope.errors import ContextOverflow

        self._messages.append(HumanMessage(line))
        try:
            text = self._print_answer()
        except ContextOverflow as error:
            self._messages.pop()
            if not self._messages:
                _note(str(error))
                return
            del self._messages[:2]  # the oldest message and its answer
            _note("the conversation is longer than the context: its oldest turns are forgotten")
            self._answer(line)
            return
        self._messages.append(AIMessage(text))

    def _print_answer(self) -> str:
        """Print the answer as it comes and return it, or what there was of it when Ctrl-C came."""
        from cope_lc.quiet_libraries import prints_to_stderr
        from cope_lc.text import clean

        out, pieces = sys.stdout, []
        try:
            with prints_to_stderr():
                for chunk in self._model.stream(self._messages):
                    pieces.append(str(chunk.content))
                    print(clean(pieces[-1], keep="\n\t"), end="", file=out, flush=True)
            print(flush=True)
        except KeyboardInterrupt:
            print(flush=True)
            _note("stopped")
        return "".join(pieces)


def _lines() -> Iterator[str]:
    """What is typed or piped in, line by line, until it ends."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing and history in input()
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            _note(_HELP)


def _note(line: str) -> None:
    from cope_lc.text import one_line

    print(one_line(line), file=sys.stderr, flush=True)
