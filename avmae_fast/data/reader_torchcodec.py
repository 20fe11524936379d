"""The reader on torchcodec: exact seek mode, because the approximate one errs on foreign files.

It needs FFmpeg's shared libraries, which its wheel does not hold. Of a file whose end is missing
it reports the length that is left, so the header's length is asked for here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from torchcodec.decoders import AudioDecoder, VideoDecoder

from avmae_fast.data.clip import (
    AUDIO_RATE_HZ,
    SOUND_FROM_START_S,
    SOUND_PREROLL_S,
    TIME_TOLERANCE_S,
    ClipError,
    ClipInfo,
    ErrorKind,
    Picture,
    Placed,
    Size,
    check_times,
    place,
    placed,
    require_reached,
    resize,
    stacked,
    to_int16,
)
from avmae_fast.data.media import open_source
from avmae_fast.data.pictures import RgbPicture
from avmae_fast.data.stages import stage

_Decoder = TypeVar("_Decoder", VideoDecoder, AudioDecoder)

# Decoded at once: keeps the memory of a long list of large pictures bounded.
_CHUNK = 16


class TorchcodecReader:
    """One open file, read through torchcodec; see `ClipReader`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._video = self._open(VideoDecoder, dimension_order="NHWC", num_ffmpeg_threads=1)
        # Each channel is resampled by itself; the mean is taken here, as by every reader.
        self._audio = self._open(AudioDecoder, sample_rate=AUDIO_RATE_HZ)
        self._heard = False
        clock = self._video or self._audio
        if clock is None:
            raise ClipError("no_video", path, "neither a video nor an audio track")
        self._zero_s = float(clock.metadata.begin_stream_seconds or 0.0)
        length_s = clock.metadata.duration_seconds_from_header or clock.metadata.duration_seconds
        if not length_s:
            raise ClipError("decode", path, "the header gives no duration")
        picture = self._video.metadata if self._video else None
        self.info = ClipInfo(
            duration_s=float(length_s),
            height=picture.height or 0 if picture else 0,
            width=picture.width or 0 if picture else 0,
            fps=float(picture.average_fps_from_header or 0) if picture else 0.0,
            video_codec=picture.codec or "unknown" if picture else "",
            audio_rate_hz=self._audio.metadata.sample_rate or 0 if self._audio else 0,
        )

    def _open(self, decoder: type[_Decoder], **options: Any) -> _Decoder | None:
        """The decoder of a kind of stream; None where the file has no such stream."""
        with self._errors("open"):
            try:
                return decoder(open_source(self._path), **options)
            except (ValueError, RuntimeError) as error:
                if "no specified stream" in str(error):
                    return None
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        # torchcodec closes its file when the decoder is collected.
        self._video = self._audio = None

    @contextmanager
    def _errors(self, kind: ErrorKind) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise ClipError(kind, self._path, str(error).strip()) from error

    def read_video(self, times_s: NDArray[np.float64], size: Size) -> NDArray[np.uint8]:
        """The pictures on display at `times_s`, as one array; see `ClipReader`."""
        return stacked(self.read_pictures(times_s, size), len(times_s))

    def read_pictures(self, times_s: NDArray[np.float64], size: Size) -> Iterator[Placed]:
        """The pictures on display at `times_s`, as they are decoded; see `ClipReader`."""
        check_times(times_s)
        if self._video is None:
            raise ClipError("no_video", self._path, "there is no video track")
        if times_s.size == 0:
            return
        # The last picture has no time at which torchcodec would show it to the end.
        end_s = float(self._video.metadata.end_stream_seconds or 0.0)
        wanted_s, shown = np.unique(times_s + self._zero_s + TIME_TOLERANCE_S, return_inverse=True)
        last_s = float(wanted_s[-1]) - self._zero_s - TIME_TOLERANCE_S
        require_reached(self._path, "video", last_s, self.info.duration_s, end_s - self._zero_s)
        inside = wanted_s[wanted_s < end_s]
        pictures: list[Picture] = []
        with self._errors("decode"):
            for first in range(0, len(inside), _CHUNK):
                asked_s = inside[first : first + _CHUNK]
                batch = self._video.get_frames_played_at(asked_s.tolist())
                if (batch.pts_seconds.numpy() > asked_s).any():
                    # Seen in MPEG-TS and in files cut without re-encoding.
                    raise ClipError("decode", self._path, "torchcodec missed its way after a seek")
                with stage("convert"):
                    pictures += [RgbPicture(resize(p, size)) for p in batch.data.numpy()]
            if len(inside) < len(wanted_s):
                last = self._video.get_frame_at(len(self._video) - 1).data.numpy()
                pictures += [RgbPicture(resize(last, size))] * (len(wanted_s) - len(inside))
        yield from placed(pictures, shown)

    def read_audio(self, start: int, samples: int) -> NDArray[np.int16]:
        """16 kHz samples from number `start` of the clip's clock on; see `ClipReader`."""
        if self._audio is None:
            raise ClipError("no_audio", self._path, "there is no audio track")
        audio, header = self._audio, self._audio.metadata
        begin_s = float(header.begin_stream_seconds_from_header or 0.0)
        length_s = header.duration_seconds_from_header
        first_s = start / AUDIO_RATE_HZ + self._zero_s
        wanted_s = first_s + samples / AUDIO_RATE_HZ
        out = np.zeros(samples, np.int16)
        if wanted_s <= begin_s or (length_s and first_s >= begin_s + length_s):
            return out
        with self._errors("decode"):
            if self._heard:
                # A decoder keeps some state over a seek (AAC: its noise generator), so that only
                # a fresh one gives every read the same samples.
                audio = AudioDecoder(open_source(self._path), sample_rate=AUDIO_RATE_HZ)
            self._heard = True
            # Read in the middle, some codecs come out 1.5 ms late; read from the start, none does.
            from_start = first_s <= SOUND_FROM_START_S
            from_s = begin_s if from_start else first_s - SOUND_PREROLL_S
            block = audio.get_samples_played_in_range(from_s, wanted_s)
        sound = to_int16(block.data.mean(dim=0).numpy())
        at = round((block.pts_seconds - self._zero_s) * AUDIO_RATE_HZ) - start
        if length_s:
            reached_s = block.pts_seconds + sound.size / AUDIO_RATE_HZ - self._zero_s
            promised_s = begin_s + length_s - self._zero_s
            require_reached(self._path, "sound", wanted_s - self._zero_s, promised_s, reached_s)
        place(out, at, sound)
        return out
