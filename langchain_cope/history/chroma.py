"""A user's history in Chroma: embedded, in memory, or a server.

A history is fetched by user (`get(where=…)`), never by similarity. Our own collections therefore
hold one constant vector for all items, and no embedding function ever runs: Chroma's default one
downloads a model at first use. `chromadb` is imported when a history is first used.
"""

import hashlib
import json
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from threading import Lock
from time import time_ns
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from langchain_cope._environment import a_home
from langchain_cope.errors import HistoryError, HistoryUnreachable
from langchain_cope.history.formats import convert
from langchain_cope.history.items import Item, Target, UserHistory, in_order, settle
from langchain_cope.history.read import in_memory
from langchain_cope.history.reader import RowReader
from langchain_cope.history.rows import Row, checked_id

Embed = Callable[[list[str]], Sequence[Sequence[float]]]
"""Vectors for texts: an embedding function of Chroma's, or `embed_documents` of LangChain's."""

# Clients of one folder share state in chromadb, and a half-made client breaks the others.
_connecting = Lock()

_MARK = {"made_by": "langchain-cope history"}
_PAGE = 1000
_Record = tuple[str, str, dict[str, Any]]

# Metadata of a record:
# the order in which items were added, as nanoseconds since 1970 plus the item's index in its call
_ADDED = "added"
# whether the prompt is a JSON list of messages
_MESSAGES = "prompt_is_messages"
# a JSON list of texts
_REJECTED = "cope_rejected"
# set where the document is an answer that the user did not like
_DISLIKED = "cope_disliked"


class ChromaHistory:
    """The items of many users in one Chroma collection.

    A collection that others made is read too: a document is the completion, and `user_key`,
    `prompt_key` and `created_at_key` name its metadata. Such a collection is written only with an
    `embedding_function`. Every method raises HistoryError where Chroma cannot be reached or
    refuses.

    Args:
        source: A folder (made where it is missing), `"http://host:port"` of a Chroma server, a
            chromadb client, or None: in memory, shared by the process. A server's URL may hold a
            user and a password, sent as basic authentication, and a path. Give a folder that this
            process has open already, under LangChain's `Chroma` say, as that client.
        collection: The collection's name.
        embedding_function: The one with which a collection of others was made.
        user_key: The metadata that names the user.
        prompt_key: The metadata that holds the prompt.
        created_at_key: The metadata that holds the time.
        instruction: Stands in where a document has no prompt.
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
        return f"ChromaHistory({self._location()}, collection={self.collection!r})"

    def add(self, user_id: str, items: Any, *, target: Target | None = None) -> None:
        """Add items to the user's history.

        An item that the user has already, prompt and completion alike, stays as it is. A disliked
        answer is kept until there is a liked one to the same prompt; the later word on an answer
        counts.

        Args:
            user_id: Any text but an empty one.
            items: Items, rows of any format that `as_history` reads, or a conversation as
                LangChain's messages or as an object that has `messages`, such as a chat history.
            target: The side of conversations that is learnt, as for `as_history`.

        Raises:
            HistoryError: A row is wrong, or others made the collection and there is no embedding
                function. Nothing is added then.
        """
        user_id = checked_id("user", user_id)
        converted = convert(in_memory(items, user_id), target)
        reader = RowReader(converted.target or "assistant", self.instruction)
        liked = reader.read_all(converted.rows)
        disliked = [Item(prompt=one.prompt, completion=one.answer) for one in reader.disliked]
        records, withdrawn = self._records(user_id, liked, disliked)
        with self._chroma() as client:
            collection = client.get_or_create_collection(
                self.collection,
                embedding_function=None,
                metadata=None if self.embedding_function else _MARK,
            )
            self._refuse_foreign(collection, "written")
            batch_size = min(_PAGE, client.get_max_batch_size())
            for start in range(0, len(records), batch_size):
                batch = slice(start, start + batch_size)
                self._write(collection, records[batch], withdrawn[batch])

    def fetch(self, user_id: str, conversation: str | None = None) -> list[Item]:
        """Return the user's items, or those of one conversation, oldest first.

        The order is that of `created_at`, as far as items have one, else that in which they were
        added. Empty for an unknown user, and for a collection that does not exist yet; `history`
        says which.
        """
        rows = self._rows(user_id, conversation)
        return in_order(RowReader(instruction=self.instruction).read_all(rows))

    def history(self, user_id: str) -> UserHistory:
        """Return the user's items as a history, without duplicates, with notes on decisions."""
        reader = RowReader(instruction=self.instruction)
        items = reader.read_all(self._rows(user_id))
        notes = reader.notes() if items else [self._why_empty(user_id)]
        return settle(user_id, items, instruction=reader.used_instruction, notes=notes)

    def users(self) -> list[str]:
        """Return the ids of all users with items, in the order in which Chroma has them.

        Reads the metadata of every item.
        """
        seen: dict[str, None] = {}
        for page in self._pages(None, include=["metadatas"]):
            for metadata in page["metadatas"]:
                user_id = (metadata or {}).get(self.user_key)
                if isinstance(user_id, str) and user_id:
                    seen[user_id] = None
        return list(seen)

    def count(self, user_id: str) -> int:
        """Return the number of the user's items, with disliked answers that wait for a liked one.

        0 for an unknown user or a collection that does not exist yet.
        """
        return sum(len(page["ids"]) for page in self._pages(self._where(user_id), include=[]))

    def delete_user(self, user_id: str) -> int:
        """Delete all items of the user and return how many there were.

        They can no longer be fetched, but Chroma's own files may hold their bytes until it purges
        its log.
        """
        num_items = self.count(user_id)
        if num_items:
            with self._chroma() as client:
                collection = client.get_collection(self.collection, embedding_function=None)
                self._refuse_foreign(collection, "deleted from")
                collection.delete(where=self._where(user_id))
        return num_items

    def _records(
        self, user_id: str, liked: Sequence[Item], disliked: Sequence[Item]
    ) -> tuple[list[_Record], list[str]]:
        """Return the (id, document, metadata) of each item, and the ids of what each takes back."""
        added = time_ns()
        records: dict[str, _Record] = {}
        withdrawn: dict[str, str] = {}
        verdicts = [(item, False) for item in liked] + [(item, True) for item in disliked]
        for index, (item, is_disliked) in enumerate(verdicts):
            record_id = _record_id(user_id, item, is_disliked)
            if record_id in records:
                continue
            metadata = self._metadata(user_id, item, is_disliked)
            metadata[_ADDED] = added + index
            records[record_id] = (record_id, item.completion, metadata)
            answer = item.model_copy(update={"rejected": ()})
            withdrawn[record_id] = _record_id(user_id, answer, not is_disliked)
        return list(records.values()), list(withdrawn.values())

    def _metadata(self, user_id: str, item: Item, is_disliked: bool) -> dict[str, Any]:
        is_text = isinstance(item.prompt, str)
        metadata: dict[str, Any] = {
            self.user_key: user_id,
            self.prompt_key: item.prompt if is_text else json.dumps(item.prompt),
            _MESSAGES: not is_text,
        }
        if item.created_at is not None:
            metadata[self.created_at_key] = item.created_at.isoformat()
        if item.conversation is not None:
            metadata["conversation"] = item.conversation
        if item.rejected:
            metadata[_REJECTED] = json.dumps(item.rejected)
        if is_disliked:
            metadata[_DISLIKED] = True
        return metadata

    def _write(self, collection: Any, records: Sequence[_Record], withdrawn: Sequence[str]) -> None:
        ids = [record_id for record_id, _, _ in records]
        documents = [document for _, document, _ in records]
        if _is_ours(collection):
            vectors: Sequence[Sequence[float]] = [[0.0]] * len(records)
        else:
            assert self.embedding_function is not None
            vectors = list(self.embedding_function(documents))
        collection.delete(ids=list(dict.fromkeys(withdrawn)))
        collection.add(
            ids=ids,
            documents=documents,
            metadatas=[metadata for _, _, metadata in records],
            embeddings=vectors,
        )

    def _rows(self, user_id: str, conversation: str | None = None) -> list[Row]:
        """Return the user's records as rows, in the order in which they were added."""
        wanted = self._where(user_id)
        if conversation is not None:
            wanted = {"$and": [wanted, {"conversation": {"$eq": conversation}}]}
        rows: list[tuple[int, Row]] = []
        for page in self._pages(wanted, include=["documents", "metadatas"]):
            records = zip(page["ids"], page["documents"], page["metadatas"], strict=True)
            for record_id, document, metadata in records:
                if document and not document.isspace():  # others may keep records of vectors alone
                    where = f"Chroma {self.collection} {record_id}"
                    row = Row(where, self._fields(document, metadata))
                    rows.append((metadata.get(_ADDED, 0), row))
        return [row for _, row in sorted(rows, key=lambda pair: pair[0])]

    def _fields(self, document: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Return a record as the fields that `reader` reads."""
        prompt = metadata.get(self.prompt_key)
        if prompt is not None and metadata.get(_MESSAGES):
            prompt = json.loads(prompt)
        if metadata.get(_DISLIKED):
            return {"prompt": prompt, "rejected": [document]}
        return {
            "prompt": prompt,
            "completion": document,
            "created_at": metadata.get(self.created_at_key),
            "conversation": metadata.get("conversation"),
            "rejected": json.loads(metadata[_REJECTED]) if _REJECTED in metadata else (),
        }

    def _pages(
        self, where: Mapping[str, Any] | None, include: list[str]
    ) -> Iterator[Mapping[str, Any]]:
        """Yield the records that fulfil `where` a page at a time, none without a collection."""
        with self._chroma() as client:
            collection = self._existing(client)
            if collection is None:
                return
            offset = 0
            while True:
                page = collection.get(where=where, limit=_PAGE, offset=offset, include=include)
                if not page["ids"]:
                    return
                yield page
                offset += len(page["ids"])

    def _existing(self, client: Any) -> Any:
        """Return the collection, None while it does not exist."""
        from chromadb.errors import NotFoundError

        try:
            return client.get_collection(self.collection, embedding_function=None)
        except NotFoundError:
            return None

    def _why_empty(self, user_id: str) -> str:
        with self._chroma() as client:
            if self._existing(client) is not None:
                return f"no items of the user {user_id!r:.80} in {self!r}"
            names = [collection.name for collection in client.list_collections()]
        return (
            f"no collection {self.collection!r} in Chroma at {self._location()}; "
            f"there are: {', '.join(names) or 'none'}"
        )

    def _where(self, user_id: str) -> dict[str, Any]:
        # With "$eq" spelled out, no user id can be read as an operator.
        return {self.user_key: {"$eq": checked_id("user", user_id)}}

    def _refuse_foreign(self, collection: Any, how: str) -> None:
        if self.embedding_function is None and not _is_ours(collection):
            raise HistoryError(
                f"the collection {self.collection!r} in Chroma at {self._location()} was made by "
                f"others and is not {how} without the embedding_function it was made with; "
                "give that, or another collection"
            )

    def _location(self) -> str:
        """Return where the Chroma is, without the secrets that a URL may hold."""
        if self.source is None:
            return "memory"
        if not isinstance(self.source, str | PathLike):
            return type(self.source).__name__
        url = _server(self.source)
        return _address(url) if url else str(self.source)

    @contextmanager
    def _chroma(self) -> Iterator[Any]:
        """Yield the client, connected at first use; raise every error of Chroma's as ours.

        chromadb raises its own errors, ValueError, httpx's and the operating system's.
        """
        try:
            with _connecting:
                if self._client is None:
                    self._client = _connect(self.source)
            yield self._client
        except HistoryError:
            raise
        except Exception as error:
            raise HistoryUnreachable(f"Chroma at {self._location()}: {error}") from error


def _record_id(user_id: str, item: Item, is_disliked: bool) -> str:
    """Return a digest of user, prompt and completion, of what was rejected, and of the verdict."""
    parts: list[Any] = [user_id, item.key]
    if item.rejected:
        parts.append(item.rejected)
    if is_disliked:
        parts.append(_DISLIKED)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _is_ours(collection: Any) -> bool:
    return (collection.metadata or {}).get("made_by") == _MARK["made_by"]


def _connect(source: Any) -> Any:
    """Return a chromadb client for a folder, a server's URL or memory; a client as it is."""
    if source is not None and not isinstance(source, str | PathLike):
        return source
    with a_home():
        import chromadb
        from chromadb.config import Settings

    settings = Settings(anonymized_telemetry=False)
    if source is None:
        return chromadb.EphemeralClient(settings=settings)
    url = _server(source)
    if url is None:
        return chromadb.PersistentClient(path=str(Path(source).expanduser()), settings=settings)
    if url.query or url.fragment:  # said without their text, which may be a secret
        raise HistoryError(
            f"Chroma at {_address(url)}: the URL has a query or a fragment, which Chroma has no "
            "use for: write http://user:password@host:port/path, or give a chromadb client"
        )
    headers = {}
    if url.username or url.password:
        pair = f"{unquote(url.username or '')}:{unquote(url.password or '')}"
        headers["Authorization"] = f"Basic {b64encode(pair.encode()).decode()}"
    return chromadb.HttpClient(
        host=_address(url),  # given as a URL it keeps its path
        port=_port(url),
        ssl=url.scheme == "https",
        headers=headers,
        settings=settings,
    )


def _server(source: str | PathLike[str]) -> SplitResult | None:
    """Return the URL of a server, None for a folder."""
    url = urlsplit(str(source))
    return url if url.scheme in ("http", "https") else None


def _address(url: SplitResult) -> str:
    """Return the URL of a server without credentials."""
    host = url.hostname or "localhost"
    host = f"[{host}]" if ":" in host else host
    return f"{url.scheme}://{host}:{_port(url)}{url.path.rstrip('/')}"


def _port(url: SplitResult) -> int:
    if url.port:
        return url.port
    return 443 if url.scheme == "https" else 8000
