"""Writes docs/command-line.md: every command of `cope-lc` with its options, from the app itself.

    make docs-cli                     or: python docs/generate_cli.py

It reads what the commands tell Typer (names, defaults, help texts, examples), and not the printed
help, whose form changes with Typer's releases. tests/cli/test_command_line_page.py fails when the
page is stale.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args

import typer
from cope_lc.main import app
from typer.models import ArgumentInfo, ParameterInfo, ParamMeta
from typer.utils import get_params_from_function

PAGE = Path(__file__).with_name("command-line.md")
BEGINNING = """\
# The command line

<!-- Written by docs/generate_cli.py: do not edit, run `make docs-cli`. -->

The package brings the command `cope-lc`. Each command shows its options and an
example with `--help`.

| Exit code | Meaning |
|---|---|
| 0 | done |
| 1 | it failed |
| 2 | the input or the call was wrong |

Results go to standard output; progress, notes and errors go to standard error. With `--json` a
command prints one JSON object and nothing else on standard output. What failed is told in one line;
with `--debug`, anywhere among the options, the traceback is shown as well. `cope-lc --version`
prints the version.
"""


@dataclass(frozen=True)
class _Command:
    name: str
    function: Callable[..., Any]
    example: str

    def paragraphs(self) -> list[str]:
        """Return the paragraphs of the help text, each as one line."""
        text = inspect.getdoc(self.function) or ""
        return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def page() -> str:
    """Return the page as Markdown."""
    commands = list(_commands(app, "cope-lc"))
    lines = [BEGINNING, "| Command | What it does |", "|---|---|"]
    for command in commands:
        anchor = command.name.replace(" ", "-")
        summary = _in_table(command.paragraphs()[0])
        lines.append(f"| [`{command.name}`](#{anchor}) | {summary} |")
    lines.append("")
    for command in commands:
        lines += _section(command)
    return "\n".join(lines)


def _commands(group: typer.Typer, prefix: str) -> Iterator[_Command]:
    """Yield the commands of a group, then those of the groups below it."""
    for command in group.registered_commands:
        assert command.callback is not None
        example = (command.epilog or "").removeprefix("Example: ")
        yield _Command(f"{prefix} {command.name}", command.callback, example)
    for subgroup in group.registered_groups:
        assert subgroup.typer_instance is not None
        yield from _commands(subgroup.typer_instance, f"{prefix} {subgroup.name}")


def _section(command: _Command) -> Iterator[str]:
    """Yield the lines of a command's section."""
    parameters = [*map(_Parameter, get_params_from_function(command.function).values())]
    arguments = [parameter.usage for parameter in parameters if parameter.is_argument]
    yield from (f"## {command.name}", "")
    for paragraph in command.paragraphs():
        yield from (paragraph, "")
    yield from ("```sh", " ".join([command.name, "[OPTIONS]", *arguments]), "```", "")
    yield from ("| Argument or option | Default | Meaning |", "|---|---|---|")
    for parameter in parameters:
        yield f"| {parameter.name} | {parameter.default} | {parameter.meaning} |"
    yield from ("", "Example:", "", "```sh", command.example, "```", "")


class _Parameter:
    """A parameter of a command as a row of its table."""

    def __init__(self, parameter: ParamMeta) -> None:
        assert isinstance(parameter.default, ParameterInfo), parameter.name
        self._type = parameter.annotation
        self._info = parameter.default

    @property
    def is_argument(self) -> bool:
        return isinstance(self._info, ArgumentInfo)

    @property
    def _is_required(self) -> bool:
        return self._info.default is ...

    @property
    def usage(self) -> str:
        """An argument in a usage line; optional ones stand in brackets."""
        return str(self._info.metavar) if self._is_required else f"[{self._info.metavar}]"

    @property
    def name(self) -> str:
        if self.is_argument:
            return f"`{self._info.metavar}`"
        value = self._value_name()
        return ", ".join(f"`{name}{value}`" for name in self._info.param_decls or ())

    def _value_name(self) -> str:
        """Return what stands for an option's value after its name; nothing for a flag."""
        if self._type is bool:
            return ""
        choices = self._choices()
        return f" {choices.__name__.upper()}" if choices else f" {self._info.metavar}"

    def _choices(self) -> type[Enum] | None:
        for kind in (self._type, *get_args(self._type)):  # itself, or within `Choices | None`
            if isinstance(kind, type) and issubclass(kind, Enum):
                return kind
        return None

    @property
    def default(self) -> str:
        default = self._info.default
        if self._is_required:
            return "required"
        if default is None or default is False or default == "":
            return ""
        return f"`{default}`"

    @property
    def meaning(self) -> str:
        """The help text, with an option's choices or the range of a number."""
        text = _in_table(self._info.help or "")
        choices = self._choices()
        if choices:
            return f"{text} One of: {', '.join(choice.value for choice in choices)}."
        low, high = self._info.min, self._info.max
        if low is not None and high is not None:
            return f"{text} From {low} to {high}."
        return text if low is None else f"{text} At least {low}."


def _in_table(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
