"""Clips for the data benchmark: like those that people train on after the usual 256-pixel resize.

340 x 256 at 25 pictures a second for 10 s, H.264 as FFmpeg encodes by default (preset medium, crf
23, a keyframe every 250 pictures), AAC in stereo at 44.1 kHz: about 0.3 MB each.
"""

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.video.reformatter import VideoReformatter

from avmae_fast.data.synth_render import make_room, render
from avmae_fast.data.synth_scene import Scene, make_scene
from avmae_fast.data.synth_sound import SAMPLE_RATE_HZ, make_sound

HEIGHT, WIDTH = 256, 340
FPS, SECONDS, GOP = 25, 10, 250
_X264 = {"preset": "medium", "crf": "23", "threads": "1"}
_RATE_HZ, _BITS_PER_S = 44100, 128_000


def write_clips(folder: Path, count: int) -> list[Path]:
    """Write some clips and a manifest of them, `clips.csv`; returns their paths."""
    paths = [folder / f"{index}.mp4" for index in range(count)]
    for index, path in enumerate(paths):
        scene = make_scene(0, index, index % 8, SECONDS)
        _write(path, _pictures(index, scene), make_sound(0, index, scene, SECONDS))
    (folder / "clips.csv").write_text("path\n" + "".join(f"{path.name}\n" for path in paths))
    return paths


def _pictures(index: int, scene: Scene) -> Iterator[np.ndarray]:
    """Square pictures of the scene without the upper and lower edges, a second at a time."""
    room = make_room(0, index, WIDTH)
    top = (WIDTH - HEIGHT) // 2
    for second in range(SECONDS):
        for picture in render(scene, room, second + np.arange(FPS) / FPS):
            yield np.ascontiguousarray(picture[top : top + HEIGHT])


def _write(path: Path, pictures: Iterator[np.ndarray], pcm: np.ndarray) -> None:
    to_yuv = VideoReformatter()
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        video = container.add_stream("libx264", rate=FPS, options=_X264)
        video.height, video.width, video.pix_fmt, video.gop_size = HEIGHT, WIDTH, "yuv420p", GOP
        audio = container.add_stream("aac", rate=_RATE_HZ, layout="stereo")
        audio.bit_rate = _BITS_PER_S
        for number, rgb in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame = to_yuv.reformat(frame, format="yuv420p", threads=1)
            frame.pts = number
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for block in _stereo(pcm):
            container.mux(audio.encode(block))
        container.mux(audio.encode(None))


def _stereo(pcm: np.ndarray) -> list[AudioFrame]:
    resampler = AudioResampler(format="fltp", layout="stereo", rate=_RATE_HZ)
    sound = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
    sound.sample_rate, sound.pts = SAMPLE_RATE_HZ, 0
    return resampler.resample(sound) + resampler.resample(None)
