"""A store in object storage, through obstore: S3 and servers that speak it, Google Cloud, Azure.

Of the storage one thing is needed: that a put with mode="create" fails where the key exists; a
store probes it before it writes. Credentials come from the environment (AWS_ACCESS_KEY_ID, …),
AWS's files (`aws_profile.py`), the machine's role. A URL may carry options
after a "?", by obstore's names: s3://bucket/prefix?endpoint=http://host:9000,
az://container/prefix?account_name=ours. A bucket that keeps old versions of objects keeps what is
erased: let those expire.
"""

import os
import re
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from adapter_store.backends.aws_profile import profile_options
from adapter_store.errors import BackendError
from adapter_store.facts import StoredFile
from adapter_store.text import location, shorten, without_secrets

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_RETRIES: Any = {"max_retries": 4, "retry_timeout": timedelta(seconds=60)}
_CLIENT: Any = {"connect_timeout": "10s", "timeout": "10min"}  # the whole of a large upload
# By scheme, the names under which an endpoint may be given, the strongest first: options of a URL,
# and in capitals variables of the environment. An endpoint in plain HTTP must be allowed.
_ENDPOINTS = {
    "s3": ("aws_endpoint_url_s3", "aws_endpoint_url", "aws_endpoint", "endpoint_url", "endpoint"),
    "az": ("azure_storage_endpoint", "azure_endpoint", "endpoint"),
}
_T = TypeVar("_T")

_opening = threading.Lock()  # a variable of the environment is hidden meanwhile

_used_by: int | None = None
"""The process that first used obstore.

Its threads live there only, and a forked child would wait for them for ever.
"""


class ObjectBackend:
    """Objects below a prefix of one bucket.

    `store` is an obstore store, `url` how it is named in messages.
    """

    def __init__(self, store: "ObjectStore", url: str) -> None:
        self._store = store
        self._url = url

    @classmethod
    def from_url(cls, url: str) -> "ObjectBackend":
        """Return the backend of s3://bucket/prefix, gs://bucket/prefix or az://container/prefix.

        Options after "?" go to obstore by its own names (endpoint, region, …). Nothing is asked of
        the storage yet. BackendError where obstore is missing, or refuses URL or options.
        """
        try:
            from obstore.store import from_url
        except ImportError:
            raise BackendError(
                f"{without_secrets(url)} needs the package obstore: "
                "pip install 'langchain-cope[cloud]'"
            ) from None
        parts = _split(url)
        with _opening:
            return cls(_opened(from_url, parts, url), url)

    def __repr__(self) -> str:
        return f"ObjectBackend({without_secrets(self._url)!r})"

    @property
    def url(self) -> str:
        """The URL, with the secrets that it was given with."""
        return self._url

    def get(self, key: str, max_bytes: int) -> bytes:
        """Return at most the first `max_bytes` bytes of an object."""

        def read() -> bytes:
            answer = self._store.get(key)
            if answer.meta["size"] <= max_bytes:
                return bytes(answer.bytes())
            if max_bytes <= 0:
                return b""
            return bytes(self._store.get_range(key, start=0, end=max_bytes))

        return self._ask("read", key, read)

    def stat(self, key: str) -> StoredFile | None:
        """Return an object's size and time, and a mark of its ETag and time.

        The ETag alone is not enough: equal content written anew has the same one.
        """
        try:
            meta = self._ask("read", key, lambda: self._store.head(key))
        except FileNotFoundError:
            return None
        mark = (meta.get("e_tag"), meta.get("version"), meta["last_modified"])
        return StoredFile(meta["size"], meta["last_modified"].timestamp(), mark)

    def put_if_absent(self, key: str, data: bytes) -> None:
        """Put an object whole, on condition that the key does not exist."""

        def write() -> Any:
            # In parts it would be faster for much, and unconditional.
            return self._store.put(key, data, mode="create", use_multipart=False)

        self._ask("write", key, write)

    def list_folder(self, folder: str) -> list[str]:
        """Return the sorted names directly below a prefix."""
        listing = self._ask("list", folder, lambda: self._store.list_with_delimiter(f"{folder}/"))
        paths = [str(prefix) for prefix in listing["common_prefixes"]]
        paths += [str(item["path"]) for item in listing["objects"]]
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def delete(self, key: str) -> None:
        """Remove an object."""
        try:
            self._ask("delete", key, lambda: self._store.delete(key))
        except FileNotFoundError:
            return

    def _ask(self, verb: str, key: str, call: Callable[[], _T]) -> _T:
        self._check_process()
        from obstore.exceptions import AlreadyExistsError

        try:
            return call()
        except FileNotFoundError:
            if verb in ("write", "list"):
                raise self._no_bucket(verb, key) from None
            raise FileNotFoundError(key) from None
        except AlreadyExistsError:
            raise FileExistsError(key) from None
        except Exception as error:  # obstore's other errors, and its plain ValueErrors
            if "NoSuchBucket" in str(error):
                raise self._no_bucket(verb, key) from None
            raise BackendError(
                f"cannot {verb} {location(self._url, key)}: {_reason(error)}{_advice(error)}"
            ) from None

    def _no_bucket(self, verb: str, key: str) -> BackendError:
        return BackendError(
            f"cannot {verb} {location(self._url, key)}: the bucket does not exist; "
            "make it, or name another"
        )

    def _check_process(self) -> None:
        global _used_by
        process = os.getpid()
        if _used_by is None:
            _used_by = process
        elif _used_by != process:
            raise BackendError(
                f"{without_secrets(self._url)} was used before this process was forked, and would "
                "hang in it: start workers with multiprocessing's 'spawn', or open stores in the "
                "children only"
            )


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # its text may hold the secrets
        raise BackendError(
            f"{without_secrets(url)} is not a URL: write {url.partition(':')[0]}://bucket/prefix, "
            "and what is special in a name or a password with %, such as %2F"
        ) from None


def _opened(from_url: Callable[..., Any], parts: SplitResult, url: str) -> Any:
    """Return obstore's store of a URL, which `from_url` makes; for one thread at a time."""
    options = _options(parts, url)
    client = dict(_CLIENT)
    if options.get("endpoint", "").lower().startswith("http://"):
        client["allow_http"] = True
    host = parts.netloc.rpartition("@")[2]
    if not host or parts.fragment:
        raise BackendError(
            f"{without_secrets(url)} names no bucket: write {parts.scheme}://bucket/prefix"
        )
    settings: Any = {
        "config": options or None,
        "client_options": client,
        "retry_config": _RETRIES,
    }
    # obstore would take this variable before the endpoint that it is given, the one decided.
    s3_endpoint = os.environ.pop("AWS_ENDPOINT_URL_S3", None)
    try:
        return from_url(f"{parts.scheme.lower()}://{host}{parts.path}", **settings)
    except Exception as error:  # obstore's errors and plain ValueErrors
        raise BackendError(f"cannot open {without_secrets(url)}: {_reason(error)}") from None
    finally:
        if s3_endpoint is not None:
            os.environ["AWS_ENDPOINT_URL_S3"] = s3_endpoint


def _options(parts: SplitResult, url: str) -> dict[str, str]:
    """Return all options by obstore's names.

    They are those after "?", an S3 URL's credentials, the endpoint, and those of AWS's files.
    """
    scheme = parts.scheme.lower()
    options = dict(parse_qsl(parts.query))
    if parts.username or parts.password:
        if scheme != "s3":
            raise BackendError(
                f"{without_secrets(url)} holds credentials: give them in the environment instead"
            )
        options["access_key_id"] = unquote(parts.username or "")
        options["secret_access_key"] = unquote(parts.password or "")
    names = _ENDPOINTS.get(scheme, ())
    in_url = [options.pop(name, None) for name in names]
    in_environment = [os.environ.get(name.upper()) for name in names if "_" in name]
    endpoint = next(filter(None, in_url + in_environment), None)
    if endpoint:
        options["endpoint"] = endpoint
    if scheme == "s3":
        options |= profile_options(options)
    return options


def _reason(error: Exception) -> str:
    """Return the first line of what the library said, without the secrets of a URL in it."""
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    text = re.sub(r"(https?://[^\s?#]*)[?#][^\s)\"']*", r"\1?***", text)
    text = re.sub(r"//[^\s/@]*@", "//***@", text)
    return shorten(text, 400)


def _advice(error: Exception) -> str:
    # The address that cloud machines get credentials from, asked when no other place has some.
    if "169.254.169.254" in str(error):
        return (
            "; no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name a "
            "profile of ~/.aws/credentials in AWS_PROFILE, or set what your cloud uses"
        )
    kind = type(error).__name__
    if kind in ("PermissionDeniedError", "UnauthenticatedError"):
        return "; give credentials that may list, read, write and delete there"
    if kind in ("NotSupportedError", "NotImplementedError"):
        return "; choose storage that can put on condition"
    return "; check that it can be reached, then try again"
