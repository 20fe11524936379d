"""One clip as an mp4 file, H.264 and AAC, the same bytes every time."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

# One thread: the output of x264 depends on how many there are. No macroblock tree: with AVX-512 and
# small frames its bytes differ from run to run (x264 core 165; not with AVX2 or plain C).
_X264 = {"preset": "veryfast", "crf": "20", "threads": "1", "mbtree": "0"}
_GOP_S = 2
# The default coder takes 40 ms for 4 s of sound, this one 8 (one core of Zen 5).
_AAC = {"aac_coder": "fast"}
_AAC_BITS_PER_S = 64_000


def write_mp4(
    path: Path, frames: Iterator[np.ndarray], pcm: np.ndarray, *, fps: int, sample_rate_hz: int
) -> None:
    """Write frames (uint8 [H, W, 3], even sides) and mono sound (int16 [L]) as an mp4 file.

    The index comes first ("faststart") and no date is recorded, so equal input gives equal bytes
    on one machine with one FFmpeg.
    """
    first = next(frames)
    to_yuv = VideoReformatter()
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        video = container.add_stream("libx264", rate=fps, options=_X264)
        video.height, video.width = first.shape[:2]
        video.pix_fmt = "yuv420p"
        video.gop_size = _GOP_S * fps
        audio = container.add_stream("aac", rate=sample_rate_hz, layout="mono", options=_AAC)
        audio.bit_rate = _AAC_BITS_PER_S
        for index, rgb in enumerate(chain([first], frames)):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame = to_yuv.reformat(frame, format="yuv420p", threads=1)
            frame.pts = index
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
        sound.sample_rate, sound.pts = sample_rate_hz, 0
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
