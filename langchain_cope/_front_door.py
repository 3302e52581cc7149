"""Lazy front doors: a package offers names that are imported from its modules when first used."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module `__getattr__` for `package`; `modules` maps each name to the module that holds it.

    A module is named relative to `package`. Raises AttributeError, with the names on offer, for any other.
    """

    def load(name: str) -> Any:
        if name not in modules:
            offered = ", ".join(sorted(modules))
            raise AttributeError(
                f"module {package!r} has no attribute {name!r}; it offers {offered}"
            )
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    return load
