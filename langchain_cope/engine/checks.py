"""Checks of options, made where the options are built. Knows no torch."""

import math


def checked(name: str, value: object, expected: str, fits: bool) -> None:
    """Raise ValueError, with the option's name, its value and what is expected, unless it fits."""
    if not fits:
        raise ValueError(f"{name} must be {expected}, not {value!r}")


def is_whole(value: object, *, least: float = -math.inf) -> bool:
    """Return whether `value` is an integer, not a bool, and at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(
    value: object, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> bool:
    """Return whether `value` is a finite number, not a bool, ≥ `least`, > `above` and ≤ `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and value >= least and above < value <= most
