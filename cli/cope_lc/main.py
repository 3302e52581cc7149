"""The app: the table of commands, and where an error becomes an exit code.

0  done                 1  it failed                 2  the input or the call was wrong
"""

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cope_lc import failures, keys
from cope_lc.adapters import care, transfer, versions
from cope_lc.chat import chat
from cope_lc.doctor import doctor
from cope_lc.evaluate import evaluate
from cope_lc.fleet import migrate, personalize_fleet
from cope_lc.forget import forget
from cope_lc.generate import generate
from cope_lc.personalize import personalize
from cope_lc.serve import serve
from cope_lc.task_adapter import task_adapter

HELP = """Answer every user in that user's own manner, on one local base model.

\b
cope-lc personalize user.jsonl            learn from what a user wrote
cope-lc chat --user ID                    talk to the result
cope-lc generate "a prompt" --user ID     one answer
cope-lc serve                             all users over the OpenAI protocol
cope-lc COMMAND --help                    options and an example

Exit codes: 0 done, 1 it failed, 2 the input or the call was wrong.
"""
ADAPTERS_HELP = "List, show, activate, export, import, delete, erase and check adapters in a store."
FLEET_HELP = "What is done to all users of a store."
KEYS_HELP = "Make, list and revoke the keys of a server."

# Name, function, and the arguments of an example.
Command = tuple[str, Callable[..., None], str]
COMMANDS: tuple[Command, ...] = (
    ("personalize", personalize, "user.jsonl --user alice"),
    ("personalize-fleet", personalize_fleet, "./histories --workers 2"),
    ("chat", chat, "--user alice"),
    ("generate", generate, '"Write a headline for: …" --user alice'),
    ("evaluate", evaluate, "users.jsonl --limit 6"),
    ("task-adapter", task_adapter, "users.jsonl --out ./task"),
    ("serve", serve, "--keys keys.json"),
    ("forget", forget, "alice --history ./chroma --job-dir ./jobs"),
    ("doctor", doctor, ""),
)
ADAPTERS: tuple[Command, ...] = (
    ("list", versions.list_users, "--store ~/adapters"),
    ("show", versions.show, "alice"),
    ("activate", versions.activate, "alice 20260131T235959Z-0123456789ab"),
    ("rollback", versions.rollback, 'alice --reason "worse answers"'),
    ("delete", versions.delete, "alice 20260131T235959Z-0123456789ab"),
    ("erase", versions.erase, "alice --yes"),
    ("export", transfer.export, "alice ./alice-adapter"),
    ("export-all", transfer.export_all, "./users"),
    ("import", transfer.import_one, "alice.tar"),
    ("import-all", transfer.import_all, "./users --store s3://bucket/adapters"),
    ("verify", care.verify, ""),
    ("gc", care.gc, "--dry-run"),
    ("new-key", care.new_key, "~/.cope-keys; export COPE_STORE_KEY_FILE=~/.cope-keys"),
    ("rotate-keys", care.rotate_keys, ""),
)
FLEET: tuple[Command, ...] = (("migrate", migrate, "./histories --base ./new-base"),)
KEYS: tuple[Command, ...] = (
    ("new", keys.new, "--keys keys.json --user alice"),
    ("list", keys.list_keys, "--keys keys.json"),
    ("revoke", keys.revoke, "0123456789ab --keys keys.json"),
)


class Commands(TyperGroup):
    """The root group: it runs a command and ends the process with the command's exit code."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run a command; raises SystemExit with 0, 1 or 2."""
        words, debug = _without_debug(list(sys.argv[1:] if args is None else args))
        extra["standalone_mode"] = False  # errors come back to us
        run = super().main
        failures.exit_with(lambda: run(words, *rest, **extra), debug=debug)


def _without_debug(words: list[str]) -> tuple[list[str], bool]:
    """Take `--debug` out of a command line: it may stand anywhere before `--`."""
    end = words.index("--") if "--" in words else len(words)
    options, arguments = words[:end], words[end:]
    others = [word for word in options if word != "--debug"]
    return others + arguments, "--debug" in options


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version  # slow to import

        typer.echo(f"cope-lc {version('langchain-cope')}")
        raise typer.Exit


def _add(group: typer.Typer, prefix: str, commands: Sequence[Command]) -> None:
    for name, function, arguments in commands:
        example = f"Example: {prefix} {name} {arguments}".rstrip()
        group.command(name, epilog=example)(function)


app = typer.Typer(
    name="cope-lc",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help needs no rich, which would cost half of its time
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
adapters = typer.Typer(
    help=ADAPTERS_HELP,
    epilog="Example: cope-lc adapters show alice",
    no_args_is_help=True,
    rich_markup_mode=None,
)
server_keys = typer.Typer(
    help=KEYS_HELP,
    epilog="Example: cope-lc keys new --keys keys.json --user alice",
    no_args_is_help=True,
    rich_markup_mode=None,
)
fleet = typer.Typer(
    help=FLEET_HELP,
    epilog="Example: cope-lc fleet migrate ./histories --base ./new-base",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_add(app, "cope-lc", COMMANDS)
_add(adapters, "cope-lc adapters", ADAPTERS)
_add(server_keys, "cope-lc keys", KEYS)
_add(fleet, "cope-lc fleet", FLEET)
app.add_typer(adapters, name="adapters")
app.add_typer(server_keys, name="keys")
app.add_typer(fleet, name="fleet")


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
