"""Lazy front doors: a package offers names that are imported from its modules when first used."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's `__getattr__`, which imports the name asked for.

    For a name that is not on offer it raises AttributeError with those that are.

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
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    return load
