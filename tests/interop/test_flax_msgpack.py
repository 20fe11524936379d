"""Flax's files: every kind of leaf comes back byte for byte, and hostile files are refused."""

import pickle

import msgpack
import numpy as np
import pytest
import torch

from avmae_fast.interop.entries import ConvertError
from avmae_fast.interop.flax_msgpack import flatten, nest, pack_tree, unpack_tree

GENERATOR = np.random.default_rng(0)


def _equal(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.view(torch.int16), b.view(torch.int16))
    if isinstance(a, np.ndarray | np.generic):
        same = type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
        return same and a.tobytes() == b.tobytes()
    return type(a) is type(b) and a == b


TREE = {
    "global_step": 7,
    "note": "as released",
    "nothing": None,
    "rate": 0.1,
    "phase": 1 + 2j,
    "arrays": {
        "floats": GENERATOR.standard_normal((3, 4, 5)).astype(np.float32),
        "turned": GENERATOR.standard_normal((4, 6)).T,
        "empty": np.zeros((0, 3), np.float16),
        "scalar_array": np.array(2.5, np.float32),
        "flags": np.array([True, False]),
        "key": np.array([1, 2**32 - 1], np.uint32),
        "complex": np.array([1 + 1j], np.complex64),
        "nan": np.array([np.nan, -0.0, np.inf], np.float32),
        "brain": torch.tensor([[1.5, -2.0], [3.0, float("inf")]], dtype=torch.bfloat16),
    },
    "numpy_scalars": {"float": np.float32(1.25), "int": np.int64(-3), "double": np.float64(0.1)},
}


@pytest.mark.parametrize("chunk_bytes", [2**30, 16, 1])
def test_there_and_back(chunk_bytes: int) -> None:
    packed = pack_tree(TREE, chunk_bytes)
    assert (b"__msgpack_chunked_array__" in packed) == (chunk_bytes < 2**30)
    assert _equal(unpack_tree(packed), TREE)


def test_the_bytes_by_hand() -> None:
    """What Flax itself writes for {"a": an array}, spelt out."""
    inner = msgpack.packb(([2], "float32", np.array([1, 2], "<f4").tobytes()))
    by_hand = b"\x81\xa1a\xc7" + bytes([len(inner), 1]) + inner
    assert pack_tree({"a": np.array([1, 2], np.float32)}) == by_hand
    assert unpack_tree(by_hand)["a"].tolist() == [1.0, 2.0]


def test_paths() -> None:
    leaves = {"a/b": np.zeros(2), "a/c/d": np.ones(1), "e": np.ones(3)}
    assert flatten(nest(leaves)).keys() == leaves.keys()
    with pytest.raises(ConvertError, match="a/step is int"):
        flatten({"a": {"step": 3}})


class _Bomb:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a pickle was executed",))


def _array(shape: object, dtype: str, data: bytes) -> bytes:
    return msgpack.packb({"x": msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))})


HOSTILE = {
    "a pickle": (pickle.dumps(_Bomb()), "not a whole Flax"),
    "nothing": (b"", "not a whole Flax"),
    "cut short": (pack_tree(TREE)[:-5], "not a whole Flax"),
    "a tail": (pack_tree(TREE) + b"x", "not a whole Flax"),
    "objects": (_array([1], "object", b"\0" * 8), "dtype 'object'"),
    "code in a dtype": (_array([1], "O,i4", b"\0" * 8), "dtype 'O,i4'"),
    "too large a shape": (_array([2**40, 2**40], "float32", b""), "in 0 bytes"),
    "a negative shape": (_array([-1], "float32", b"\0" * 4), "at least 0"),
    "a shape of text": (_array(["1"], "float32", b"\0" * 4), "at least 0"),
    "two parts": (msgpack.packb(msgpack.ExtType(1, msgpack.packb([1, 2]))), "not a whole Flax"),
    "another extension": (msgpack.packb(msgpack.ExtType(42, b"")), "extension 42"),
    "depth": (b"\x91" * 5000 + b"\x01", "not a whole Flax"),
    "a giant list": (b"\xdd\xff\xff\xff\xff", "not a whole Flax"),
    "chunks that lack": (
        msgpack.packb({"__msgpack_chunked_array__": True, "shape": {"0": 4}, "chunks": {}}),
        "no chunks",
    ),
    "chunks without shape": (
        msgpack.packb({"__msgpack_chunked_array__": True, "chunks": {}}),
        "not a whole Flax",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str) -> None:
    data, match = HOSTILE[name]
    with pytest.raises(ConvertError, match=match):
        unpack_tree(data)


def test_what_cannot_be_written() -> None:
    with pytest.raises(ConvertError, match="dtype object"):
        pack_tree({"x": np.array([object()])})
    with pytest.raises(ConvertError, match="set cannot be written"):
        pack_tree({"x": {1, 2}})
