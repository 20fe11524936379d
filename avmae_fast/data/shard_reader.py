"""Read packed clips: one `pread` for the coded pictures of a window, one for its sound.

Pictures go to the decoder as the index bounds them, so no container is parsed; decoders and open
shards are kept for the life of the process, which is one of the loader's workers.
"""

from collections.abc import Iterator
from typing import Self

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from avmae_fast.data.clip import (
    AUDIO_RATE_HZ,
    TIME_TOLERANCE_S,
    ClipError,
    ClipInfo,
    Picture,
    Pixels,
    Placed,
    Size,
    check_times,
    place,
    resized_shape,
    stacked,
)
from avmae_fast.data.pictures import (
    PlanesPicture,
    RgbPicture,
    YuvPicture,
    picture_of,
    resized,
)
from avmae_fast.data.pyav_guard import Guard
from avmae_fast.data.shard_decode import h264_pictures, jpeg_frame, jpeg_rgb
from avmae_fast.data.shard_file import open_shard
from avmae_fast.data.shard_manifest import ShardRecord
from avmae_kernels.jpeg import JpegDecoder

_reformatter = VideoReformatter()


class ShardReader:
    """One packed clip; see `ClipReader`."""

    def __init__(self, record: ShardRecord, pixels: Pixels = "rgb") -> None:
        self._record = record
        self._pixels = pixels
        self._guard = Guard(record.path)
        self._shard = open_shard(record.shard, record.shard_bytes, record.path)
        self.info = ClipInfo(
            duration_s=record.duration_s,
            height=record.height,
            width=record.width,
            fps=record.fps,
            video_codec=record.codec,
            audio_rate_hz=AUDIO_RATE_HZ if record.samples else 0,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing to do: the shard stays open for the next record."""

    def read_video(self, times_s: NDArray[np.float64], size: Size) -> NDArray[np.uint8]:
        """The pictures on display at `times_s`, as one array; see `ClipReader`."""
        return stacked(self.read_pictures(times_s, size), len(times_s))

    def read_pictures(self, times_s: NDArray[np.float64], size: Size) -> Iterator[Placed]:
        """The pictures on display at `times_s`, as they are decoded; see `ClipReader`."""
        check_times(times_s)
        if times_s.size == 0:
            return
        record = self._record
        numbers = np.floor((times_s + TIME_TOLERANCE_S) * record.fps).astype(np.int64)
        places: dict[int, list[int]] = {}
        last = len(record.frame_offsets) - 2
        for at, number in enumerate(numbers.tolist()):
            places.setdefault(min(number, last), []).append(at)
        with self._guard.errors("decode"):
            for number, picture in self._decode(sorted(places), size):
                yield places[number], picture

    def _decode(self, wanted: list[int], size: Size) -> Iterator[tuple[int, Picture]]:
        """Some pictures by their numbers, which are ascending."""
        if self._record.codec == "h264":
            for number, frame in self._h264_frames(wanted):
                self._require_shape(number, frame.height, frame.width)
                yield number, picture_of(frame, _reformatter, size, self._pixels)
            return
        decoder = JpegDecoder(self._record.height, self._record.width)
        for number, data in self._coded(wanted):
            yield number, self._of_jpeg(decoder, number, data, size)

    def _of_jpeg(self, decoder: JpegDecoder, number: int, data: bytes, size: Size) -> Picture:
        planes = decoder.decode(data)
        if self._pixels == "yuv420":
            shape = self._record.height, self._record.width
            if planes is not None and resized_shape(*shape, size) == shape:
                return PlanesPicture(planes, full=True)
            frame = jpeg_frame(data)
            self._require_shape(number, frame.height, frame.width)
            return picture_of(frame, _reformatter, size, self._pixels)
        if planes is not None:
            return resized(YuvPicture(planes, "bt601-full"), size)
        pixels = jpeg_rgb(data)
        self._require_shape(number, *pixels.shape[:2])
        return resized(RgbPicture(pixels), size)

    def _require_shape(self, number: int, height: int, width: int) -> None:
        record = self._record
        if (height, width) != (record.height, record.width):
            wanted = (record.height, record.width)
            detail = f"picture {number} is {(height, width)}, not {wanted}"
            raise ClipError("decode", record.path, detail)

    def _h264_frames(self, wanted: list[int]) -> Iterator[tuple[int, VideoFrame]]:
        """(number, frame) of each picture that is wanted; their numbers are ascending."""
        record, left = self._record, set(wanted)
        for number, frame in h264_pictures(self._coded(_up_to(wanted, record.gop)), record.decoder):
            if number in left:
                if frame.is_corrupt:
                    raise ClipError("decode", record.path, f"picture {number} is damaged")
                left.remove(number)
                yield number, frame
        if left:
            raise ClipError("decode", record.path, f"no picture {min(left)}")

    def _coded(self, numbers: list[int]) -> list[tuple[int, bytes]]:
        """(number, bytes) of some coded pictures, ascending, fetched by one read."""
        offsets = self._record.frame_offsets
        first = int(offsets[numbers[0]])
        count = int(offsets[numbers[-1] + 1]) - first
        data = self._shard.read(self._record.video_at + first, count, self._record.path)
        bounds = (offsets - first).tolist()
        return [(number, data[bounds[number] : bounds[number + 1]]) for number in numbers]

    def read_audio(self, start: int, samples: int) -> NDArray[np.int16]:
        """16 kHz samples from number `start` of the clip on; see `ClipReader`."""
        record = self._record
        if not record.samples:
            raise ClipError("no_audio", record.path, "there is no audio track")
        first, last = max(start, 0), min(start + samples, record.samples)
        if first >= last:
            return np.zeros(samples, np.int16)
        at, size = record.sound_at + 2 * first, 2 * (last - first)
        sound = self._shard.read_array(at, size, record.path).view("<i2")
        if sound.size == samples:
            return sound
        out = np.zeros(samples, np.int16)
        place(out, first - start, sound)
        return out


def _up_to(wanted: list[int], gop: int) -> list[int]:
    """The pictures to decode for those that are wanted: from each one's keyframe on."""
    ends = {number // gop * gop: number + 1 for number in wanted}  # the last of a group wins
    return [number for key in sorted(ends) for number in range(key, ends[key])]
