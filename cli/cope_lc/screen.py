"""Consoles, tables and questions for people.

Cells are rich `Text` of cleaned strings, not read as markup.
"""

import sys
from typing import TYPE_CHECKING, Any

import typer

from cope_lc.text import clean

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

PIPE_WIDTH = 120  # columns where no terminal says how wide it is


def console(*, stderr: bool = False) -> "Console":
    """Return a console on standard output, for results, or on standard error, for progress."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    out = Console(file=stream, highlight=False, markup=False, emoji=False)
    if not out.is_terminal and not out._environ.get("COLUMNS"):
        out.width = PIPE_WIDTH
    return out


def table(*columns: str, right: tuple[str, ...] = (), whole: tuple[str, ...] = ()) -> "Table":
    """Return a table without lines.

    Args:
        columns: Names of the columns.
        right: Those of numbers, which are aligned at the right and never folded.
        whole: Those of texts that are never folded.
    """
    from rich.table import Table

    rows = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        is_number = name in right
        justify: Any = "right" if is_number else "left"
        rows.add_column(name, justify=justify, no_wrap=is_number or name in whole, overflow="fold")
    return rows


def say(out: "Console", line: str, style: str = "", *, whole: bool = False) -> None:
    """Print a line, wrapped at blanks on a terminal; `whole` keeps a path or command unbroken."""
    out.print(cell(line, style), soft_wrap=whole or not out.is_terminal)


def say_skipped(problems: list[str]) -> None:
    """Print what is wrong with users that a command had to skip."""
    if problems:
        out = console()
        for problem in problems:
            say(out, f"skipped: {problem}", "yellow", whole=True)


def pairs(out: "Console", rows: "Iterable[tuple[str, str | Text, str]]") -> None:
    """Print (name, text, style) rows as two columns, and an empty line.

    A rich `Text` has been made safe, and keeps its own styles.
    """
    from rich.table import Table

    columns = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    columns.add_column(no_wrap=True)
    columns.add_column(overflow="fold")
    for name, text, style in rows:
        columns.add_row(cell(name, style), cell(text, style) if isinstance(text, str) else text)
    out.print(columns)
    out.print()


def confirm(question: str, doing: str) -> None:
    """Ask on the terminal; refuse where there is no terminal to ask on."""
    if not sys.stdin.isatty():
        raise typer.BadParameter(
            f"{doing} asks first, and there is no terminal to ask on: add --yes", param_hint="--yes"
        )
    print(f"{clean(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise typer.Abort


def cell(text: object, style: str = "") -> "Text":
    """Return a table cell or a line of any text, made safe; line breaks stay."""
    from rich.text import Text

    return Text(clean(str(text), keep="\n\t"), style=style)


def number(value: object, digits: int = 3) -> str:
    """Return a figure of a table, "–" for a value that is not a number."""
    if not isinstance(value, int | float):
        return "–"
    rounded = round(value, digits) + 0.0  # + 0.0: -0.0 becomes 0.0
    return f"{rounded:.{digits}f}"
