"""Consoles and tables. Cells are rich ``Text`` made of cleaned strings, so that nobody's text is read as markup."""

import sys
from typing import TYPE_CHECKING, Any

from cope_lc.text import clean

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

PIPE_WIDTH = 120  # columns where nobody's terminal says


def console(*, stderr: bool = False) -> "Console":
    """A console on standard output, where results go, or on standard error, where progress goes."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    found = Console(file=stream, highlight=False, markup=False, emoji=False)
    if not found.is_terminal and not found._environ.get("COLUMNS"):
        found.width = PIPE_WIDTH
    return found


def table(*columns: str, right: tuple[str, ...] = (), whole: tuple[str, ...] = ()) -> "Table":
    """A table without lines; the columns in ``right`` are numbers, those in ``whole`` are never folded."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        justify: Any = "right" if name in right else "left"
        made.add_column(
            name, justify=justify, no_wrap=name in whole or name in right, overflow="fold"
        )
    return made


def say(out: "Console", line: str, style: str = "", *, whole: bool = False) -> None:
    """Print a line of anybody's text, wrapped at blanks on a terminal; ``whole``: a command or path, left in one piece."""
    out.print(cell(line, style), soft_wrap=whole or not out.is_terminal)


def say_passed_over(problems: list[str]) -> None:
    """Print what is wrong with users that a command had to pass over."""
    if problems:
        out = console()
        for problem in problems:
            say(out, f"passed over: {problem}", "yellow", whole=True)


def pairs(out: "Console", rows: "list[tuple[str, str, str]]") -> None:
    """Print (name, text, style) rows as two columns, and an empty line."""
    from rich.table import Table

    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for name, text, style in rows:
        made.add_row(cell(name, style), cell(text, style))
    out.print(made)
    out.print()


def cell(text: object, style: str = "") -> "Text":
    """A table cell or a line of anybody's text; line breaks stay."""
    from rich.text import Text

    return Text(clean(str(text), keep="\n\t"), style=style)


def number(value: object, digits: int = 3) -> str:
    """A figure of a table, "–" where there is none."""
    return (
        f"{round(value, digits) + 0.0:.{digits}f}" if isinstance(value, int | float) else "–"
    )  # + 0.0: no "-0.00"
