"""``cope-lc generate``: one answer, and with ``--explain`` how each of its tokens came about."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cope_lc.options import (
    Alpha,
    Device,
    Dtype,
    Json,
    MaxTokens,
    Model,
    Seed,
    Store,
    Tau,
    Temperature,
)

if TYPE_CHECKING:
    from langchain_core.messages import AIMessageChunk
    from rich.text import Text

EXAMPLE = 'Example: cope-lc generate "Write a headline for: …" --user alice'
# The difference of two log-probabilities, in nats, from which a token is coloured.
_CLEAR, _STRONG = 0.3, 1.0


def generate(
    prompt: Annotated[
        str,
        typer.Argument(metavar="PROMPT", help="What to answer; - reads it from standard input."),
    ],
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
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Show for each token what user and base thought of it."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Answer one prompt in a user's manner; a user without an adapter is answered by the base."""
    from cope_lc.text import name_of

    if explain and user is None:
        raise typer.BadParameter(
            "it compares a user with the base: add --user ID", param_hint="--explain"
        )
    question = _prompt(prompt)
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
    answer = _answer(
        question, user, {**settings, **sampling}, explain=explain, silent=as_json or explain
    )
    if as_json:
        _print_json(answer)
    elif explain:
        _show_explained(answer)
    if user is not None and answer.response_metadata["adapter_version"] is None:
        print(f"note: {name_of(user)} has no adapter yet: the base answered", file=sys.stderr)
    if answer.response_metadata["finish_reason"] == "length":
        print(f"note: the answer was cut at {_num_tokens(answer)} tokens", file=sys.stderr)


def _prompt(given: str) -> str:
    text = given
    if given == "-":
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise typer.BadParameter(
                "standard input is not UTF-8 text", param_hint="PROMPT"
            ) from error
    if not text.strip():
        raise typer.BadParameter("it is empty: give some text", param_hint="PROMPT")
    if not text.isascii() and text.encode(errors="replace").decode() != text:
        raise typer.BadParameter("it is not UTF-8 text", param_hint="PROMPT")
    return text


def _answer(
    prompt: str, user: str | None, settings: dict[str, Any], *, explain: bool, silent: bool
) -> "AIMessageChunk":
    """The whole answer, printed as it comes unless ``silent``."""
    from cope_lc.quiet_libraries import prints_to_stderr
    from cope_lc.text import clean
    from langchain_cope import ChatCoPe

    out = sys.stdout
    whole: Any = None
    with prints_to_stderr():
        options: dict[str, Any] = {"logprobs": True} if explain else {}
        for chunk in ChatCoPe(user_id=user, **settings).stream(prompt, **options):
            whole = chunk if whole is None else whole + chunk
            if not silent:
                print(clean(str(chunk.content), keep="\n\t"), end="", file=out, flush=True)
    if not silent:
        print(file=out, flush=True)
    return whole  # type: ignore[no-any-return]


def _num_tokens(answer: "AIMessageChunk") -> int:
    return answer.usage_metadata["output_tokens"] if answer.usage_metadata else 0


def _print_json(answer: "AIMessageChunk") -> None:
    from cope_lc.text import print_json

    print_json(
        {
            "text": answer.text,
            **answer.response_metadata,
            "usage": dict(answer.usage_metadata or {}),
        }
    )


def _show_explained(answer: "AIMessageChunk") -> None:
    """The answer with its tokens coloured, then a row a token."""
    from cope_lc.screen import cell, console, number, say, table

    facts = answer.response_metadata
    out = console()
    figures = ("log p user", "log p base", "difference", "reward")
    rows = table("token", *figures, right=figures)
    for token in facts["logprobs"]:
        gain = _gain(token)
        values = (token["log_p_user"], token["log_p_base"], gain, token["reward"])
        rows.add_row(
            cell(_visible(token["token"]), _style(gain)), *(number(value, 2) for value in values)
        )
    out.print(_coloured(answer.text, facts["logprobs"]))
    say(out, "\ngreen: likelier for the user than for the base; red: less likely\n", "dim")
    out.print(rows)
    changed = (
        f"{facts['contrast_changed']:.0%} of the tokens are not the adapter's own first choice"
    )
    strengths = f"α {facts['alpha']:g}, τ {facts['tau']:g}, version {facts['adapter_version']}"
    say(out, f"\nreward = log p user − α · log p base, in nats; {changed}; {strengths}", "dim")


def _coloured(text: str, tokens: list[dict[str, Any]]) -> "Text":
    """The answer; its tokens coloured where they spell it one after the other, as not every tokenizer's do."""
    from rich.text import Text

    from cope_lc.screen import cell

    if not "".join(token["token"] for token in tokens).startswith(text):
        return cell(text)
    made, left = Text(), text
    for token in tokens:  # the last one may be the end of the turn, which is no text
        piece, left = left[: len(token["token"])], left[len(token["token"]) :]
        made.append_text(cell(piece, _style(_gain(token))))
    return made


def _gain(token: dict[str, Any]) -> float:
    return float(token["log_p_user"] - token["log_p_base"])


def _style(gain: float) -> str:
    if abs(gain) < _CLEAR:
        return ""
    colour = "green" if gain > 0 else "red"
    return f"bold {colour}" if abs(gain) >= _STRONG else colour


def _visible(token: str) -> str:
    """A token with its blanks and line breaks to be seen."""
    return token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
