"""Checks of options, made where the options are built. Knows no torch."""

import math
from typing import TypeGuard

from langchain_cope.errors import InputError


def check_option(name: str, value: object, expected: str, fits: bool, hint: str = "") -> None:
    """Raise InputError unless `fits`.

    The text is `NAME must be EXPECTED, not VALUE`, and `: HINT` where a hint is given.
    """
    if not fits:
        message = f"{name} must be {expected}, not {value!r}"
        raise InputError(f"{message}: {hint}" if hint else message)


def is_whole(value: object, *, least: float = -math.inf) -> TypeGuard[int]:
    """Return whether `value` is an integer, not a bool, and at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(
    value: object, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> TypeGuard[float]:
    """Return whether `value` is a finite number, not a bool, ≥ `least`, > `above` and ≤ `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value) and value >= least and above < value <= most
    except OverflowError:  # an integer that no float can hold
        return False
