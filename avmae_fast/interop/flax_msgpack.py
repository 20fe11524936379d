"""Flax's checkpoint files, read and written without JAX or Flax.

A file is one MessagePack map, nested; a leaf that MessagePack does not know is an extension:
1 an array (shape, dtype, bytes), 2 a complex number, 3 a NumPy scalar. An array above 2**30 bytes
is a map of chunks instead. Nothing in a file is ever executed.
Source: the format of flax.serialization (msgpack_serialize and msgpack_restore).
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avmae_fast.interop.entries import ConvertError

# Maps, lists, numbers, strings, None, arrays; bfloat16, which NumPy lacks, is a torch tensor.
Tree = Any

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_CHUNKED = "__msgpack_chunked_array__"
_CHUNK_BYTES = 2**30
_DTYPES = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
}  # fmt: skip


def read_flax(path: Path) -> Tree:
    """The tree a file holds.

    Raises:
        ConvertError: it is not such a file, is cut short, or holds what no array is made of.
    """
    return unpack_tree(path.read_bytes())


def unpack_tree(data: bytes) -> Tree:
    """The tree in the bytes of a file; see `read_flax`."""
    msgpack = _msgpack()
    try:
        tree = msgpack.unpackb(data, ext_hook=_read_extension, raw=False, strict_map_key=False)
        return _join_chunks(tree)
    except ConvertError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        # msgpack's own errors are kinds of ValueError; a deep nesting ends in RecursionError.
        name = type(error).__name__
        raise ConvertError(f"not a whole Flax msgpack file: {name}: {error}") from error


def pack_tree(tree: Tree, chunk_bytes: int = _CHUNK_BYTES) -> bytes:
    """The bytes of a file that holds a tree; arrays above `chunk_bytes` are cut into chunks."""
    packed = _msgpack().packb(
        _cut_chunks(tree, chunk_bytes), default=_write_extension, strict_types=True
    )
    return cast(bytes, packed)


def flatten(tree: Mapping[str, Tree], prefix: str = "") -> dict[str, NDArray | Tensor]:
    """Leaves by path, "Transformer/encoderblock_0/..."; what is not an array is an error."""
    leaves: dict[str, NDArray | Tensor] = {}
    for name, node in tree.items():
        path = f"{prefix}{name}"
        if isinstance(node, Mapping):
            leaves |= flatten(node, f"{path}/")
        elif isinstance(node, np.ndarray | Tensor):
            leaves[path] = node
        else:
            raise ConvertError(f"{path} is {type(node).__name__}, want an array")
    return leaves


def nest(leaves: Mapping[str, NDArray | Tensor]) -> dict[str, Tree]:
    """Undo `flatten`."""
    tree: dict[str, Tree] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _read_extension(code: int, data: bytes) -> Tree:
    if code == _ARRAY:
        return _array(data)
    if code == _SCALAR:
        array = _array(data)
        return array if isinstance(array, Tensor) else array[()]
    if code == _COMPLEX:
        real, imaginary = _msgpack().unpackb(data)
        return complex(real, imaginary)
    raise ConvertError(f"MessagePack extension {code} is none of Flax's (1, 2 and 3)")


def _array(data: bytes) -> NDArray | Tensor:
    """An array from (shape, dtype name, bytes), each checked against the others."""
    shape, name, buffer = _msgpack().unpackb(data, raw=True)
    name = name.decode("ascii", "replace") if isinstance(name, bytes) else str(name)
    if name not in _DTYPES and name != "bfloat16":
        raise ConvertError(f"array of dtype {name!r}, want one of {', '.join(sorted(_DTYPES))}")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ConvertError(f"array of shape {shape!r}, want whole numbers of at least 0")
    dtype = np.dtype("uint16" if name == "bfloat16" else name)
    if math.prod(shape) * dtype.itemsize != len(buffer):
        raise ConvertError(f"array of shape {shape} and dtype {name} in {len(buffer)} bytes")
    array = np.frombuffer(buffer, dtype).reshape(shape).copy()
    return torch.from_numpy(array).view(torch.bfloat16) if name == "bfloat16" else array


def _write_extension(leaf: Tree) -> Any:
    ext_type = _msgpack().ExtType
    if isinstance(leaf, np.ndarray | Tensor):
        return ext_type(_ARRAY, _array_bytes(leaf))
    # NumPy's complex128 and float64 are kinds of Python's numbers, so they are asked first.
    if isinstance(leaf, np.generic):
        return ext_type(_SCALAR, _array_bytes(np.asarray(leaf)))
    if isinstance(leaf, complex):
        return ext_type(_COMPLEX, _msgpack().packb((leaf.real, leaf.imag)))
    raise ConvertError(f"{type(leaf).__name__} cannot be written to a Flax msgpack file")


def _array_bytes(array: NDArray | Tensor) -> bytes:
    shape = tuple(array.shape)
    if isinstance(array, Tensor):
        if array.dtype == torch.bfloat16:
            name, array = "bfloat16", array.detach().cpu().contiguous().view(torch.uint16).numpy()
        else:
            array = array.detach().cpu().numpy()
            name = array.dtype.name
    else:
        name = array.dtype.name
    if name not in _DTYPES and name != "bfloat16":
        raise ConvertError(f"an array of dtype {name} cannot be written to a Flax msgpack file")
    return cast(bytes, _msgpack().packb((shape, name, array.tobytes()), use_bin_type=True))


def _join_chunks(tree: Tree) -> Tree:
    if isinstance(tree, list):
        return [_join_chunks(node) for node in tree]
    if not isinstance(tree, dict):
        return tree
    if not tree.get(_CHUNKED):
        return {name: _join_chunks(node) for name, node in tree.items()}
    shape = [tree["shape"][str(axis)] for axis in range(len(tree["shape"]))]
    chunks = [tree["chunks"][str(i)] for i in range(len(tree["chunks"]))]
    if not chunks or not all(isinstance(c, np.ndarray | Tensor) and c.ndim == 1 for c in chunks):
        raise ConvertError("a chunked array holds no chunks, or chunks that are not flat arrays")
    if sum(len(chunk) for chunk in chunks) != math.prod(shape):
        raise ConvertError(f"chunks of {[len(c) for c in chunks]} values for the shape {shape}")
    if all(isinstance(chunk, Tensor) for chunk in chunks):
        return torch.cat(chunks).reshape(shape)
    return np.concatenate(chunks).reshape(shape)


def _cut_chunks(tree: Tree, chunk_bytes: int) -> Tree:
    if isinstance(tree, Mapping):
        return {name: _cut_chunks(node, chunk_bytes) for name, node in tree.items()}
    if isinstance(tree, list | tuple):
        return [_cut_chunks(node, chunk_bytes) for node in tree]
    if not isinstance(tree, np.ndarray | Tensor) or tree.nbytes <= chunk_bytes:
        return tree
    size, flat = max(1, chunk_bytes // tree.itemsize), tree.reshape(-1)
    chunks = [flat[i : i + size] for i in range(0, len(flat), size)]
    return {
        _CHUNKED: True,
        "shape": {str(axis): int(n) for axis, n in enumerate(tree.shape)},
        "chunks": {str(i): chunk for i, chunk in enumerate(chunks)},
    }


def _msgpack() -> Any:
    try:
        import msgpack
    except ImportError as error:
        raise ConvertError(
            "Flax checkpoints need the package msgpack: pip install 'avmae_fast[flax]'"
        ) from error
    return msgpack
