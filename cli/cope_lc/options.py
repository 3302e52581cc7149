"""Options that several commands share, and their checks."""

import math
from enum import StrEnum
from typing import Annotated

import typer


class Side(StrEnum):
    """Whose turns of a conversation are what the user wrote."""

    assistant = "assistant"
    user = "user"


def _check_alpha(value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise typer.BadParameter(
            f"{value} is out of range: give a number of at least 0 (0: the adapter alone)"
        )
    return value


def _check_tau(value: float | None) -> float | None:
    if value is not None and not 0 < value <= 1:
        raise typer.BadParameter(f"{value} is out of range: give a number above 0 and at most 1")
    return value


def _check_temperature(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise typer.BadParameter(
            f"{value} is out of range: give a number of at least 0 (0: the likeliest token)"
        )
    return value


def _check_store(value: str | None) -> str | None:
    if value == "":  # as of a variable that is not set: it shall not mean the default store
        raise typer.BadParameter("it is empty: name a folder or a URL, or leave it out")
    return value


Target = Annotated[
    Side | None,
    typer.Option(
        "--target",
        help="Whose turns of conversations are learnt. Default: the user's in logs (ChatGPT's export, LangChain), the "
        "assistant's in files made for training.",
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "--model", metavar="M", help="Base model: starter, a Hugging Face id or a local path."
    ),
]
Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        callback=_check_store,
        help="Adapter store: a folder, or a file://, s3://, gs:// or az:// URL. Default: COPE_STORE, else the user data folder.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="D", help="cpu, cuda, cuda:1 or mps. Default: the best there is."
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
User = Annotated[str, typer.Argument(metavar="USER", help="User id.")]
Version = Annotated[
    str, typer.Argument(metavar="VERSION", help="Version id, as `adapters show` lists it.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why, for the history.")]
Limit = Annotated[
    int, typer.Option("--limit", metavar="N", min=1, help="Users of a page, at most.")
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object, and nothing else, on standard output."),
]
Alpha = Annotated[
    float | None,
    typer.Option(
        "--alpha",
        metavar="A",
        callback=_check_alpha,
        help="Weight of the base that is contrasted away. Default: what the adapter recommends, else 0.1.",
    ),
]
Tau = Annotated[
    float | None,
    typer.Option(
        "--tau",
        metavar="T",
        callback=_check_tau,
        help="Tokens below this share of the likeliest one's probability are out. Default: as for --alpha.",
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
    int, typer.Option("--max-tokens", metavar="N", min=1, help="Tokens of an answer, at most.")
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", min=0, help="For repeatable samples.")
]
