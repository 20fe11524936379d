"""Pictures through PyAV: seek to the keyframe, decode what is needed, convert what is wanted.

The packets of the window are read first. Their timestamps say which pictures are on display at
the wanted times, and a picture that is neither on display nor referred to by another is skipped
inside the decoder: a third of the work on ordinary H.264, without a change in any other picture.
"""

from collections.abc import Iterator

import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from avmae_fast.data.clip import (
    TIME_TOLERANCE_S,
    ClipError,
    Picture,
    Pixels,
    Placed,
    Size,
    check_times,
    placed,
    require_reached,
)
from avmae_fast.data.pictures import picture_of
from avmae_fast.data.pyav_guard import Guard, packets_of, seek
from avmae_fast.data.stages import stage

# Wanted pictures further apart than this may be worth a seek.
_SEEK_GAP_S = 1.0

# FFmpeg's decoders that look at skip_frame before every packet (libdav1d looks once).
_SKIPPING_DECODERS = frozenset({"h264", "hevc", "vp9", "mpeg4", "mpeg2video"})


class Pictures:
    """The video stream of an open container.

    zero_s: where the clip's clock starts, in the container's time.
    promised_end_s: where the header says that the stream ends, on the clip's clock.
    pixels: what pictures are made of.
    """

    def __init__(
        self,
        guard: Guard,
        container: InputContainer,
        stream: VideoStream,
        zero_s: float,
        promised_end_s: float,
        pixels: Pixels,
    ) -> None:
        assert stream.time_base is not None
        self._guard = guard
        self._container = container
        self._stream = stream
        self._tick_s = float(stream.time_base)
        self._zero_s = zero_s
        self._promised_end_s = promised_end_s
        self._pixels = pixels
        self._reformatter = VideoReformatter()

    def read(self, times_s: NDArray[np.float64], size: Size) -> Iterator[Placed]:
        """The pictures on display at `times_s` seconds; see `ClipReader`."""
        check_times(times_s)
        if times_s.size == 0:
            return
        ticks = np.floor((times_s + self._zero_s + TIME_TOLERANCE_S) / self._tick_s)
        wanted, shown = np.unique(ticks.astype(np.int64), return_inverse=True)
        pictures: list[Picture] = []
        with self._guard.errors("decode"):
            for run in self._runs(wanted):
                pictures += self._read_run(run, size)
        if len({picture.shape for picture in pictures}) > 1:
            raise ClipError("decode", self._guard.path, "the picture size changes in the clip")
        yield from placed(pictures, shown)

    def _runs(self, wanted: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Split the wanted timestamps where a seek saves decoding: at gaps with a keyframe."""
        index = self._stream.index_entries
        cuts = []
        for i in np.flatnonzero(np.diff(wanted) * self._tick_s > _SEEK_GAP_S) + 1:
            keyframe = index.search_timestamp(int(wanted[i])) if len(index) else -1
            if keyframe >= 0 and index[keyframe].timestamp > wanted[i - 1]:
                cuts.append(i)
        return np.split(wanted, cuts)

    def _read_run(self, wanted: NDArray[np.int64], size: Size) -> list[Picture]:
        """The pictures on display at `wanted` (ascending), decoded from one keyframe on."""
        first, last = int(wanted[0]), int(wanted[-1])
        packets, ended = self._packets(first, last)
        needed = None
        if self._stream.codec_context.codec.name in _SKIPPING_DECODERS:
            needed = _on_display(packets, wanted)
        pictures, shown = self._convert(packets, wanted, needed, size)
        if needed is not None and set(shown) != needed:
            # Undecodable pictures: what is on display then is only known after decoding all.
            packets, ended = self._packets(first, last)
            pictures, shown = self._convert(packets, wanted, None, size)
        if ended:
            until = max(shown) + shown[max(shown)]
            wanted_s, end_s = (tick * self._tick_s - self._zero_s for tick in (last, until))
            require_reached(self._guard.path, "video", wanted_s, self._promised_end_s, end_s)
        return pictures

    def _packets(self, first: int, last: int) -> tuple[list[Packet], bool]:
        """Packets from a keyframe shown no later than `first` on until all up to `last` are in.

        Returns the packets and whether the stream ended with them.
        """
        target, step_s, landed = first, 1.0, None
        while True:
            seek(self._container, self._stream, target)
            packets, ended = self._demux(last)
            start = next((i for i, packet in enumerate(packets) if packet.is_keyframe), None)
            if start is not None:
                shown = packets[start].pts
                if shown is not None and shown <= first:
                    return packets[start:], ended
            before, landed = landed, packets[0].dts if packets else None
            if target <= (self._stream.start_time or 0) or (packets and landed == before):
                # The start of the stream: its first picture stands in for what precedes it.
                return packets, ended
            # A seek may land on a picture that is decoded before `first` but shown after it.
            target -= round(step_s / self._tick_s)
            step_s *= 4

    def _demux(self, last: int) -> tuple[list[Packet], bool]:
        packets: list[Packet] = []
        for packet in packets_of(self._container, self._stream):
            self._guard.check_time()
            if packet.size == 0 and packet.dts is None:
                return packets, True  # what PyAV sends at the end of the file
            packets.append(packet)
            # Nothing that is decoded from here on is shown by `last`.
            if packet.dts is not None and packet.dts > last:
                return packets, False
        return packets, True

    def _convert(
        self, packets: list[Packet], wanted: NDArray[np.int64], needed: set[int] | None, size: Size
    ) -> tuple[list[Picture], dict[int, int]]:
        """The picture at each wanted timestamp; timestamp and duration of each one shown."""
        pictures: list[Picture] = []
        shown: dict[int, int] = {}
        for frame in self._select(packets, wanted, needed):
            assert frame.pts is not None
            with stage("convert"):
                pictures.append(pictures[-1] if frame.pts in shown else self._picture(frame, size))
            shown[frame.pts] = frame.duration or 0
        return pictures, shown

    def _select(
        self, packets: list[Packet], wanted: NDArray[np.int64], needed: set[int] | None
    ) -> Iterator[VideoFrame]:
        """The frame on display at each wanted timestamp, of the frames that can be decoded."""
        shown: VideoFrame | None = None
        last_needed = max(needed) if needed else None
        count = 0
        for frame in self._decode(packets, needed):
            self._guard.check_time()
            if frame.pts is None:  # AVI stores no presentation times
                frame.pts = frame.dts
            if frame.pts is None:
                raise ClipError("decode", self._guard.path, "a picture has no timestamp")
            while count < len(wanted) and wanted[count] < frame.pts:
                yield shown or frame
                count += 1
            shown = frame
            if count == len(wanted) or frame.pts == last_needed:
                break
        if shown is None:
            raise ClipError("decode", self._guard.path, "no picture could be decoded")
        yield from [shown] * (len(wanted) - count)

    def _decode(self, packets: list[Packet], needed: set[int] | None) -> Iterator[VideoFrame]:
        context = self._stream.codec_context
        for packet in packets:
            skip = needed is not None and packet.pts not in needed
            context.skip_frame = "NONREF" if skip else "DEFAULT"
            yield from context.decode(packet)
        yield from context.decode(None)

    def _picture(self, frame: VideoFrame, size: Size) -> Picture:
        """The frame as an upright picture of the wanted size."""
        if frame.is_corrupt:
            raise ClipError("decode", self._guard.path, "a damaged picture")
        if frame.rotation % 90:
            raise ClipError("decode", self._guard.path, f"rotated by {frame.rotation} degrees")
        return picture_of(frame, self._reformatter, size, self._pixels)


def _on_display(packets: list[Packet], wanted: NDArray[np.int64]) -> set[int] | None:
    """Timestamps of the pictures on display at `wanted`; None where packets do not tell."""
    known = sorted(packet.pts for packet in packets if packet.pts is not None)
    if not known or len(known) < len(packets) or known[0] > wanted[0]:
        return None
    return {known[i] for i in np.searchsorted(known, wanted, side="right") - 1}
