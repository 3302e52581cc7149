"""A user's history in Chroma: embedded, in memory, or a server.

A history is fetched by user (``get(where=…)``), never by similarity. Our own collections therefore hold one constant
vector for all items, and no embedding function ever runs: Chroma's default one downloads a model at first use.
``chromadb`` is imported when a history is first used.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from threading import Lock
from time import time_ns
from typing import Any
from urllib.parse import SplitResult, urlsplit

from langchain_cope.errors import HistoryError
from langchain_cope.history.formats import convert, in_memory
from langchain_cope.history.items import Item, Target, UserHistory, checked_name, in_order, settle
from langchain_cope.history.reader import Disliked, RowReader

Embed = Callable[[list[str]], Sequence[Sequence[float]]]
"""Vectors for texts: an embedding function of Chroma's, or ``embed_documents`` of LangChain's Embeddings."""

_connecting = Lock()  # chromadb shares what a folder's clients have in common, and one that is half made breaks the others
_MARK = {"made_by": "langchain-cope history"}
_PAGE = 1000
_Record = tuple[str, str, dict[str, Any]]
_ADDED = "added"  # nanoseconds since 1970, plus the place in the call: the order in which items were added
_MESSAGES = "prompt_is_messages"
_REJECTED = "cope_rejected"  # a JSON list of texts
_DISLIKED = (
    "cope_disliked"  # the document is an answer that the user did not like, not one of the user's
)


class ChromaHistory:
    """The items of many users in one Chroma collection.

    ``source`` is a folder (made where it is missing), ``"http://host:port"`` of a Chroma server, a chromadb client, or
    None: in memory, shared by the process. A folder that this process has open already, under LangChain's ``Chroma``
    say, is given as that client.

    A collection that others made is read too: a document is the completion, and ``user_key``, ``prompt_key`` and
    ``created_at_key`` name its metadata; ``instruction`` stands in where a document has no prompt. Such a collection is
    written only with an ``embedding_function``, which must be the one it was made with.

    Every method raises HistoryError where Chroma cannot be reached or refuses.
    """

    def __init__(
        self,
        source: Any = None,
        collection: str = "cope-history",
        *,
        embedding_function: Embed | None = None,
        user_key: str = "user_id",
        prompt_key: str = "prompt",
        created_at_key: str = "created_at",
        instruction: str | None = None,
    ) -> None:
        self.source = source
        self.collection = collection
        self.embedding_function = embedding_function
        self.user_key = user_key
        self.prompt_key = prompt_key
        self.created_at_key = created_at_key
        self.instruction = instruction
        self._client: Any = None

    def __repr__(self) -> str:
        return f"ChromaHistory({self._place()}, collection={self.collection!r})"

    def add(self, user_id: str, items: Any, *, target: Target | None = None) -> None:
        """Add Items, rows of any format that ``as_history`` reads, or a conversation as LangChain's messages.

        A chat history of LangChain's (what has ``messages``) is such a conversation. ``target`` says whose turns are
        learnt, as for ``as_history``. What the user has already, prompt and completion alike, stays as it is. A
        disliked answer is kept until there is a liked one to the same prompt; the later word on an answer counts.
        """
        owner = checked_name(user_id, "the user id", "user_id")
        found = convert(in_memory(items, owner), target)
        reader = RowReader(found.target or "assistant", self.instruction)
        records, withdrawn = self._records(owner, reader.read_all(found.rows), reader.disliked)
        with self._chroma() as client:
            collection = client.get_or_create_collection(
                self.collection,
                embedding_function=None,
                metadata=None if self.embedding_function else _MARK,
            )
            self._refuse_foreign(collection, "written")
            batch = min(_PAGE, client.get_max_batch_size())
            for start in range(0, len(records), batch):
                ids, documents, metadatas = zip(*records[start : start + batch], strict=True)
                vectors = (
                    [[0.0]] * len(ids) if _is_ours(collection) else self._embed(list(documents))
                )
                collection.delete(ids=list(dict.fromkeys(withdrawn[start : start + batch])))
                collection.add(
                    ids=list(ids),
                    documents=list(documents),
                    metadatas=list(metadatas),
                    embeddings=vectors,
                )

    def fetch(self, user_id: str) -> list[Item]:
        """Return the user's items, oldest first: by ``created_at`` where all have one, else as they were added.

        Empty for an unknown user, and for a collection that does not exist yet; ``history`` says which.
        """
        return in_order(RowReader(instruction=self.instruction).read_all(self._rows(user_id)))

    def history(self, user_id: str) -> UserHistory:
        """Return the user's items as a history, without duplicates and with notes on what was decided."""
        reader = RowReader(instruction=self.instruction)
        items = reader.read_all(self._rows(user_id))
        notes = reader.notes() if items else [self._why_empty(user_id)]
        return settle(user_id, items, instruction=reader.used_instruction, notes=notes)

    def count(self, user_id: str) -> int:
        """Return how many items the user has, disliked answers that wait for a liked one included.

        0 for an unknown user or a collection that does not exist yet.
        """
        return sum(len(page["ids"]) for page in self._pages(user_id, include=[]))

    def delete_user(self, user_id: str) -> int:
        """Delete all items of the user and return how many there were.

        Nobody can fetch them any more, but Chroma's own files may hold their bytes until it purges its log.
        """
        num_items = self.count(user_id)
        if num_items:
            with self._chroma() as client:
                collection = client.get_collection(self.collection, embedding_function=None)
                self._refuse_foreign(collection, "deleted from")
                collection.delete(where=self._where(user_id))
        return num_items

    def _records(
        self, user_id: str, items: Sequence[Item], disliked: Sequence[Disliked]
    ) -> tuple[list[_Record], list[str]]:
        """(id, document, metadata) of each item, and the ids of what the new ones take back.

        The id is that of the user, prompt and completion, of what was rejected, and of whether the user liked it.
        """
        added = time_ns()
        records: dict[str, _Record] = {}
        withdrawn: dict[str, str] = {}
        kept = [(item, False) for item in items]
        kept += [(Item(prompt=one.prompt, completion=one.answer), True) for one in disliked]
        for index, (item, is_disliked) in enumerate(kept):
            is_text = isinstance(item.prompt, str)
            metadata: dict[str, Any] = {
                self.user_key: user_id,
                self.prompt_key: item.prompt if is_text else json.dumps(item.prompt),
                _MESSAGES: not is_text,
                _ADDED: added + index,
            }
            if item.created_at is not None:
                metadata[self.created_at_key] = item.created_at.isoformat()
            if item.conversation is not None:
                metadata["conversation"] = item.conversation
            if item.rejected:
                metadata[_REJECTED] = json.dumps(item.rejected)
            if is_disliked:
                metadata[_DISLIKED] = True
            identity = _identity(user_id, item, is_disliked)
            records.setdefault(identity, (identity, item.completion, metadata))
            withdrawn.setdefault(
                identity,
                _identity(user_id, item.model_copy(update={"rejected": ()}), not is_disliked),
            )
        return list(records.values()), list(withdrawn.values())

    def _rows(self, user_id: str) -> list[tuple[str, dict[str, Any]]]:
        """The user's records as located rows, in the order in which they were added."""
        found = []
        for page in self._pages(user_id, include=["documents", "metadatas"]):
            for identity, document, metadata in zip(
                page["ids"], page["documents"], page["metadatas"], strict=True
            ):
                if document and not document.isspace():  # others may keep records of vectors alone
                    row = self._row(document, metadata)
                    found.append(
                        (metadata.get(_ADDED, 0), (f"Chroma {self.collection} {identity}", row))
                    )
        return [located for _, located in sorted(found, key=lambda pair: pair[0])]

    def _row(self, document: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
        prompt = metadata.get(self.prompt_key)
        row = {
            "prompt": json.loads(prompt)
            if prompt is not None and metadata.get(_MESSAGES)
            else prompt
        }
        if metadata.get(_DISLIKED):
            return {**row, "rejected": [document]}
        return {
            **row,
            "completion": document,
            "created_at": metadata.get(self.created_at_key),
            "conversation": metadata.get("conversation"),
            "rejected": json.loads(metadata[_REJECTED]) if _REJECTED in metadata else (),
        }

    def _pages(self, user_id: str, include: list[str]) -> Iterator[Mapping[str, Any]]:
        where = self._where(user_id)
        with self._chroma() as client:
            collection = self._existing(client)
            if collection is None:
                return
            offset = 0
            while (
                page := collection.get(where=where, limit=_PAGE, offset=offset, include=include)
            )["ids"]:
                yield page
                offset += len(page["ids"])

    def _existing(self, client: Any) -> Any:
        """Return the collection, None where there is none (yet) of its name."""
        from chromadb.errors import NotFoundError

        try:
            return client.get_collection(self.collection, embedding_function=None)
        except NotFoundError:
            return None

    def _why_empty(self, user_id: str) -> str:
        with self._chroma() as client:
            if self._existing(client) is not None:
                return f"no items of the user {user_id!r:.80} in {self!r}"
            present = (
                ", ".join(collection.name for collection in client.list_collections()) or "none"
            )
            return f"no collection {self.collection!r} in Chroma at {self._place()}; there are: {present}"

    def _where(self, user_id: str) -> dict[str, Any]:
        # With "$eq" spelled out, no user id can be read as an operator.
        return {self.user_key: {"$eq": checked_name(user_id, "the user id", "user_id")}}

    def _embed(self, documents: list[str]) -> list[Sequence[float]]:
        assert self.embedding_function is not None
        return list(self.embedding_function(documents))

    def _refuse_foreign(self, collection: Any, how: str) -> None:
        if self.embedding_function is None and not _is_ours(collection):
            raise HistoryError(
                f"the collection {self.collection!r} in Chroma at {self._place()} was made by others and is not {how} "
                "without the embedding_function it was made with; give that, or another collection"
            )

    def _place(self) -> str:
        if self.source is None:
            return "memory"
        if not isinstance(self.source, str | PathLike):
            return type(self.source).__name__
        url = _server(self.source)  # printed without what may be secret in it
        return f"{url.scheme}://{url.hostname}:{_port(url)}" if url else str(self.source)

    @contextmanager
    def _chroma(self) -> Iterator[Any]:
        try:
            with _connecting:
                if self._client is None:
                    self._client = _connect(self.source)
            yield self._client
        except HistoryError:
            raise
        except Exception as error:  # chromadb raises its own errors, ValueError, httpx's and the operating system's
            raise HistoryError(f"Chroma at {self._place()}: {error}") from error


def _identity(user_id: str, item: Item, is_disliked: bool) -> str:
    parts: list[Any] = [user_id, item.key]
    parts += [item.rejected] if item.rejected else []
    parts += [_DISLIKED] if is_disliked else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _is_ours(collection: Any) -> bool:
    return (collection.metadata or {}).get("made_by") == _MARK["made_by"]


def _connect(source: Any) -> Any:
    """Return a chromadb client for a folder, a server's URL or memory; a client is returned as it is."""
    if source is not None and not isinstance(source, str | PathLike):
        return source
    import chromadb
    from chromadb.config import Settings

    settings = Settings(anonymized_telemetry=False)
    if source is None:
        return chromadb.EphemeralClient(settings=settings)
    url = _server(source)
    if url is not None:
        is_tls = url.scheme == "https"
        return chromadb.HttpClient(
            host=url.hostname or "localhost", port=_port(url), ssl=is_tls, settings=settings
        )
    return chromadb.PersistentClient(path=str(Path(source).expanduser()), settings=settings)


def _server(source: str | PathLike[str]) -> SplitResult | None:
    url = urlsplit(str(source))
    return url if url.scheme in ("http", "https") else None


def _port(url: SplitResult) -> int:
    return url.port or (443 if url.scheme == "https" else 8000)
