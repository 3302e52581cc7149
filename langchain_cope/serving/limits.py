"""Bounds of each key: requests and tokens a minute, and requests at a time."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from langchain_cope.serving.errors import ApiError
from langchain_cope.serving.principals import Principal


@dataclass
class _Bucket:
    """A bucket that fills up within a minute and may be overdrawn."""

    size: int
    level: float
    filled_at: float

    def fill(self, now: float) -> None:
        self.level = min(self.size, self.level + (now - self.filled_at) * self.size / 60)
        self.filled_at = now

    def seconds_until(self, level: float) -> float:
        return max(0.0, (level - self.level) * 60 / self.size)


class KeyLimits:
    """What every key has used. The event loop alone uses it."""

    def __init__(
        self, max_concurrent: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Take how many requests a key without a bound of its own may have at a time."""
        self._max_concurrent = max_concurrent
        self._clock = clock
        self._requests: dict[str, _Bucket] = {}
        self._tokens: dict[str, _Bucket] = {}
        self._running: Counter[str] = Counter()

    def take_request(self, principal: Principal) -> None:
        """Count a request. Raises ApiError (429), with the seconds to wait, beyond a bound."""
        per_minute = principal.limits.requests_per_minute
        if per_minute is not None:
            bucket = self._bucket(self._requests, principal.id, per_minute)
            self._refuse(bucket, 1, f"{per_minute} requests a minute")
            bucket.level -= 1
        per_minute = principal.limits.tokens_per_minute
        if per_minute is not None:
            bucket = self._bucket(self._tokens, principal.id, per_minute)
            self._refuse(bucket, 0, f"{per_minute} tokens a minute")

    def take_tokens(self, principal: Principal, number: int) -> None:
        """Count tokens of an answer, which is never cut for it: the next request waits."""
        per_minute = principal.limits.tokens_per_minute
        if per_minute is not None:
            self._bucket(self._tokens, principal.id, per_minute).level -= number

    @contextmanager
    def running(self, principal: Principal, number: int) -> Iterator[None]:
        """Count that many requests as running. Raises ApiError (429) beyond the bound."""
        most = principal.limits.concurrent or self._max_concurrent
        if most is not None and self._running[principal.id] + number > most:
            raise ApiError(
                429,
                "concurrency_exceeded",
                f"this key may have {most} requests at a time: wait for an answer",
                retry_after=1,
            )
        self._running[principal.id] += number
        try:
            yield
        finally:
            self._running[principal.id] -= number

    def _bucket(self, buckets: dict[str, _Bucket], key: str, size: int) -> _Bucket:
        now = self._clock()
        bucket = buckets.get(key)
        if bucket is None or bucket.size != size:
            bucket = buckets[key] = _Bucket(size, size, now)
        bucket.fill(now)
        return bucket

    def _refuse(self, bucket: _Bucket, level: float, what: str) -> None:
        if bucket.level < level or bucket.level <= 0:
            raise ApiError(
                429,
                "rate_limit_exceeded",
                f"this key may have {what}: wait",
                retry_after=bucket.seconds_until(max(level, 1)),
            )
