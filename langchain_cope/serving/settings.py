"""What an operator chooses: where the server listens, on what it answers, and its bounds."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from platformdirs import user_data_path

from langchain_cope.engine import EngineOptions, check_option, default_model, is_number, is_whole
from langchain_cope.errors import InputError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def default_data_folder() -> Path:
    """Return the folder of histories and trainings by default."""
    return user_data_path("langchain-cope", appauthor=False) / "serve"


@dataclass(frozen=True)
class ServeSettings:
    """Settings of one server. Raises ValueError for a value out of range."""

    model: str = field(default_factory=default_model)
    served_name: str | None = None
    """What clients call the base; None: its own name, of a path the last part."""
    task_adapter: str | None = None
    device: str | None = None
    dtype: str | None = None
    engine_options: EngineOptions | None = None
    store: str | None = None
    """Adapter store: a folder or URL; None: the default one."""
    data: Path = field(default_factory=default_data_folder)
    """Folder of the users' histories and of trainings under way."""
    keys: Path | None = None
    """The key file; None: no keys, which a loopback address alone may have."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one."""
    user_header: str | None = None
    """Header in which trusted proxies name the user, for keys with `trusted_header` alone."""
    public_prompt: str | None = None
    """A system prompt that is no secret: its keys and values are shared among all users."""
    train: Literal["thread", "off"] = "thread"
    """Where personalizations run; `off`: elsewhere."""
    app: bool = False
    """Whether the page is served at `/app/`."""
    answer_tokens: int = 512
    """Tokens of an answer for which the request names no bound."""
    max_choices: int = 8
    """The most answers to one prompt, `n`."""
    max_body: int = 1 << 20
    """Bytes of a request, at most."""
    max_waiting: int = 256
    """Requests that may wait for room; further ones get 429."""
    max_concurrent: int | None = None
    """Requests that a key has at a time, at most, where the key names no bound of its own."""
    write_deadline: float = 60.0
    """Seconds that a reader may take for one piece, and a client to send its request."""
    drain_delay: float = 0.0
    """Seconds between not being ready any more and taking no more connections."""
    drain: float = 30.0
    """Seconds that answers under way may take once the server is to stop."""

    def __post_init__(self) -> None:
        concurrent = self.max_concurrent
        checks = (
            ("port", "an integer from 0 to 65535", is_whole(self.port, least=0)),
            ("answer_tokens", "an integer ≥ 1", is_whole(self.answer_tokens, least=1)),
            ("max_choices", "an integer ≥ 1", is_whole(self.max_choices, least=1)),
            ("max_body", "bytes as an integer ≥ 1", is_whole(self.max_body, least=1)),
            ("max_waiting", "an integer ≥ 1", is_whole(self.max_waiting, least=1)),
            (
                "max_concurrent",
                "an integer ≥ 1 or None",
                concurrent is None or is_whole(concurrent, least=1),
            ),
            ("write_deadline", "seconds > 0", is_number(self.write_deadline, above=0)),
            ("drain_delay", "seconds ≥ 0", is_number(self.drain_delay, least=0)),
            ("drain", "seconds ≥ 0", is_number(self.drain, least=0)),
            ("train", "'thread' or 'off'", self.train in ("thread", "off")),
        )
        for name, expected, fits in checks:
            check_option(name, getattr(self, name), expected, fits)
        if self.keys is None and self.host not in LOOPBACK:
            raise InputError(
                f"{self.host} can be reached from other machines, and there are no keys: "
                "make some with `cope-lc keys new --keys FILE` and give --keys FILE, "
                "or listen on 127.0.0.1"
            )

    @property
    def name(self) -> str:
        """What clients call the base."""
        if self.served_name:
            return self.served_name
        is_path = self.model.startswith(("/", ".", "~")) or Path(self.model).exists()
        return Path(self.model).name if is_path else self.model
