"""Damage to valid files, drawn from a generator: what was written by another program, or by nobody.

Bytes are damaged as media files are (`benchmarks.fuzz_media`); text and JSON are also changed into
what is still well-formed and means something else.
"""

import copy
import json
import random
import struct
import zlib
from typing import Any

import numpy as np

from benchmarks.fuzz_media import DAMAGES

# Values that are of another type, size, sign or meaning than what they replace.
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.5, 1e308,
    float("nan"), float("inf"), "", " ", "none", "0", "-1", "1e999", "nan", "..", "../outside/x",
    "/outside", "~nobody-of-this-name/x", "a\0b", "\ud800", "\u0663", "x" * 70_000,
    "$(touch ../outside/x)", "; touch ../outside/x", [], {}, [[]], [None], {"": 0}, [0, -1, 2**63],
)  # fmt: skip
# The same for text: what a cell or the value of a key may be replaced by.
ODD_TEXT = (
    "", " ", "0", "-1", "1", "007", "2.5", "-0", "1e999", "nan", "inf", "true", "none", "null",
    "99999999999", "1" + "0" * 5000, "1_000", "\u0663", '"', '"""', "'", ",", ",,,", "\n", "\r",
    "=", "[", "]", "{}", "[1, 2]", "[" * 3000, "x" * 140_000, "..", "../outside/x", '"../outside"',
    '"~nobody-of-this-name/x"', '"a\\u0000b"', "a\0b", "\ufeff", "\u2028", "2020-01-01",
    '"$(touch ../outside/x)"', '"; touch ../outside/x"', "video", "train",
)  # fmt: skip

# How many things are changed at a time: after the first, the others are rarely reached.
_CHANGES = (1, 1, 1, 2, 3)


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat or overwrite bytes."""
    if not data:
        return bytes([rng.randrange(256)])
    damaged = bytearray(data)
    rng.choice(DAMAGES)(damaged, np.random.default_rng(rng.getrandbits(63)))
    return bytes(damaged)


def change_json(text: bytes, rng: random.Random) -> bytes:
    """Change one to three values of a JSON document."""
    tree = json.loads(text)
    for _ in range(rng.choice(_CHANGES)):
        tree = _change_tree(tree, rng)
    data = json.dumps(tree).encode()
    return data.replace(b"null", b"[" * 20_000, 1) if rng.random() < 0.02 else data


def change_lines(data: bytes, rng: random.Random) -> bytes:
    """Change one line of a file of JSON lines."""
    lines = [line for line in data.splitlines() if line]
    number = rng.randrange(len(lines))
    lines[number] = change_json(lines[number], rng)
    return b"\n".join(lines) + b"\n"


def change_cells(data: bytes, rng: random.Random) -> bytes:
    """Change, add or drop cells and rows of a CSV file."""
    rows = [line.split(",") for line in data.decode().splitlines()]
    for _ in range(rng.choice(_CHANGES)):
        number = rng.randrange(len(rows))
        row, cell = rows[number], rng.randrange(len(rows[number]) or 1)
        what = rng.randrange(6)
        if what < 3:
            row[cell : cell + 1] = [rng.choice(ODD_TEXT)]
        elif what == 3:
            row.append(rng.choice(ODD_TEXT))
        elif what == 4:
            del row[cell : cell + 1]
        elif rng.random() < 0.5 and len(rows) > 1:
            del rows[number]
        else:
            rows.insert(number, list(row))
    return "\n".join(map(",".join, rows)).encode("utf-8", "surrogatepass")


def change_toml(data: bytes, rng: random.Random) -> bytes:
    """Change, repeat or drop lines of a TOML file."""
    lines = data.decode().splitlines()
    for _ in range(rng.choice(_CHANGES)):
        number = rng.randrange(len(lines))
        key, equals, _ = lines[number].partition("=")
        what = rng.randrange(6)
        if what < 3 and equals:
            lines[number] = f"{key}= {rng.choice(ODD_TEXT)}"
        elif what == 3:
            lines.insert(rng.randrange(len(lines)), lines[number])
        elif what == 4 and len(lines) > 1:
            del lines[number]
        else:
            lines[number] = rng.choice(ODD_TEXT) + lines[number]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def change_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change the header of a safetensors file, or its length, or the tensors."""
    (size,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + size], data[8 + size :]
    what = rng.randrange(6)
    if what == 0:
        return damage_bytes(data, rng)
    if what == 1:
        wrong = rng.choice([0, 1, size - 1, size + 1, len(data), 2**31, 2**63, 2**64 - 1])
        return struct.pack("<Q", wrong) + header + body
    if what == 2:
        body = damage_bytes(body, rng)
    elif what == 3:
        header = damage_bytes(header, rng)
    else:
        header = change_json(header, rng)
    return struct.pack("<Q", len(header)) + header + body


def change_index(data: bytes, rng: random.Random) -> bytes:
    """Change the header of an index of packed clips, its rows, or the sizes in its head."""
    head = struct.Struct("<8sIIQQQ")
    magic, version, size, *counts = head.unpack_from(data)
    text, body = data[head.size : head.size + size], bytearray(data[head.size + size : -4])
    what = rng.randrange(4)
    if what == 0:
        sizes = [0, 1, size, *counts, 2**31, 2**32 - 1]
        size, *counts = (rng.choice([n, n, *sizes]) for n in (size, *counts))
    elif what == 1:
        text = change_json(text, rng)
        size = len(text)
    else:
        at = rng.randrange(len(body) - 8)
        body[at : at + 8] = rng.choice(
            [b"\xff" * 8, bytes(8), b"\x01" + bytes(7), rng.randbytes(8)]
        )
    body = bytearray(head.pack(magic, version, size, *counts) + text + body)
    return bytes(body) + zlib.crc32(body).to_bytes(4, "little")


def _change_tree(tree: Any, rng: random.Random) -> Any:
    """The tree with a value replaced, left out, given another name, or put where another was."""
    places = list(_places(tree))
    if not places:
        return rng.choice(ODD)
    holder, key = rng.choice(places)
    what = rng.randrange(8)
    if what < 5:
        holder[key] = copy.deepcopy(rng.choice(ODD))
    elif what == 5:
        del holder[key]
    elif what == 6:
        other, at = rng.choice(places)
        holder[key] = copy.deepcopy(other[at])
    elif isinstance(holder, dict):
        holder[str(rng.choice(ODD))[:100]] = holder.pop(key)
    return rng.choice(ODD) if rng.random() < 0.01 else tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every value inside a tree, as what holds it and where."""
    found = []
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        found.append((tree, key))
        found += _places(tree[key])
    return found
