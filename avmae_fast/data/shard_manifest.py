"""Packed clips as a manifest: every record is a byte range of a shard."""

import functools
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from avmae_fast.config import DataConfig
from avmae_fast.data.manifest import SPLITS, UNKNOWN_LABEL, Manifest, ManifestError, Record
from avmae_fast.data.shard_index import Index, index_file, key_of, read_index

# Windows whose pictures are off by less than this share of the packed interval look even.
_UNEVEN = 1e-3


@dataclass(frozen=True, eq=False)
class ShardRecord(Record):
    """A packed clip. `path` names it in messages: the shard and the key of its members.

    shard, shard_bytes: the tar, and how long it was when it was packed.
    codec, fps, gop: how pictures are coded; every gop-th stands for itself.
    height, width, duration_s: of the pictures.
    decoder: what an H.264 decoder has to know before the first picture.
    video_at, frame_offsets: where the video member begins in the tar, where its pictures do in it.
    sound_at, samples: where the first 16 kHz sample lies in the tar; how many follow (0: none).
    """

    shard: Path
    shard_bytes: int
    codec: str
    fps: float
    gop: int
    height: int
    width: int
    duration_s: float
    decoder: bytes
    video_at: int
    frame_offsets: NDArray[np.int64]
    sound_at: int
    samples: int


@dataclass(frozen=True, eq=False)
class ShardManifest(Manifest):
    """The records of an index file. It is mapped by each process: only a selection travels."""

    source: Path
    classes: tuple[str, ...]
    _chosen: NDArray[np.uint32] = field(repr=False)
    # From a label in the index to one of `classes`.
    _label_map: NDArray[np.int64] = field(repr=False)

    @classmethod
    def load(cls, path: Path, classes: Sequence[str] | None = None) -> Self:
        """Read the index of a folder of shards; see `load_manifest`."""
        source = index_file(path)
        index = read_index(source)
        if not len(index.rows):
            raise ManifestError(f"{source} lists no clips: see failed.jsonl beside it")
        _require_header(source, index.header)
        own = tuple(index.header["classes"])
        names = own if classes is None else tuple(classes)
        if unknown := sorted(set(own) - set(names)):
            raise ManifestError(
                f"{source} has the class {unknown[0]!r}, which is not one of the {len(names)} known"
            )
        _require_labels(source, index)
        numbers = {name: number for number, name in enumerate(names)}
        label_map = np.array([*(numbers[name] for name in own), UNKNOWN_LABEL], np.int64)
        return cls(source, names, np.arange(len(index.rows), dtype=np.uint32), label_map)

    @cached_property
    def index(self) -> Index:
        """The index file; all its rows, whatever is selected."""
        return read_index(self.source)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "index"}

    def warn_unless_fit(self, data: DataConfig) -> None:
        """Say in the log where packed pictures do not suit what a run wants of them."""
        header = self.index.header
        packed_s, wanted_s = 1 / header["fps"], data.stride / data.fps
        if abs(wanted_s / packed_s - round(wanted_s / packed_s)) > _UNEVEN or wanted_s < packed_s:
            _warn_once(
                f"data.stride / data.fps asks for pictures every {wanted_s:.4g} s, those of "
                f"{self.source.parent} are {packed_s:.4g} s apart, so motion will look uneven: "
                f"pack with another --fps, or use data.fps={header['fps']:g}"
            )
        if data.short_side != header["short_side"]:
            _warn_once(
                f"pictures of {self.source.parent} have a short side of {header['short_side']}, "
                f"data.short_side = {data.short_side}: resizing them costs more than decoding does"
            )

    def __len__(self) -> int:
        return len(self._chosen)

    def select(self, split: str) -> Self:
        chosen = self.index.rows["split"][self._chosen] == SPLITS.index(split)
        return type(self)(self.source, self.classes, self._chosen[chosen], self._label_map)

    def labels(self, index: int) -> tuple[int, ...]:
        own = self.index.labels.of_record(int(self._chosen[index]))
        return tuple(self._label_map[list(own)].tolist())

    def __getitem__(self, index: int) -> ShardRecord:
        """Raises ManifestError where the index says what cannot be."""
        number = self._chosen[index]
        try:
            record = self._record(self.index.rows[number])
        except (IndexError, ValueError, TypeError) as error:
            raise _damaged(self.source, f"row {number}") from error
        if not (math.isfinite(record.duration_s) and record.duration_s > 0):
            raise _damaged(self.source, f"row {number}")
        return record

    def _record(self, row: np.void) -> ShardRecord:
        header = self.index.header
        shard = header["shards"][int(row["shard"])]
        path = self.source.parent / shard["name"]
        return ShardRecord(
            path=path / key_of(row),
            label=int(self._label_map[max(row["label"], -1)]),  # -1 is the last entry of the map
            start_s=0.0,
            end_s=float(row["duration_s"]),
            shard=path,
            shard_bytes=shard["bytes"],
            codec=header["codec"],
            fps=header["fps"],
            gop=header["gop"],
            height=int(row["height"]),
            width=int(row["width"]),
            duration_s=float(row["duration_s"]),
            decoder=bytes.fromhex(header["decoders"][int(row["decoder"])]),
            video_at=int(row["video_at"]),
            frame_offsets=self.index.frame_offsets(row),
            sound_at=int(row["sound_at"]),
            samples=int(row["samples"]),
        )


@functools.cache
def _warn_once(message: str) -> None:
    # Every loader of a run looks at the shards.
    logging.getLogger(__name__).warning(message)


def _require_header(source: Path, header: Mapping[str, Any]) -> None:
    """The header must say all that records are read with, and name shards beside the index."""
    try:
        numbers = [header["fps"], header["gop"], header["short_side"]]
        numbers += [shard["bytes"] for shard in header["shards"]]
        names = [shard["name"] for shard in header["shards"]]
        texts = [*header["classes"], *header["decoders"], header["codec"], *names]
        ok = all(type(x) in (int, float) and 0 < x < 2**62 for x in numbers)
        ok = ok and isinstance(header["gop"], int)
        ok = ok and all(isinstance(header[n], list) for n in ("shards", "classes", "decoders"))
        ok = ok and all(isinstance(text, str) for text in texts)
        ok = ok and all(re.fullmatch(r"[\w-]+\.tar", name, re.ASCII) for name in names)
    except (KeyError, TypeError):
        ok = False
    if not ok:
        raise _damaged(source, "the header")


def _require_labels(source: Path, index: Index) -> None:
    """Every label of the index must be one of its classes."""
    flat, ends = index.labels
    ok = not len(flat) or 0 <= flat.min() <= flat.max() < len(index.header["classes"])
    ok = ok and (np.diff(ends, prepend=0) >= 0).all() and ends[-1] == len(flat)
    if not ok:
        raise _damaged(source, "the list of labels")


def _damaged(source: Path, what: str) -> ManifestError:
    return ManifestError(f"{source} is damaged: {what} is not as it was packed; see `avmae verify`")
