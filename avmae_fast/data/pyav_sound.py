"""Sound through PyAV: decoded blocks are placed by their timestamps, mixed to mono, resampled."""

from math import gcd
from typing import Any

import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer
from numpy.typing import NDArray

from avmae_fast.data.clip import (
    AUDIO_RATE_HZ,
    SOUND_FROM_START_S,
    SOUND_PREROLL_S,
    ClipError,
    place,
    require_reached,
    to_int16,
)
from avmae_fast.data.pyav_guard import Guard, frames_of, seek

# Timestamps that stray less than this from the count of samples are rounding, not a gap.
_JITTER_S = 0.02

# How far around a window the resampling filter looks, in 16 kHz samples: four times its length.
_MARGIN = 320
_RESAMPLE_BLOCK = 16384


class Sound:
    """The audio stream of an open container.

    zero_s: where the clip's clock starts, in the container's time.
    promised_end_s: where the header says that the stream ends, on the clip's clock.
    """

    def __init__(
        self,
        guard: Guard,
        container: InputContainer,
        stream: AudioStream,
        zero_s: float,
        promised_end_s: float | None,
    ) -> None:
        assert stream.time_base is not None
        self._guard = guard
        self._container = container
        self._stream = stream
        self._rate = stream.rate
        self._tick_s = float(stream.time_base)
        self._zero_s = zero_s
        self._promised_end_s = promised_end_s

    def read(self, start: int, samples: int) -> NDArray[np.int16]:
        """`samples` mono samples of the 16 kHz clock from number `start` on, zero outside."""
        # Stored and 16 kHz samples coincide every `grid` ones. Starting there makes a sample the
        # same whatever the window it is read in.
        common = gcd(self._rate, AUDIO_RATE_HZ)
        grid, stored_grid = AUDIO_RATE_HZ // common, self._rate // common
        margin = _MARGIN if self._rate != AUDIO_RATE_HZ else 0
        first = (start - margin) // grid * grid
        count = -(-(start + samples + margin - first) * stored_grid // grid)
        end_s = (start + samples) / AUDIO_RATE_HZ
        with self._guard.errors("decode"):
            stored = self._read_stored(first // grid * stored_grid, count, end_s)
            resampled = _resample(stored, self._rate) if self._rate != AUDIO_RATE_HZ else stored
        return to_int16(resampled[start - first : start - first + samples])

    def _read_stored(self, first: int, count: int, end_s: float) -> NDArray[np.float32]:
        """`count` mono samples at the stored rate from number `first` of the clip's clock on.

        The track must reach `end_s` if its header says so.
        """
        from_start = first <= SOUND_FROM_START_S * self._rate
        # Aim before the start for the start: the packet that primes the decoder precedes it.
        target_s = (0.0 if from_start else first / self._rate) + self._zero_s - SOUND_PREROLL_S
        seek(self._container, self._stream, round(target_s / self._tick_s))

        out = np.zeros(count, np.float32)
        scale, zero = self._tick_s * self._rate, self._zero_s * self._rate
        position: int | None = None  # of the next sample, on the clip's clock
        for frame in frames_of(self._container, self._stream):
            self._guard.check_time()
            sound = _mono(frame)
            stamped = 0 if frame.pts is None else round(frame.pts * scale - zero)
            if position is None or (
                frame.pts is not None and abs(stamped - position) > _JITTER_S * self._rate
            ):
                position = stamped
            place(out, position - first, sound)
            position += sound.size
            if position >= first + count:
                return out
        if position is None and from_start:
            raise ClipError("no_audio", self._guard.path, "the audio track is empty")
        if self._promised_end_s is not None:
            reached_s = (first if position is None else position) / self._rate
            require_reached(self._guard.path, "sound", end_s, self._promised_end_s, reached_s)
        return out


def _mono(frame: AudioFrame) -> NDArray[np.float32]:
    """The mean of the channels, float32 [samples] in [-1, 1)."""
    channels = len(frame.layout.channels)
    if frame.format.name == "fltp":  # what AAC, MP3 and Opus decode to; to_ndarray costs twice this
        planes = [np.frombuffer(memoryview(p), np.float32, frame.samples) for p in frame.planes]
        return planes[0] if channels == 1 else np.add.reduce(planes) / np.float32(channels)
    data: NDArray[Any] = frame.to_ndarray()
    if frame.format.is_packed:
        data = data.reshape(-1, channels).T
    sound = data.astype(np.float32)
    if data.dtype == np.uint8:
        sound = (sound - np.float32(128)) / np.float32(128)
    elif data.dtype.kind == "i":
        sound /= np.float32(2.0 ** (8 * data.dtype.itemsize - 1))
    return sound.mean(axis=0, dtype=np.float32)


def _resample(sound: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """Sound of `rate` Hz at 16 kHz; sample 0 keeps its time."""
    resampler = AudioResampler(format="fltp", layout="mono", rate=AUDIO_RATE_HZ)
    blocks: list[AudioFrame] = []
    for first in range(0, sound.size, _RESAMPLE_BLOCK):
        block = sound[None, first : first + _RESAMPLE_BLOCK]
        frame = AudioFrame.from_ndarray(block, format="fltp", layout="mono")
        frame.sample_rate = rate
        blocks += resampler.resample(frame)
    blocks += resampler.resample(None)
    return np.concatenate([block.to_ndarray()[0] for block in blocks])
