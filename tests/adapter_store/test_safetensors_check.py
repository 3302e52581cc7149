"""The safetensors check, against the real library: what it takes, the library reads."""

import json

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.numpy import save

from adapter_store.safetensors_check import check_safetensors


def whole(header, num_bytes=0):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(num_bytes)


def tensor(begin, end, shape=None, dtype="U8"):
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int16", "float16", "float32", "int64", "float64"]
)
def test_what_the_library_saves_is_accepted(dtype):
    tensors = {
        "b": numpy.ones((3, 5), dtype),
        "a": numpy.zeros((), dtype),
        "empty": numpy.zeros((0, 4), dtype),
    }
    check_safetensors(save(tensors, metadata={"format": "pt"}))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "cut short: 0 bytes"),
        (b"\x80\x04\x95 a pickle", "cut short"),
        (b"PK\x03\x04\0\0\0\0 a zip archive", "cut short"),
        ((2**63).to_bytes(8, "little") + b"{}", "cut short"),
        (whole(b"{"), "its header is not a JSON object"),
        (whole(b"[]"), "its header is not a JSON object"),
        (whole(b"\xff\xfe"), "its header is not a JSON object"),
        (whole(b'{"a":' * 50_000), "nested too deeply"),
        (whole(b'{"a":' + b"9" * 10_000 + b"}"), "its header is not a JSON object"),
        (whole({}), "holds no tensor"),
        (whole({"__metadata__": {"format": "pt"}}), "holds no tensor"),
        (whole({"__metadata__": {"format": 1}, "a": tensor(0, 1)}, 1), "does not map text to text"),
        (
            whole(b'{"a": %s, "a": %s}' % ((json.dumps(tensor(0, 1)).encode(),) * 2), 1),
            "a name occurs twice",
        ),
        (whole({"a": 1}), "needs exactly dtype, shape and data_offsets"),
        (
            whole({"a": tensor(0, 1) | {"more": 1}}, 1),
            "needs exactly dtype, shape and data_offsets",
        ),
        (whole({"a": tensor(0, 1, dtype="O8")}, 1), "unknown dtype 'O8'"),
        (whole({"a": tensor(0, 1, dtype=["U8"])}, 1), "unknown dtype"),
        (whole({"a": tensor(0, 1, shape=[-1])}, 1), "impossible shape"),
        (whole({"a": tensor(0, 1, shape=[True])}, 1), "impossible shape"),
        (whole({"a": tensor(0, 1, shape=[10**40])}, 1), "impossible shape"),
        (whole({"a": tensor(0, 1, shape=[1] * 1000)}, 1), "impossible shape"),
        (whole({"a": tensor(0, 1) | {"data_offsets": [0, 1, 2]}}, 1), "impossible offsets"),
        (whole({"a": tensor(0, 1) | {"data_offsets": [0.0, 1.0]}}, 1), "impossible offsets"),
        (
            whole({"a": tensor(0, 4, shape=[2], dtype="F32")}, 4),
            "spans 4 bytes where its shape needs 8",
        ),
        (whole({"a": tensor(0, 4)}, 3), "need 4 bytes, but 3 follow"),
        (whole({"a": tensor(0, 4)}, 5), "need 4 bytes, but 5 follow"),
        (whole({"a": tensor(1, 4)}, 4), "begins at 1, not at 0"),
        (whole({"a": tensor(0, 2), "b": tensor(3, 4)}, 4), "begins at 3, not at 2"),
        (whole({"a": tensor(0, 3), "b": tensor(2, 4)}, 4), "begins at 2, not at 3"),
    ],
)
def test_what_is_not_a_whole_file_is_refused_with_the_reason(data, said):
    with pytest.raises(ValueError, match=said) as caught:
        check_safetensors(data)
    assert len(str(caught.value)) < 300


GOOD = save({"a": numpy.arange(6, dtype="float32").reshape(2, 3), "b": numpy.ones(4, "float16")})


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.binary(max_size=3), st.integers(0, 3))
def test_a_damaged_file_is_refused_or_readable_never_a_crash(position, inserted, num_removed):
    data = GOOD[:position] + inserted + GOOD[position + num_removed :]
    try:
        check_safetensors(data)
    except ValueError:
        return
    deserialize(data)


@pytest.mark.parametrize("num_bytes", range(0, len(GOOD), 7))
def test_a_file_cut_anywhere_is_refused(num_bytes):
    with pytest.raises(ValueError, match=r"cut short|follow the header"):
        check_safetensors(GOOD[:num_bytes])
