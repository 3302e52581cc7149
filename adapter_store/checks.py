"""What a caller hands in, checked at the door.

Every refusal is an InvalidAdapterError with the value, shortened.
"""

import math
from collections.abc import Mapping
from typing import Any

from adapter_store.errors import InvalidAdapterError
from adapter_store.facts import Limits
from adapter_store.text import parse_json_object, shorten, to_line

_IDEMPOTENCY_KEY_CHARACTERS = 256


def check_user_id(user_id: str, limits: Limits) -> str:
    """Return `user_id`. Any text will do, `../x` too: only its keyed hash becomes a path."""
    if not isinstance(user_id, str):
        raise InvalidAdapterError(f"user id {shorten(user_id)} is not text: give a str")
    problem = None
    if not user_id:
        problem = "is empty"
    elif len(user_id) > limits.user_id_characters:
        problem = "is too long"
    elif "\0" in user_id:
        problem = "holds a NUL character"
    elif not _is_encodable(user_id):
        problem = "holds half a surrogate pair, which UTF-8 cannot write"
    if problem:
        raise InvalidAdapterError(
            f"user id {shorten(user_id)} {problem}: "
            f"give 1 to {limits.user_id_characters} characters of Unicode text without NUL"
        )
    return user_id


def check_idempotency_key(key: str | None) -> str | None:
    """Return `key`, None or up to 256 characters of text."""
    if key is None:
        return None
    if not _is_text(key, _IDEMPOTENCY_KEY_CHARACTERS) or not key:
        raise InvalidAdapterError(
            f"idempotency key {shorten(key)} is not 1 to {_IDEMPOTENCY_KEY_CHARACTERS} characters "
            "of text: give the job's id"
        )
    return key


def check_reason(reason: str, limits: Limits) -> str:
    """Return `reason`, text for people, which may be empty."""
    if not _is_text(reason, limits.reason_characters):
        raise InvalidAdapterError(
            f"reason {shorten(reason)} is not up to {limits.reason_characters} characters of text: "
            "say it shorter"
        )
    return reason


def check_data_seq(data_seq: int | None, newest: int) -> int | None:
    """Return `data_seq`, None or a number that `AdapterStore.data_seq` gave."""
    if data_seq is None:
        return None
    if not isinstance(data_seq, int) or isinstance(data_seq, bool) or not 0 <= data_seq <= newest:
        raise InvalidAdapterError(
            f"data_seq is {shorten(data_seq)}, the user's log is at {newest}: give what "
            "data_seq(user_id) of this store returned before the user's data was read"
        )
    return data_seq


def check_base(base: Mapping[str, str], limits: Limits) -> dict[str, str]:
    """Return `base`, which maps each part's name to its value, both text."""
    parts = check_values(base, "base", limits)
    if not all(isinstance(value, str) for value in parts.values()):
        raise InvalidAdapterError(
            f"base {shorten(base)} does not map text to text: give the base model's fingerprint"
        )
    return parts


def check_values(values: Mapping[str, Any], name: str, limits: Limits) -> dict[str, Any]:
    """Return `values` as JSON gives them back: a publisher sees what a later reader will see."""
    if not isinstance(values, Mapping):
        raise InvalidAdapterError(
            f"{name} {shorten(values)} is not a mapping: give a dict with str keys"
        )
    try:
        data = to_line(dict(values))
        plain = parse_json_object(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidAdapterError(
            f"{name} {shorten(values)} cannot be kept as JSON ({error}): "
            "give text, finite numbers, lists and dicts"
        ) from None
    if plain.keys() != values.keys():
        raise InvalidAdapterError(
            f"{name} {shorten(values)} has names that are not text: give a dict with str keys"
        )
    if len(data) > limits.facts_bytes:
        raise InvalidAdapterError(
            f"{name} has {len(data)} bytes as JSON, at most {limits.facts_bytes} are kept, because "
            "every later entry carries them again: keep large things elsewhere and their names here"
        )
    return plain


def check_alpha(alpha: float | None) -> float | None:
    """Return a recommended alpha, None where nothing is recommended."""
    if alpha is None:
        return None
    if not (_is_finite(alpha) and alpha >= 0):
        raise InvalidAdapterError(
            f"alpha is {shorten(alpha)}: give a finite number of at least 0, or None"
        )
    return float(alpha)


def check_tau(tau: float | None) -> float | None:
    """Return a recommended tau, None where nothing is recommended."""
    if tau is None:
        return None
    if not (_is_finite(tau) and 0 < tau <= 1):
        raise InvalidAdapterError(
            f"tau is {shorten(tau)}: give a number above 0 and at most 1, or None"
        )
    return float(tau)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: object, max_characters: int) -> bool:
    return isinstance(value, str) and len(value) <= max_characters and _is_encodable(value)


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
