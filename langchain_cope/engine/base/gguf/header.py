"""The header of a GGUF file: what it says of itself, and where its tensors lie.

Everything is checked against the size of the file before anybody else reads it, so that a damaged
or hostile file is an error with a reason. Arrays are passed over: only their length is kept.
"""

import math
import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from langchain_cope.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
_MOST_ALIGNMENT = 1 << 20
_LONG = 1000  # values of an array that is one of the vocabulary, and not of the layers
_T = TypeVar("_T")


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    """Rows first, as torch counts; the file counts the other way round."""
    kind: int
    """Number of its quantization (`gguf.GGMLQuantizationType`)."""
    start: int
    """Where its bytes begin in the file."""
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself."""

    fields: dict[str, Any]
    """Its metadata; of an array the length."""
    tensors: tuple[PackedTensor, ...]
    short: bytes
    """The header itself, with long arrays (tokens, merges) emptied, up to where tensors begin."""
    num_bytes: int
    """Bytes of all tensors, as they lie in the file."""

    @property
    def architecture(self) -> str:
        """Its architecture, in llama.cpp's words."""
        return str(self.fields.get("general.architecture", ""))

    @property
    def quantizations(self) -> str:
        """The kinds of its tensors, those with the most weights first."""
        from gguf import GGMLQuantizationType

        weights: dict[int, int] = {}
        for tensor in self.tensors:
            weights[tensor.kind] = weights.get(tensor.kind, 0) + tensor.num_elements
        kinds = sorted(weights, key=lambda kind: -weights[kind])
        return ", ".join(GGMLQuantizationType(kind).name for kind in kinds)

    def write_short(self, path: Path) -> None:
        """Write a file with the short header to `path`; where the tensors belong, it is sparse.

        What reads the header of that file sees the same model, many times faster.
        """
        with path.open("xb") as file:
            file.write(self.short)
            file.truncate(len(self.short) + self.num_bytes)

    def own(self, name: str) -> Any:
        """Return the field `name` of the architecture, or None."""
        return self.fields.get(f"{self.architecture}.{name}")


def read_header(path: Path) -> GgufHeader:
    """Return the header of the GGUF file `path`.

    Raises ModelError where it is no GGUF file, damaged or cut off.
    """
    return _read(path, _Reader.header)


def gguf_context(path: Path) -> int | None:
    """Return the tokens that the GGUF file `path` says its model can see.

    Raises ModelError as `read_header` does; what follows the number is not looked at.
    """
    return _read(path, _Reader.context)


def _read(path: Path, what: Callable[["_Reader"], _T]) -> _T:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return what(_Reader(data))
    except (OSError, ValueError, struct.error, _DamagedError) as error:
        raise ModelError(f"{path} cannot be read as a GGUF file: {error}") from error


class _DamagedError(Exception):
    """What is written cannot be."""


class _Reader:
    """Reads a mapped file from its beginning, never beyond its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0
        self._short: list[bytes] = []

    def context(self) -> int | None:
        """Return the length of the context, without reading the many tokens that follow it."""
        fields: dict[str, Any] = {}
        for name, value in self._fields(self._beginning()[0]):
            fields[name] = value
            context = fields.get(f"{fields.get('general.architecture')}.context_length")
            if isinstance(context, int):
                return context
        return None

    def _beginning(self) -> tuple[int, int]:
        """Return the number of fields and that of tensors."""
        if self._take(4) != b"GGUF":
            raise _DamagedError("it does not begin with GGUF")
        version = self._number("I")
        if version not in _VERSIONS:
            big = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            found = "it is big-endian" if big else f"it has version {version}"
            raise _DamagedError(f"{found}; versions 2 and 3 are read")
        num_tensors, num_fields = self._number("Q"), self._number("Q")
        self._short.append(self._data[: self._at])
        return self._counted(num_fields, 12, "fields"), num_tensors

    def _fields(self, num_fields: int) -> Iterator[tuple[str, Any]]:
        """Yield the metadata by name."""
        for _ in range(num_fields):
            start = self._at
            name = self._string()
            kind = self._number("I")
            length_at = self._at + 4  # of an array, after the kind of its values
            value = self._value(kind)
            if kind == _ARRAY and value > _LONG:
                self._short.append(self._data[start:length_at] + bytes(8))
            else:
                self._short.append(self._data[start : self._at])
            yield name, value

    def header(self) -> GgufHeader:
        """Return all of it."""
        num_fields, num_tensors = self._beginning()
        fields = dict(self._fields(num_fields))
        infos_at = self._at
        infos = [self._info() for _ in range(self._counted(num_tensors, 24, "tensors"))]
        alignment = fields.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= _MOST_ALIGNMENT:
            raise _DamagedError(f"its alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        short = b"".join([*self._short, self._data[infos_at : self._at]])
        return GgufHeader(
            fields,
            tuple(self._placed(start, *info) for info in infos),
            short + bytes(-len(short) % alignment),
            len(self._data) - start,
        )

    def _placed(
        self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int
    ) -> PackedTensor:
        num_bytes = _num_bytes(name, shape, kind)
        end = start + offset + num_bytes
        if end > len(self._data):
            raise _DamagedError(
                f"it ends at byte {len(self._data):,}, but its tensor {name} would end at byte "
                f"{end:,}: it is cut off, fetch it again"
            )
        return PackedTensor(name, shape, kind, start + offset, num_bytes)

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise _DamagedError(f"its tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        return name, shape, self._number("I"), self._number("Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._pass_over_array()
        if kind not in _SCALARS:
            raise _DamagedError(f"it has a value of the unknown type {kind}")
        return self._number(_SCALARS[kind])

    def _pass_over_array(self) -> int:
        kind, length = self._number("I"), self._number("Q")
        if kind in _SCALARS:
            size = struct.calcsize(f"<{_SCALARS[kind]}")
            self._pass_over(self._counted(length, size, "values") * size)
            return int(length)
        if kind != _STRING:
            raise _DamagedError(f"it has an array of the type {kind}")
        at, end, unpack = self._at, len(self._data), struct.Struct("<Q").unpack_from
        for _ in range(self._counted(length, 8, "strings")):  # hundreds of thousands
            at += 8 + unpack(self._data, at)[0]
            if at + 8 > end:
                break
        self._pass_over(at - self._at)
        return int(length)

    def _string(self) -> str:
        return self._take(self._number("Q")).decode("utf-8", "replace")

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _counted(self, count: int, least_bytes: int, what: str) -> int:
        """Return `count` where that many of at least so many bytes fit into the file."""
        if count * least_bytes > len(self._data) - self._at:
            raise _DamagedError(f"it claims {count:,} {what}, more than it has room for")
        return count

    def _take(self, num_bytes: int) -> bytes:
        start = self._at
        self._pass_over(num_bytes)
        return self._data[start : self._at]

    def _pass_over(self, num_bytes: int) -> None:
        if self._at + num_bytes > len(self._data):
            raise _DamagedError("it is cut off in its header, fetch it again")
        self._at += num_bytes


def _num_bytes(name: str, shape: tuple[int, ...], kind: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise _DamagedError(
            f"its tensor {name} has the quantization {kind}, which the package gguf does not know"
        ) from None
    if not all(shape) or shape[-1] % block:
        raise _DamagedError(
            f"its tensor {name} of shape {shape} does not divide into blocks of {block}"
        )
    return math.prod(shape) // block * size
