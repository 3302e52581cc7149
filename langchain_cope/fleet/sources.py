"""Whose histories there are: a folder of files, one file of users, or a Chroma.

A source lists its users once, and reads a user's history when that user's turn comes. A file is
parsed whole and kept until another one is needed, so that the users of one file should be asked
for one after another.
"""

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Protocol

from adapter_store import AdapterStore
from langchain_cope.errors import HistoryError, InputError
from langchain_cope.history.chroma import ChromaHistory
from langchain_cope.history.items import Target, UserHistory
from langchain_cope.history.read import read_history, read_users

_CHROMA_FILE = "chroma.sqlite3"  # in every folder of Chroma's


class Source(Protocol):
    """Users and their histories."""

    name: str
    """Where it is, for people; the same source has the same name."""
    problems: dict[str, str]
    """What could not be read when users were listed: where, and why."""

    def users(self) -> list[str]:
        """Return the ids of all users, each once."""
        ...

    def read(self, user: str) -> UserHistory:
        """Return a user's history as it is now. Raises HistoryError."""
        ...


def open_source(place: str | PathLike[str], *, target: Target | None = None) -> Source:
    """Return the source at `place`.

    Args:
        place: A folder of histories (each file of one user, who is named as the file where it names
            nobody, or of several), one such file, a folder that Chroma made, or the http URL of a
            Chroma server.
        target: The side of conversations that is learnt, as for `read_history`.

    Raises:
        InputError: There is nothing at `place`.
    """
    text = str(place)
    if text.startswith(("http://", "https://")):
        return ChromaSource(text)
    path = Path(place).expanduser().absolute()
    if (path / _CHROMA_FILE).exists():
        return ChromaSource(str(path))
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _holds_history(file))
        if not files:
            raise InputError(f"{place} holds no files: name a folder of histories, one file a user")
        return FileSource(files, str(path), target)
    if not path.exists():
        raise InputError(f"{place}: no such file or folder: name one that holds histories")
    return FileSource([path], str(path), target)


def _holds_history(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".")


class FileSource:
    """Users in files."""

    def __init__(self, files: Sequence[Path], name: str, target: Target | None) -> None:
        self.name = name
        self.problems: dict[str, str] = {}
        self._files = files
        self._target = target
        self._files_of: dict[str, list[Path]] = {}
        self._parsed: tuple[Path, object, dict[str, UserHistory]] | None = None

    def users(self) -> list[str]:
        """Return the users of all files, in their order."""
        self._files_of.clear()
        for file in self._files:
            try:
                for user in self._users_of(file):
                    self._files_of.setdefault(user, []).append(file)
            except HistoryError as error:
                self.problems[file.name] = str(error)
        return list(self._files_of)

    def read(self, user: str) -> UserHistory:
        """Return a user's history, of all files that have something of it."""
        files = self._files_of[user]
        if len(files) > 1:
            return read_history(*files, target=self._target, user_id=user)
        users = self._users_of(files[0])
        if user not in users:
            raise HistoryError(f"{files[0]}: held the user {user!r:.80} before, and does no longer")
        return users[user]

    def _users_of(self, file: Path) -> dict[str, UserHistory]:
        """Return the users of a file, which is parsed once as long as it stays as it is.

        Where it is there and cannot be read, but could be before, somebody writes it just now: what
        was read before counts, since one file may hold all users of a night.
        """
        stat = file.stat() if file.exists() else None
        stamp = None if stat is None else (stat.st_mtime_ns, stat.st_size)
        before = self._parsed if self._parsed and self._parsed[0] == file else None
        if before is not None and before[1] == stamp:
            return before[2]
        try:
            histories = read_users(file, target=self._target)
        except HistoryError:
            if before is None or stamp is None:
                raise
            return before[2]
        users = {one.user_id if one.user_id is not None else file.stem: one for one in histories}
        self._parsed = file, stamp, users
        return users


class ChromaSource:
    """Users in Chroma."""

    def __init__(self, place: str) -> None:
        self._history = ChromaHistory(place)
        self.name = repr(self._history)
        self.problems: dict[str, str] = {}

    def users(self) -> list[str]:
        """Return the users who have items."""
        return self._history.users()

    def read(self, user: str) -> UserHistory:
        """Return a user's history."""
        return self._history.history(user)


class Only:
    """Some users of another source."""

    def __init__(self, source: Source, users: Iterable[str], name: str) -> None:
        self.name = f"{name} of {source.name}"
        self.problems = source.problems
        self._source = source
        self._wanted = list(users)

    def users(self) -> list[str]:
        """Return the wanted users; those that the source lacks are problems."""
        known = set(self._source.users())
        for user in self._wanted:
            if user not in known:
                self.problems[user] = "no history of this user is in the source"
        return [user for user in self._wanted if user in known]

    def read(self, user: str) -> UserHistory:
        """Return a user's history."""
        return self._source.read(user)


def of_store(store: AdapterStore, source: Source) -> Only:
    """Return those users of `source` who have an active version in the store."""
    users: list[str] = []
    cursor: str | None = None
    while True:
        heads, cursor = store.list_users(cursor)
        users += [head.user_id for head in heads if head.active is not None]
        if cursor is None:
            return Only(source, users, f"the users of {store.url}")
