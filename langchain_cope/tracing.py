"""What a trace may show of a user, wherever this package traces something itself."""

import hashlib
from typing import Literal

TraceUserId = Literal["plain", "hashed", "omitted"]
HASH_DIGITS = 16  # 64 bits: among a billion users the chance that any two share a hash is 3 %


class TracedError(Exception):
    """What a trace shows of an error with a message that may name a user: its class."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        super().__init__(
            f"{type(error).__name__}; its message went to the caller alone, as it may name the user"
        )


def traced_user(user_id: str | None, how: TraceUserId) -> str | None:
    """Return `user_id` as a trace shows it: plain, hashed, or None where it is omitted.

    The hash is the first 16 hex digits of the id's sha256, the same in every process. It hides the
    id from a reader of traces, but not from one who tries all ids there could be: names and e-mail
    addresses can be guessed.
    """
    if user_id is None or how == "omitted":
        return None
    if how == "hashed":
        return hashlib.sha256(user_id.encode("utf-8", "surrogatepass")).hexdigest()[:HASH_DIGITS]
    return user_id


def traced_error(error: BaseException, how: TraceUserId) -> BaseException:
    """Return `error` as a trace shows it: itself where users are plain, else its class alone."""
    return error if how == "plain" else TracedError(error)
