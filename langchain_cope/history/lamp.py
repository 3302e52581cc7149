"""Profiles and queries of the LaMP and LongLaMP benchmarks as prompt/completion rows.

A profile entry names its fields by task. The prompts follow the form of the tasks' own questions, so that what is
learned on a profile fits the query. Two tasks share the fields title and abstract, two the fields title and text:
there the wording of the user's question decides.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from langchain_cope.errors import HistoryError
from langchain_cope.history.reader import TIME_KEYS, checked_row, named


class _Task(NamedTuple):
    """``wording``: what the question must contain; ``written``: the field that the user wrote."""

    fields: tuple[str, ...]
    written: str
    prompt: str
    wording: str = ""


_TASKS = (
    _Task(
        ("reviewText", "summary", "description", "overall"),
        "reviewText",
        'Generate the review text for an overall rating of "{overall}" and a product with description "{description}". '
        'The summary of the review text is "{summary}".',
    ),  # LongLaMP product review
    _Task(
        ("summary", "content"), "content", "Generate the content for a reddit post {summary}"
    ),  # LongLaMP topic
    _Task(
        ("text", "category"),
        "category",
        "Which category does this article relate to? article: {text}",
    ),  # LaMP-2N
    _Task(
        ("description", "tag"),
        "tag",
        "Which tag does this movie relate to? description: {description}",
    ),  # LaMP-2
    _Task(
        ("text", "score"), "score", "What is the score of the following review? review: {text}"
    ),  # LaMP-3
    _Task(
        ("title", "abstract"),
        "abstract",
        'Generate an abstract for the title "{title}".',
        wording="abstract for the title",
    ),  # LongLaMP abstract
    _Task(
        ("title", "abstract"),
        "title",
        "Generate a title for the following abstract of a paper: {abstract}",
    ),  # LaMP-1, LaMP-5
    _Task(
        ("title", "text"),
        "title",
        "Generate a subject for the following email: {text}",
        wording="email",
    ),  # LaMP-6
    _Task(
        ("title", "text"), "title", "Generate a headline for the following article: {text}"
    ),  # LaMP-4
    _Task(("input", "output"), "output", "{input}"),
)
_BOOKKEEPING = {"id", "user_id", "author", "name", *TIME_KEYS}
USER_KEYS = ("user_id", "user", "reviewerId", "author", "name", "id")
"""Where a LaMP or LongLaMP line names its user."""


def lamp_history(row: Mapping[str, Any], where: str) -> list[tuple[str, dict[str, Any]]]:
    """Return a profile as (where, row) pairs; a tweet or other plain text has no prompt.

    Raises HistoryError that names the fields of an entry of no known task.
    """
    profile = row["profile"]
    if not isinstance(profile, list):
        raise HistoryError(f"{where}: profile must be a list, not {type(profile).__name__}")
    question = " ".join(str(query.get("input")) for query in _questions(row, where))
    located = [(f"{where}: profile[{index}]", entry) for index, entry in enumerate(profile)]
    return [(here, _entry(checked_row(entry, here), question, here)) for here, entry in located]


def lamp_queries(row: Mapping[str, Any], where: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the questions whose answer the line holds (as gold or output) as (where, row) pairs."""
    return [
        (f"{where}: query[{index}]", {"prompt": query.get("input"), "completion": str(answer)})
        for index, query in enumerate(_questions(row, where))
        if (answer := query.get("gold", query.get("output"))) is not None
    ]


def _questions(row: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    """LaMP's own files hold one question a line as input; others collect a user's questions under query."""
    query = row.get("query", [row] if "input" in row else [])
    if isinstance(query, str):
        query = {"input": query}
    queries: Sequence[Any] = query if isinstance(query, list) else [query]
    return [checked_row(one, f"{where}: query[{index}]") for index, one in enumerate(queries)]


def _entry(entry: Mapping[str, Any], question: str, where: str) -> dict[str, Any]:
    times = {key: entry[key] for key in TIME_KEYS if key in entry}
    for task in _TASKS:
        if entry.keys() >= set(task.fields) and task.wording in question:
            values = {name: _plain(entry[name]) for name in task.fields}
            return {
                "prompt": task.prompt.format(**values),
                "completion": values[task.written],
                **times,
            }
    if "text" in entry and entry.keys() <= {"text", *_BOOKKEEPING}:  # LaMP-7: tweets
        return {"completion": _plain(entry["text"]), **times}
    known = "; ".join(", ".join(task.fields) for task in _TASKS if not task.wording)
    raise HistoryError(
        f"{where}: fields of no known task: {named(entry)}; known: {known}; text alone"
    )


def _plain(value: Any) -> str:
    if isinstance(value, list):  # descriptions of products come as lists of paragraphs
        return " ".join(str(part) for part in value)
    return "" if value is None else str(value)
