"""The result of a command, on standard output: one JSON object for programs, or text for people.

A command gathers its facts, then ends in one call:

    Output(as_json).show(facts, "2 users erased")               # a line of text
    Output(as_json).show(facts, lambda: _show_table(users))     # or a function that prints more

Progress, notes and errors are no result: they go to standard error.
"""

from collections.abc import Callable, Mapping
from typing import Any

from cope_lc.text import print_json


class Output:
    """The form of a command's result, as `--json` chose it."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json

    def show(self, facts: Mapping[str, Any], text: str | Callable[[], object]) -> None:
        """Print the facts as one JSON object; for people print `text`, or call it to print."""
        if self._as_json:
            print_json(facts)
        elif isinstance(text, str):
            print(text)
        else:
            text()
