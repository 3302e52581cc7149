"""A TypedDict as a JSON schema: which keys it needs, and where null is a value.

LangChain's conversion refuses `NotRequired` and leaves None out, and pydantic reads TypedDicts of
`typing` from Python 3.12 on only. So pydantic classes with the same fields are made here.
"""

import inspect
import types
import typing
from typing import Annotated, Any, ForwardRef, Literal, Union, get_args, get_origin

import typing_extensions
from pydantic import BaseModel, Field, create_model

_QUALIFIERS = {
    getattr(module, name)
    for module in (typing, typing_extensions)
    for name in ("Required", "NotRequired", "ReadOnly")
    if hasattr(module, name)
}
_OPTIONAL = {typing.NotRequired, typing_extensions.NotRequired}
_REQUIRED = {typing.Required, typing_extensions.Required}


def is_typed_dict(kind: Any) -> bool:
    """Return whether `kind` is a TypedDict, of `typing` or of `typing_extensions`."""
    return typing_extensions.is_typeddict(kind)


def typed_dict_schema(kind: Any) -> dict[str, Any]:
    """Return the JSON schema of a TypedDict, with those in it under `$defs`.

    `Annotated[type, default, description]` is LangChain's way to describe a key; `...` as the
    default means that there is none.

    Raises:
        NameError: an annotation names a type that is not there.
        PydanticUserError: an annotation has no JSON schema.
    """
    classes = _Classes()
    name = classes.add(kind)
    for made in classes.made.values():
        made.model_rebuild(force=True, _types_namespace=classes.made)
    schema = classes.made[name].model_json_schema()
    for part in (schema, *schema.get("$defs", {}).values()):
        for described in part.get("properties", {}).values():
            described.pop("title", None)  # the key again
    return schema


class _Classes:
    """Pydantic classes for TypedDicts, which name each other so that they may recur."""

    def __init__(self) -> None:
        self.made: dict[str, type[BaseModel]] = {}
        self._names: dict[Any, str] = {}

    def add(self, kind: Any) -> str:
        """Make the class of a TypedDict, and return its name."""
        if kind in self._names:
            return self._names[kind]
        taken = self._names.values()
        name = kind.__name__ if kind.__name__ not in taken else f"{kind.__name__}{len(taken)}"
        self._names[kind] = name
        hints = typing_extensions.get_type_hints(
            kind, localns={kind.__name__: kind}, include_extras=True
        )
        # Numbered: a key may be any text, and must not hide what a pydantic class has.
        fields: dict[str, Any] = {
            f"key{number}": self._field(key, hint, key in kind.__required_keys__)
            for number, (key, hint) in enumerate(hints.items())
        }
        text = inspect.cleandoc(kind.__doc__ or "") or None
        self.made[name] = create_model(name, __doc__=text, **fields)
        return name

    def _field(self, key: str, hint: Any, required: bool) -> tuple[Any, Any]:
        """Return the (annotation, pydantic field) of a key; its own words decide if `required`."""
        notes: list[Any] = []
        while (origin := get_origin(hint)) is Annotated or origin in _QUALIFIERS:
            inner, *more = get_args(hint)
            notes = [*more, *notes]
            required = origin in _REQUIRED or (required and origin not in _OPTIONAL)
            hint = inner
        options: dict[str, Any] = {"alias": key}
        if len(notes) > 1 and isinstance(notes[1], str):
            default, options["description"], *notes = notes
            if default is not ...:
                required, options["default"] = False, default
        elif len(notes) == 1 and isinstance(notes[0], str):
            [options["description"]], notes = notes, []
        if not required and "default" not in options:
            options["default_factory"] = dict  # for pydantic not required; in no schema
        annotation = self._replaced(hint)
        return (Annotated[(annotation, *notes)] if notes else annotation), Field(**options)

    def _replaced(self, hint: Any) -> Any:
        """Return a type with the names of classes in the place of TypedDicts."""
        if is_typed_dict(hint):
            return ForwardRef(self.add(hint))
        origin, arguments = get_origin(hint), get_args(hint)
        if not arguments or origin is Literal:
            return hint
        if origin is Annotated:
            return Annotated[(self._replaced(arguments[0]), *arguments[1:])]
        replaced = tuple(self._replaced(argument) for argument in arguments)
        if origin in (Union, types.UnionType):
            return Union[replaced]  # noqa: UP007 - of a tuple
        return origin[replaced] if origin is not None and replaced != arguments else hint
