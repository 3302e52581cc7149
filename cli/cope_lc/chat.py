"""`cope-lc chat`: a conversation, line by line, answered as it is written."""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cope_lc.adapters.stored import store_at
from cope_lc.options import (
    DEFAULT_MODEL,
    UNLIKE_HISTORY,
    AdapterScale,
    AdapterVersion,
    Alpha,
    AsUser,
    ChatOptions,
    ContrastOption,
    Device,
    Dtype,
    HistoryFile,
    MaxTokens,
    Model,
    Retrieve,
    Rule,
    Seed,
    Store,
    TaskAdapter,
    Tau,
    Temperature,
)
from cope_lc.quiet_libraries import prints_to_stderr
from cope_lc.text import clean, name_of, one_line

if TYPE_CHECKING:
    from langchain_core.messages import BaseMessage

    from langchain_cope import ChatCoPe

_HELP = "/reset starts a new conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def chat(
    user: AsUser = None,
    model: Model = DEFAULT_MODEL,
    task_adapter: TaskAdapter = None,
    store: Store = None,
    version: AdapterVersion = None,
    alpha: Alpha = None,
    tau: Tau = None,
    contrast: ContrastOption = Rule.adaptive,
    adapter_scale: AdapterScale = None,
    retrieve: Retrieve = 0,
    history: HistoryFile = None,
    temperature: Temperature = 0.0,
    max_tokens: MaxTokens = 256,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Chat with a user's model, or with the base where the user has no adapter.

    Every line is a message. Messages can also come from a pipe.
    """
    options = ChatOptions(
        user=user,
        model=model,
        task_adapter=task_adapter,
        store=store,
        version=version,
        alpha=alpha,
        tau=tau,
        contrast=contrast,
        adapter_scale=adapter_scale,
        retrieve=retrieve,
        history=history,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    with prints_to_stderr():
        _note(_greeting(options))
        chat_model = options.chat_model()
    Conversation(chat_model).run()


def _greeting(options: ChatOptions) -> str:
    """Load what is needed: a wrong user or model is told now and not at the first message."""
    from langchain_cope.chat.user import find_version
    from langchain_cope.strength import strength_for

    base = options.load_base()
    fingerprint = base.fingerprint()
    if options.user is None:
        return f"{base.name} alone, in no user's manner. {_HELP}"
    name = name_of(options.user)
    version = find_version(
        store_at(options.store),
        options.user,
        options.version,
        base=fingerprint,
        required=False,
    )
    if version is None:
        return f"{name} has no adapter yet: {base.name} alone answers. {_HELP}"
    strength = options.strength(
        strength_for(fingerprint, version.alpha, version.tau, version.metadata)
    )
    return f"{name} on {base.name}, version {version.version}, {strength}. {_HELP}"


class Conversation:
    """The messages so far, and the loop that adds to them."""

    def __init__(self, chat_model: "ChatCoPe") -> None:
        self._chat_model = chat_model
        self._messages: list[BaseMessage] = []
        self._is_told = False

    def run(self) -> None:
        """Answer line after line until the input ends."""
        for line in _lines():
            if line == "/exit":
                return
            if line == "/reset":
                self._messages.clear()
                self._is_told = False
                _note("a new conversation")
            elif line:
                self._answer(line)

    def _answer(self, line: str) -> None:
        """Answer a message, after dropping as many of the oldest turns as the context demands."""
        from langchain_core.messages import AIMessage, HumanMessage

        from langchain_cope.errors import ContextOverflow

        self._messages.append(HumanMessage(line))
        while True:
            try:
                text = self._print_answer()
                break
            except ContextOverflow as error:
                if len(self._messages) == 1:
                    self._messages.clear()
                    _note(str(error))
                    return
                del self._messages[:2]  # the oldest message and its answer
                _note("the conversation is longer than the context: its oldest turns are forgotten")
        self._messages.append(AIMessage(text))

    def _print_answer(self) -> str:
        """Print the answer as it comes; return it, after Ctrl-C as far as it came."""
        out, pieces, relevance = sys.stdout, [], None
        try:
            with prints_to_stderr():
                for chunk in self._chat_model.stream(self._messages):
                    pieces.append(str(chunk.content))
                    relevance = chunk.response_metadata.get("relevance", relevance)
                    print(clean(pieces[-1], keep="\n\t"), end="", file=out, flush=True)
            print(flush=True)
        except KeyboardInterrupt:
            print(flush=True)
            _note("stopped")
        if relevance == 0 and not self._is_told:
            self._is_told = True
            _note(UNLIKE_HISTORY)
        return "".join(pieces)


def _lines() -> Iterator[str]:
    """Yield what is typed or piped in, line by line, until it ends."""
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
    print(one_line(line), file=sys.stderr, flush=True)
