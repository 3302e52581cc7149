import io

import pytest
from cope_lc.changes import marked
from rich.console import Console


@pytest.mark.parametrize(
    ("text", "before", "plain"),
    [
        ("The cat came home", "The dog came home", "The {+cat+} came home"),
        ("A cat is home now", "A cat is home", "A cat is home {+now+}"),
        ("Cat home", "Cat is home", "Cat home"),
        ("All is new here", "Nothing", "{+All is new here+}"),
        ("The same", "The same", "The same"),
        ("", "Something", ""),
        ("New", "", "{+New+}"),
        ("two\n lines\x1b[2J", "two", "two {+lines\\x1b[2J+}"),
        ("a [bold]b", "a", "a {+[bold]b+}"),
    ],
)
def test_words_that_were_not_there_before_are_marked(text: str, before: str, plain: str) -> None:
    assert marked(text, before, colour=False).plain == plain


def test_on_a_terminal_the_marks_are_colour_alone() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="standard")
    console.print(marked("The cat came home", "The dog came home", colour=True))
    assert screen.getvalue() == "The \x1b[1;32mcat\x1b[0m came home\n"
