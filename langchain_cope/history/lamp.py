"""Profiles and queries of the LaMP and LongLaMP benchmarks as prompt/completion rows.

A profile entry names its fields by task. The prompts follow the form of the tasks' own questions,
so that what is learned on a profile fits the query. Two tasks share the fields title and abstract,
two the fields title and text: there the wording of the user's question decides.
"""

from typing import Any, NamedTuple

from langchain_cope.errors import HistoryError
from langchain_cope.history.rows import TIME_KEYS, Located, Row

LAMP_USER_KEYS = ("user_id", "user", "reviewerId", "author", "name", "id")
"""Where a LaMP or LongLaMP line names its user."""


class _Task(NamedTuple):
    """A task of the benchmarks, recognised by the fields of its profile entries."""

    fields: tuple[str, ...]
    written: str
    """The field that the user wrote."""
    prompt: str
    wording: str = ""
    """What the user's question must contain."""


_TASKS = (
    # LongLaMP, product reviews
    _Task(
        ("reviewText", "summary", "description", "overall"),
        written="reviewText",
        prompt=(
            'Generate the review text for an overall rating of "{overall}" and a product with '
            'description "{description}". The summary of the review text is "{summary}".'
        ),
    ),
    # LongLaMP, topics
    _Task(
        ("summary", "content"),
        written="content",
        prompt="Generate the content for a reddit post {summary}",
    ),
    # LaMP-2N
    _Task(
        ("text", "category"),
        written="category",
        prompt="Which category does this article relate to? article: {text}",
    ),
    # LaMP-2
    _Task(
        ("description", "tag"),
        written="tag",
        prompt="Which tag does this movie relate to? description: {description}",
    ),
    # LaMP-3
    _Task(
        ("text", "score"),
        written="score",
        prompt="What is the score of the following review? review: {text}",
    ),
    # LongLaMP, abstracts
    _Task(
        ("title", "abstract"),
        written="abstract",
        prompt='Generate an abstract for the title "{title}".',
        wording="abstract for the title",
    ),
    # LaMP-1, LaMP-5
    _Task(
        ("title", "abstract"),
        written="title",
        prompt="Generate a title for the following abstract of a paper: {abstract}",
    ),
    # LaMP-6
    _Task(
        ("title", "text"),
        written="title",
        prompt="Generate a subject for the following email: {text}",
        wording="email",
    ),
    # LaMP-4
    _Task(
        ("title", "text"),
        written="title",
        prompt="Generate a headline for the following article: {text}",
    ),
    # The tasks' own questions and answers
    _Task(("input", "output"), written="output", prompt="{input}"),
)
_BOOKKEEPING = {"id", "user_id", "author", "name", *TIME_KEYS}


def lamp_rows(row: Row) -> list[Row]:
    """Return a row for each entry of a profile; a tweet or other plain text has no prompt.

    Raises HistoryError that names the fields of an entry of an unknown task.
    """
    entries = row.field("profile").entries()
    question = " ".join(str(query.get("input")) for query in _questions(row))
    return [_entry_row(entry.row(), question) for entry in entries]


def lamp_queries(row: Row) -> list[Row]:
    """Return the questions with an answer in the line, given as gold or output."""
    queries = []
    for query in _questions(row):
        answer = query.get("gold", query.get("output"))
        if answer is not None:
            fields = {"prompt": query.get("input"), "completion": str(answer)}
            queries.append(query.with_fields(fields))
    return queries


def _questions(row: Row) -> list[Row]:
    """Return the user's questions.

    LaMP's own files hold one question a line as input; others collect a user's under query.
    """
    queries: Any = row.get("query")
    if "query" not in row:
        queries = [row.value] if "input" in row else []
    elif isinstance(queries, str):
        queries = [{"input": queries}]
    elif not isinstance(queries, list):
        queries = [queries]
    located = Located(f"{row.where}: query", queries)
    return [query.row() for query in located.entries()]


def _entry_row(entry: Row, question: str) -> Row:
    times = {key: entry[key] for key in TIME_KEYS if key in entry}
    keys = entry.value.keys()
    for task in _TASKS:
        if keys >= set(task.fields) and task.wording in question:
            values = {name: _plain(entry[name]) for name in task.fields}
            prompt = task.prompt.format(**values)
            return entry.with_fields(
                {"prompt": prompt, "completion": values[task.written], **times}
            )
    if "text" in entry and keys <= {"text", *_BOOKKEEPING}:  # LaMP-7: tweets
        return entry.with_fields({"completion": _plain(entry["text"]), **times})
    known = "; ".join(", ".join(task.fields) for task in _TASKS if not task.wording)
    raise HistoryError(
        f"{entry.where}: fields of no known task: {entry.field_names()}; known: {known}; text alone"
    )


def _plain(value: Any) -> str:
    if isinstance(value, list):  # descriptions of products come as lists of paragraphs
        return " ".join(str(part) for part in value)
    return "" if value is None else str(value)
