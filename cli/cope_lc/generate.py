"""`cope-lc generate`: one answer, and with `--explain` how each of its tokens came about."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    Json,
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
from cope_lc.output import Output
from cope_lc.quiet_libraries import prints_to_stderr
from cope_lc.screen import cell, console, number, say, table
from cope_lc.text import clean, name_of

if TYPE_CHECKING:
    from langchain_core.messages import AIMessageChunk
    from rich.table import Table
    from rich.text import Text

# Differences of two log-probabilities, in nats, from which a token is coloured, and is bold.
_COLOURED, _BOLD = 0.3, 1.0


def generate(
    prompt: Annotated[
        str,
        typer.Argument(metavar="PROMPT", help="What to answer; - reads it from standard input."),
    ],
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
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Show how likely user and base found each token."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Answer one prompt in a user's manner.

    The base answers where the user has no adapter.
    """
    if explain and user is None:
        raise typer.BadParameter(
            "it compares a user with the base: add --user ID", param_hint="--explain"
        )
    text = _prompt_text(prompt)
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
    is_streamed = not (as_json or explain)
    answer = _answer(text, options, explain=explain, is_streamed=is_streamed)
    if not is_streamed:
        Output(as_json).show(_facts(answer), lambda: _show_explained(answer))
    for note in _notes(answer, user):
        print(f"note: {note}", file=sys.stderr)


def _prompt_text(prompt: str) -> str:
    """Return the prompt, read from standard input where it is "-"; refuse one without text."""
    text = prompt
    if prompt == "-":
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
    prompt: str, options: ChatOptions, *, explain: bool, is_streamed: bool
) -> "AIMessageChunk":
    """Return the whole answer, after printing it as it came if `is_streamed`."""
    out = sys.stdout
    whole: Any = None
    call_options: dict[str, Any] = {"logprobs": True} if explain else {}
    with prints_to_stderr():
        for chunk in options.chat_model().stream(prompt, **call_options):
            whole = chunk if whole is None else whole + chunk
            if is_streamed:
                print(clean(str(chunk.content), keep="\n\t"), end="", file=out, flush=True)
    if is_streamed:
        print(file=out, flush=True)
    return whole  # type: ignore[no-any-return]


def _facts(answer: "AIMessageChunk") -> dict[str, Any]:
    usage = dict(answer.usage_metadata or {})
    return {"text": answer.text, **answer.response_metadata, "usage": usage}


def _notes(answer: "AIMessageChunk", user: str | None) -> Iterator[str]:
    metadata = answer.response_metadata
    if user is not None and metadata["adapter_version"] is None:
        yield f"{name_of(user)} has no adapter yet: the base answered"
    if metadata["relevance"] == 0:
        yield UNLIKE_HISTORY
    if metadata["finish_reason"] == "length":
        num_tokens = answer.usage_metadata["output_tokens"] if answer.usage_metadata else 0
        yield f"the answer was cut at {num_tokens} tokens"


def _show_explained(answer: "AIMessageChunk") -> None:
    """Print the answer with its tokens coloured, then a line for each token."""
    metadata = answer.response_metadata
    tokens = metadata["logprobs"]
    out = console()
    out.print(_coloured(answer.text, tokens))
    say(out, "\ngreen: likelier for the user than for the base; red: less likely\n", "dim")
    out.print(_token_table(tokens))
    changed = f"{metadata['contrast_changed']:.0%} of the tokens are not the adapter's first choice"
    scale = f"adapter scale {metadata['adapter_scale']:g}"
    contrast = f"α {metadata['alpha']:g}, τ {metadata['tau']:g}, {scale}"
    legend = "reward = log p user − α · log p base, in nats"
    version = f"version {metadata['adapter_version']}"
    say(out, f"\n{legend}; {changed}; {contrast}, {version}", "dim")


def _token_table(tokens: list[dict[str, Any]]) -> "Table":
    columns = ("log p user", "log p base", "difference", "reward")
    rows = table("token", *columns, right=columns)
    for token in tokens:
        difference = _difference(token)
        values = (token["log_p_user"], token["log_p_base"], difference, token["reward"])
        figures = [number(value, 2) for value in values]
        rows.add_row(cell(_visible(token["token"]), _style(difference)), *figures)
    return rows


def _coloured(text: str, tokens: list[dict[str, Any]]) -> "Text":
    """Return the answer, its tokens coloured where they spell it one after the other."""
    from rich.text import Text

    if not "".join(token["token"] for token in tokens).startswith(text):
        return cell(text)  # not every tokenizer's tokens spell the text
    line, rest = Text(), text
    for token in tokens:  # the last one may be the end of the turn, which is no text
        length = len(token["token"])
        piece, rest = rest[:length], rest[length:]
        line.append_text(cell(piece, _style(_difference(token))))
    return line


def _difference(token: dict[str, Any]) -> float:
    """Return log p user − log p base, in nats."""
    return float(token["log_p_user"] - token["log_p_base"])


def _style(difference: float) -> str:
    if abs(difference) < _COLOURED:
        return ""
    colour = "green" if difference > 0 else "red"
    return f"bold {colour}" if abs(difference) >= _BOLD else colour


def _visible(token: str) -> str:
    """Return a token with visible signs for its blanks, line breaks and tabs."""
    return token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
