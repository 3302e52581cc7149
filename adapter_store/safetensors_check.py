"""A strict check of a safetensors file, without the library and without reading the tensors.

The format: eight bytes with the header's length (little-endian), a JSON header, then the tensors'
bytes. The header maps each tensor's name to its dtype, shape and [begin, end) in those bytes;
`__metadata__` maps strings to strings.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from adapter_store.text import parse_json_object, shorten

_MAX_HEADER_BYTES = 16 * 1024**2
_MAX_DIMENSIONS = 16
_DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
# Of a number that is none all bits of the exponent are set. Per dtype: bytes of a number, the
# values of its highest byte where that may be so, and the least value of the next byte where it is.
_SIGNED = (0x7F, 0xFF)
_EXPONENT_OF_5_BITS = (*range(0x7C, 0x80), *range(0xFC, 0x100))
_NOT_A_NUMBER: dict[str, tuple[int, tuple[int, ...], int]] = {
    "F64": (8, _SIGNED, 0xF0),
    "F32": (4, _SIGNED, 0x80),
    "C64": (4, _SIGNED, 0x80),
    "BF16": (2, _SIGNED, 0x80),
    "F16": (2, _EXPONENT_OF_5_BITS, 0),
    "F8_E5M2": (1, _EXPONENT_OF_5_BITS, 0),
    "F8_E4M3": (1, _SIGNED, 0),
    "F8_E8M0": (1, (0xFF,), 0),
}


class StoredTensor(NamedTuple):
    """Where a tensor of a safetensors file lies in it."""

    dtype: str
    begin: int
    end: int


def check_safetensors(data: bytes) -> dict[str, StoredTensor]:
    """Return the tensors in `data` by their names, one at least.

    Raise ValueError unless it is a whole safetensors file. The tensors must tile the bytes after
    the header exactly: no overlap, no hole, no rest.
    """
    header, start = _header(data)
    spans = [_span(name, entry) for name, entry in header.items()]
    _check_tiling(spans, len(data) - start)
    return {
        name: StoredTensor(header[name]["dtype"], start + begin, start + end)
        for begin, end, name in spans
    }


def check_finite(data: bytes, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise ValueError with the name of a tensor that holds NaN or an infinite value.

    `tensors` is what `check_safetensors` returned for `data`.
    """
    for name, tensor in tensors.items():
        if not _is_finite(data[tensor.begin : tensor.end], tensor.dtype):
            raise ValueError(
                f"the adapter cannot be served: tensor {shorten(name, 200)} holds NaN or infinite "
                "values: train it again, with a lower learning rate"
            )


def _is_finite(numbers: bytes, dtype: str) -> bool:
    size, highest, least = _NOT_A_NUMBER.get(dtype, (1, (), 0))
    high = numbers[size - 1 :: size]
    if len(high.translate(None, bytes(highest))) == len(high):
        return True
    if size == 1 or not least:
        return False
    next_bytes = numbers[size - 2 :: size]
    return not any(
        one in highest and other >= least for one, other in zip(high, next_bytes, strict=True)
    )


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """Return the entries of the header, and where the tensors' bytes start."""
    header_bytes = int.from_bytes(data[:8], "little")
    if len(data) < 8 or header_bytes > len(data) - 8:
        raise ValueError(
            f"it is cut short: {len(data)} bytes, but its header alone should have {header_bytes}"
        )
    if header_bytes > _MAX_HEADER_BYTES:
        raise ValueError(
            f"its header has {header_bytes} bytes, at most {_MAX_HEADER_BYTES} are read"
        )
    try:
        header = parse_json_object(data[8 : 8 + header_bytes])
    except ValueError as error:
        raise ValueError(f"its header is not a JSON object ({error})") from None
    _check_metadata(header.pop("__metadata__", {}))
    if not header:
        raise ValueError("it holds no tensor")
    return header, 8 + header_bytes


def _check_metadata(metadata: Any) -> None:
    is_text = isinstance(metadata, dict) and all(
        isinstance(value, str) for value in metadata.values()
    )
    if not is_text:
        raise ValueError("its __metadata__ does not map text to text")


def _span(name: str, entry: Any) -> tuple[int, int, str]:
    """Return (begin, end, name) of one header entry, checked against its dtype and shape."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {shorten(name)} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise ValueError(f"tensor {shorten(name)} has the unknown dtype {shorten(dtype)}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"tensor {shorten(name)} has the impossible shape {shorten(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {shorten(name)} has the impossible offsets {shorten(offsets)}")
    begin, end = offsets
    expected = math.prod(shape) * _DTYPE_BYTES[dtype]
    if end - begin != expected:
        raise ValueError(
            f"tensor {shorten(name)} spans {end - begin} bytes where its shape needs {expected}"
        )
    return begin, end, name


def _are_counts(values: Any) -> bool:
    # Far above any real size, and far below what makes products of whole numbers slow.
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )


def _check_tiling(spans: list[tuple[int, int, str]], num_bytes: int) -> None:
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ValueError(
                f"tensor {shorten(name)} begins at {begin}, "
                f"not at {position} where the one before ends"
            )
        position = end
    if position != num_bytes:
        raise ValueError(f"its tensors need {position} bytes, but {num_bytes} follow the header")
