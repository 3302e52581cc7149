"""Options that several commands share, and their checks."""

import math
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

if TYPE_CHECKING:
    from langchain_cope import ChatCoPe
    from langchain_cope.engine import Base
    from langchain_cope.strength import Strength


class Side(StrEnum):
    """The side of a conversation that the user wrote."""

    assistant = "assistant"
    user = "user"


UNLIKE_HISTORY = (
    "unlike the user's history, so the base answered; with --contrast fixed the user's manner is "
    "kept everywhere"
)


class Rule(StrEnum):
    """When α acts."""

    fixed = "fixed"
    adaptive = "adaptive"


def _check_alpha(value: float | None) -> float | None:
    from langchain_cope.engine import check_alpha

    return _checked(value, check_alpha)


def _check_adapter_scale(value: float | None) -> float | None:
    from langchain_cope.engine import check_adapter_scale

    return _checked(value, check_adapter_scale)


def _check_tau(value: float | None) -> float | None:
    from langchain_cope.engine import check_tau

    return _checked(value, check_tau)


def _checked(value: float | None, check: Callable[[object], None]) -> float | None:
    """Return a value that is None or passes the engine's check; refuse another as a wrong call."""
    if value is not None:
        try:
            check(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return value


def _check_temperature(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise typer.BadParameter(
            f"{value} is out of range: give a number of at least 0 (0: the likeliest token)"
        )
    return value


def _check_store(value: str | None) -> str | None:
    if value == "":  # such as an unset variable: it must not mean the default store
        raise typer.BadParameter("it is empty: name a folder or a URL, or leave it out")
    return value


# ── what a command works with ──

DEFAULT_MODEL = "smollm2"
Model = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="M",
        envvar="COPE_MODEL",
        show_envvar=False,
        help="Base model: smollm2, starter, a Hugging Face id, a folder, a GGUF file, "
        "owner/repository:FILE.gguf or ollama:NAME. COPE_MODEL changes the default.",
    ),
]
TaskAdapter = Annotated[
    str | None,
    typer.Option(
        "--task-adapter",
        metavar="FOLDER",
        help="A shared LoRA that is merged into the base: a folder that `cope-lc task-adapter` "
        "left, or a Hugging Face id. Default: none.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="D", help="cpu, cuda, cuda:1 or mps. Default: the best available."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="T",
        help="float32, bfloat16 or float16. Default: what suits device and model.",
    ),
]
Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        callback=_check_store,
        help="Adapter store: a folder, or a file://, s3://, gs:// or az:// URL. "
        "Default: COPE_STORE, else the user data folder.",
    ),
]
Target = Annotated[
    Side | None,
    typer.Option(
        "--target",
        help="Which side of conversations is learnt. Default: the user's in logs "
        "(ChatGPT's export, LangChain), the assistant's in files made for training.",
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object, and nothing else, on standard output."),
]

# ── commands on a store ──

UserId = Annotated[str, typer.Argument(metavar="USER", help="User id.")]
VersionId = Annotated[
    str, typer.Argument(metavar="VERSION", help="Version id, as `adapters show` lists it.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Reason = Annotated[
    str, typer.Option("--reason", metavar="TEXT", help="Why; noted in the user's history.")
]
Limit = Annotated[
    int, typer.Option("--limit", metavar="N", min=1, help="At most this many users a page.")
]

# ── commands that answer ──

AsUser = Annotated[
    str | None,
    typer.Option(
        "--user", metavar="ID", help="Answer in this user's manner. Default: the base alone."
    ),
]
AdapterVersion = Annotated[
    str | None,
    typer.Option("--version", metavar="VERSION", help="Adapter version. Default: the active one."),
]
Alpha = Annotated[
    float | None,
    typer.Option(
        "--alpha",
        metavar="A",
        callback=_check_alpha,
        help="Weight of the base that is contrasted away; 0: no contrast. "
        "Default: what the adapter recommends, else what suits users of the base.",
    ),
]
Tau = Annotated[
    float | None,
    typer.Option(
        "--tau",
        metavar="T",
        callback=_check_tau,
        help="Drop tokens below this share of the likeliest one's probability. "
        "Default: as for --alpha.",
    ),
]
ContrastOption = Annotated[
    Rule,
    typer.Option(
        "--contrast",
        help="adaptive: contrast only where adapter and base differ, and nothing has to be exact; "
        "in conversations unlike the history the base answers.",
    ),
]
AdapterScale = Annotated[
    float | None,
    typer.Option(
        "--adapter-scale",
        metavar="S",
        callback=_check_adapter_scale,
        help="Multiply what the adapter changes; 0: the base alone. Default: as for --alpha.",
    ),
]
Retrieve = Annotated[
    int,
    typer.Option(
        "--retrieve",
        metavar="N",
        min=0,
        help="Show the user's model this many items of --history first, those most like the "
        "question.",
    ),
]
HistoryFile = Annotated[
    str | None,
    typer.Option(
        "--history",
        metavar="FILE",
        help="What the user wrote, in a form that `personalize` reads; for --retrieve.",
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature",
        metavar="T",
        callback=_check_temperature,
        help="0: always the likeliest token.",
    ),
]
MaxTokens = Annotated[
    int,
    typer.Option("--max-tokens", metavar="N", min=1, help="At most this many tokens an answer."),
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", min=0, help="Makes samples repeatable.")
]


class ChatOptions(NamedTuple):
    """The options of `chat` and `generate` as one value: who answers, and how tokens are chosen."""

    user: str | None
    model: str
    task_adapter: str | None
    store: str | None
    version: str | None
    alpha: float | None
    tau: float | None
    contrast: Rule
    adapter_scale: float | None
    retrieve: int
    history: str | None
    temperature: float
    max_tokens: int
    seed: int | None
    device: str | None
    dtype: str | None

    def chat_model(self) -> "ChatCoPe":
        """Return the chat model that answers so; it loads the base at its first answer."""
        from langchain_cope import ChatCoPe

        history = None
        if self.retrieve:
            from langchain_cope.history import read_history

            if self.history is None:
                problem = "it shows what the user wrote: add --history FILE"
                raise typer.BadParameter(problem, param_hint="--retrieve")
            history = read_history(self.history, user_id=self.user)
        return ChatCoPe(
            user_id=self.user,
            model=self.model,
            task_adapter=self.task_adapter,
            store=self.store,
            adapter_version=self.version,
            alpha=self.alpha,
            tau=self.tau,
            contrast=self.contrast.value,
            adapter_scale=self.adapter_scale,
            retrieve=self.retrieve,
            history=history,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            seed=self.seed,
            device=self.device,
            dtype=self.dtype,
        )

    def strength(self, suits: "Strength") -> "Strength":
        """Return how strongly the adapter acts: as was asked for, else as `suits` its version."""
        from langchain_cope.strength import Strength

        return Strength(
            alpha=suits.alpha if self.alpha is None else self.alpha,
            tau=suits.tau if self.tau is None else self.tau,
            adapter_scale=suits.adapter_scale if self.adapter_scale is None else self.adapter_scale,
        )

    def load_base(self) -> "Base":
        """Load the base, or return the one that is loaded already."""
        from langchain_cope.engine import load_base

        return load_base(
            self.model, device=self.device, dtype=self.dtype, task_adapter=self.task_adapter
        )
