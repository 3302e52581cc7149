"""Values that came from outside, each with its location, which every error about it begins with.

    Located    a value and where it stands: `user.jsonl:3: messages[0]: content`
    Row        a located value with named fields: a row of a history, a message, a node

Each check returns what it checked, or raises HistoryError with the location, what was found and
what was expected. Knows no format and no file.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from reprlib import Repr
from typing import Any, Literal

from pydantic import TypeAdapter

from langchain_cope.errors import HistoryError

TIME_KEYS = ("created_at", "date", "timestamp")
"""Where a row may carry its time."""
USER_KEYS = ("user_id", "user")
"""Where a row may name its user."""

_DATE = re.compile(r"(\d{4})(?:-(\d{1,2}))?(?:-(\d{1,2}))?")
_DATETIME = TypeAdapter(datetime)
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 2  # a value in a file may be nested deeper than repr() can follow


@dataclass(frozen=True, slots=True)
class Located:
    """A value and its location, such as `user.jsonl:3` or `history[0]: messages[1]`."""

    where: str
    value: Any

    def text(self) -> str:
        """Return the value, which must be text that can be encoded."""
        if not isinstance(self.value, str):
            raise HistoryError(f"{self.where} must be text, not {type(self.value).__name__}")
        try:
            self.value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise HistoryError(
                f"{self.where} holds half of a surrogate pair at character {error.start}"
            ) from None
        return self.value

    def name(self) -> str:
        """Return a name as text: any text but an empty one, or a whole number."""
        if isinstance(self.value, int) and not isinstance(self.value, bool):
            return str(self.value)
        name = self.text()
        if not name:
            raise HistoryError(f"{self.where} is empty")
        return name

    def entries(self) -> list["Located"]:
        """Return the entries of a list, each with its own location."""
        if not isinstance(self.value, list):
            raise HistoryError(f"{self.where} must be a list, not {type(self.value).__name__}")
        return [Located(f"{self.where}[{index}]", entry) for index, entry in enumerate(self.value)]

    def row(self) -> "Row":
        """Return the value, which must be a mapping, as a row."""
        if not isinstance(self.value, Mapping):
            raise HistoryError(
                f"{self.where}: expected an object with named fields, "
                f"found {type(self.value).__name__}"
            )
        return Row(self.where, self.value)

    def with_value(self, value: Any) -> "Located":
        """Return another value at the same location."""
        return Located(self.where, value)


@dataclass(frozen=True, slots=True)
class Row(Located):
    """Named fields and their location."""

    value: Mapping[str, Any]

    def __contains__(self, key: str) -> bool:
        return key in self.value

    def __getitem__(self, key: str) -> Any:
        return self.value[key]

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a field, `default` where the row lacks it."""
        return self.value.get(key, default)

    def field(self, key: str) -> Located:
        """Return the value of a field with its own location; None where the row lacks it."""
        return Located(f"{self.where}: {key}", self.value.get(key))

    def with_fields(self, fields: Mapping[str, Any]) -> "Row":
        """Return other fields at the same location."""
        return Row(self.where, fields)

    def field_names(self) -> str:
        """Return the names of the fields for an error, at most ten of them."""
        names = [f"{key!r:.40}" for key in list(self.value)[:10]]
        if len(self.value) > 10:
            names.append("…")
        return ", ".join(names) or "none"

    def user(self, keys: Sequence[str] = USER_KEYS) -> str | None:
        """Return the user that the first of `keys` names, None where the row names no user."""
        value = self._first_of(keys)
        if value is None:
            return None
        return Located(f"{self.where}: the user id", value).name()

    def time(self) -> datetime | None:
        """Return the row's time, None where it has none."""
        value = self._first_of(TIME_KEYS)
        if value is None or value == "":
            return None
        try:
            return parse_time(value)
        except ValueError:
            found = "a number out of range" if isinstance(value, int) else shown(value)
            raise HistoryError(
                f"{self.where}: the time is {found}; "
                "expected ISO 8601 (2024-05-31T12:00:00Z), a date or unix seconds"
            ) from None

    def _first_of(self, keys: Sequence[str]) -> Any:
        return next((self.value[key] for key in keys if self.value.get(key) is not None), None)


def checked_id(of: Literal["user", "session"], value: Any) -> str:
    """Return the id that a caller gave, as text; raises HistoryError for an empty one."""
    return Located(f"{of}_id: the {of} id", value).name()


def parse_time(value: Any) -> datetime:
    """Return an ISO 8601 time, a date (a year or a month will do), or unix seconds or milliseconds.

    Raises ValueError for anything else.
    """
    date = _DATE.fullmatch(str(value)) if isinstance(value, str | int) else None
    if date is None:
        return _DATETIME.validate_python(value)
    year, month, day = (int(part or 1) for part in date.groups())
    return datetime(year, month, day, tzinfo=UTC)


def first_time(messages: Any) -> datetime | None:
    """Return the time of the first message that has one which can be read."""
    for message in messages if isinstance(messages, list | tuple) else ():
        if isinstance(message, Mapping):
            with suppress(HistoryError):
                time = Row("message", message).time()
                if time is not None:
                    return time
    return None


def shown(value: Any) -> str:
    """Return any value that was found, short enough for an error."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # a number of more digits than Python prints
        return type(value).__name__
