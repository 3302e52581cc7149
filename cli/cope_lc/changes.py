"""What changed from one text to another, word by word, marked for people."""

from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from cope_lc.text import one_line

if TYPE_CHECKING:
    from rich.text import Text

STYLE = "bold green"
PLAIN_MARKS = ("{+", "+}")  # as `git diff --word-diff` has them


def marked(text: str, before: str, *, colour: bool) -> "Text":
    """Return `text` as one safe line in which the words that are not in `before` are marked.

    They are in another colour, or between `PLAIN_MARKS` where there is no `colour`.
    """
    from rich.text import Text

    line = Text()
    for words, is_new in _runs(one_line(text).split(), one_line(before).split()):
        run = " ".join(words)
        if is_new and not colour:
            run = run.join(PLAIN_MARKS)
        line.append(" " if line else "")
        line.append(run, STYLE if is_new and colour else "")
    return line


def _runs(words: list[str], before: list[str]) -> list[tuple[list[str], bool]]:
    """Return the runs of `words`, each with whether it is new against `before`."""
    matcher = SequenceMatcher(a=before, b=words, autojunk=False)
    return [
        (words[start:end], tag != "equal")
        for tag, _, _, start, end in matcher.get_opcodes()
        if start < end
    ]
