"""Lazy front doors: a package offers names that are imported from its modules when first used."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from langchain_cope._collector import collector_paused


def lazy_names(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's `__getattr__`, which imports the name asked for, and its `__dir__`.

    For a name that is not on offer the former raises AttributeError with those that are. Assign
    both where `TYPE_CHECKING` is false: else type checkers take every name for a good one.

    Args:
        package: the package that offers the names.
        modules: each name and the module that holds it, relative to `package`.
    """

    def load(name: str) -> Any:
        if name not in modules:
            offered = ", ".join(sorted(modules))
            raise AttributeError(
                f"module {package!r} has no attribute {name!r}; it offers {offered}"
            )
        with collector_paused():
            value = getattr(import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)  # the next use finds it without a call
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return load, names
