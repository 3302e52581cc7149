"""The app: what commands there are, and the one place where errors become exit codes.

0  done                 1  it failed                 2  the input or the call was wrong
"""

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cope_lc import chat, doctor, evaluate, generate, personalize
from cope_lc.adapters import versions as adapters

HELP = """Answer every user in that user's own manner, on one local base model.

\b
cope-lc personalize user.jsonl            learn from what a user wrote
cope-lc chat --user ID                    talk to the result
cope-lc generate "a prompt" --user ID     one answer
cope-lc COMMAND --help                    options and an example

Exit codes: 0 done, 1 it failed, 2 the input or the call was wrong.
"""


class Commands(TyperGroup):
    """The root group: it runs a command and ends the process with the contract's exit code."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run a command; raises SystemExit with 0, 1 or 2. ``--debug`` may stand anywhere before ``--``."""
        import sys

        from cope_lc import failures

        words = list(sys.argv[1:] if args is None else args)
        options = words[: words.index("--")] if "--" in words else words
        extra["standalone_mode"] = False
        kept = [
            word for index, word in enumerate(words) if word != "--debug" or index >= len(options)
        ]
        main = super().main
        failures.exit_with(lambda: main(kept, *rest, **extra), debug="--debug" in options)


app = typer.Typer(
    name="cope-lc",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help needs no rich, which would cost half of its time
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command(epilog=personalize.EXAMPLE)(personalize.personalize)
app.command(epilog=chat.EXAMPLE)(chat.chat)
app.command(epilog=generate.EXAMPLE)(generate.generate)
app.command(epilog=evaluate.EXAMPLE)(evaluate.evaluate)
app.add_typer(adapters.app, name="adapters")
app.command(epilog=doctor.EXAMPLE)(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"cope-lc {version('langchain-cope')}")
        raise typer.Exit


@app.callback(help=HELP)
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback where something fails.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""
