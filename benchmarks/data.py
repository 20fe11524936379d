"""What a clip costs one core: raw mp4 by each reader, packed clips, and webdataset beside them.

Every candidate returns the same windows: 16 pictures an eighth of a second apart from a random
start, uint8 RGB, the middle 224 x 224 of a short side of 256, half of the windows mirrored; and
10 s of the sound from the same moment on, round the end, as 16 kHz mono int16. All but webdataset
are what a worker of the loader runs. They take turns in one process on one core, and processor time
is counted, so that other work on the machine disturbs less and all alike; a ratio is the median
over the rounds. `webdataset` streams a tar of the raw files and decodes them by PyAV as its users
do. `_planes` leave pictures as yuv420, half the bytes, which the GPU makes RGB.
"""

import argparse
import io
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.audio.resampler import AudioResampler
from av.video.reformatter import VideoReformatter

from avmae_fast.config import ConfigError
from avmae_fast.data.clip import AUDIO_RATE_HZ, Pixels
from avmae_fast.data.manifest import Manifest, load_manifest
from avmae_fast.data.order import DRAWS
from avmae_fast.data.pack import pack
from avmae_fast.data.pack_clips import PackOptions
from avmae_fast.data.pictures import RgbPicture
from avmae_fast.data.readers import resolve_reader
from avmae_fast.data.samples import SampleSpec, cut_into, open_source
from avmae_fast.data.shard_encode import Codec
from avmae_fast.data.windows import crop_corner, random_start, sound_start
from avmae_kernels.yuv import i420_to_rgb
from benchmarks import harness
from benchmarks.data_clips import SECONDS, write_clips

FPS, FRAMES, SHORT_SIDE, CROP = 8, 16, 256, 224
SAMPLES = SECONDS * AUDIO_RATE_HZ
CODECS: tuple[Codec, ...] = ("h264", "mjpeg")

# How long one way works at a time, in seconds.
_SAMPLE_S = 0.25

Window = tuple[np.ndarray, np.ndarray]


def draws(count: int) -> np.ndarray:
    """`DRAWS` numbers a clip, as the loader has them; the crop is the middle, even in planes."""
    drawn = np.random.default_rng(0).random((count, DRAWS))
    drawn[:, 1:3] = 0.5
    return drawn


def spec_of(reader: str, pixels: Pixels) -> SampleSpec:
    return SampleSpec(
        frames=FRAMES,
        crop=(CROP, CROP),
        samples=SAMPLES,
        fps=FPS,
        stride=1,
        short_side=SHORT_SIDE,
        flip=True,
        clip_end="wrap",
        missing_audio="substitute",
        reader=reader,
        pixels=pixels,
    )


@cache
def slot(picture: tuple[int, ...]) -> Window:
    """Memory for one window, used again and again, as that of the loader's ring is."""
    return np.empty((FRAMES, *picture), np.uint8), np.empty(SAMPLES, np.int16)


def by_loader(manifest: Manifest, reader: str, pixels: Pixels = "rgb") -> Iterator[Window]:
    """The windows as a worker of the loader makes them, from media files or from shards."""
    spec = spec_of(reader, pixels)
    video, sound = slot(spec.picture)
    for record, drawn in zip(manifest, draws(len(manifest)), strict=True):
        with open_source(record, spec) as source:
            cut_into(source, spec, drawn[None], video[None], sound[None])
        yield video, sound


def by_webdataset(tar: Path, count: int) -> Iterator[Window]:
    """The windows as a webdataset pipeline decodes them: frames in turn until the last wanted."""
    import webdataset

    video, sound = slot((CROP, CROP, 3))
    dataset = webdataset.WebDataset(str(tar), shardshuffle=False)
    for sample, (u_start, u_top, u_left, u_flip) in zip(dataset, draws(count), strict=True):
        start = random_start(u_start, SECONDS * FPS, FRAMES, 1)
        with av.open(io.BytesIO(sample["mp4"])) as container:
            pictures = _frames(container, start / FPS)
        for row, picture in zip(video, pictures, strict=True):
            top, left = crop_corner(picture.shape, (CROP, CROP), u_top, u_left)
            RgbPicture(picture).write(row, top, left, u_flip < 0.5)
        with av.open(io.BytesIO(sample["mp4"])) as container:
            sound[:] = np.roll(_sound(container), -sound_start(start, FPS))
        yield video, sound


def _frames(container: Any, start_s: float) -> list[np.ndarray]:
    stream = container.streams.video[0]
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1
    times_s = list(start_s + np.arange(FRAMES) / FPS)
    reformatter = VideoReformatter()
    pictures: list[np.ndarray] = []
    shown: Any = None
    for frame in container.decode(stream):
        while len(pictures) < FRAMES and times_s[len(pictures)] < frame.time - 1e-3:
            rgb = reformatter.reformat(shown, format="rgb24", threads=1)
            pictures.append(rgb.to_ndarray())
        if len(pictures) == FRAMES:
            break
        shown = frame
    while len(pictures) < FRAMES:
        pictures.append(reformatter.reformat(shown, format="rgb24", threads=1).to_ndarray())
    return pictures


def _sound(container: Any) -> np.ndarray:
    resampler = AudioResampler(format="s16", layout="mono", rate=AUDIO_RATE_HZ)
    blocks = []
    for frame in container.decode(audio=0):
        blocks += resampler.resample(frame)
    blocks += resampler.resample(None)
    sound = np.concatenate([block.to_ndarray()[0] for block in blocks])[:SAMPLES]
    return np.pad(sound, (0, SAMPLES - len(sound)))


def candidates(folder: Path, count: int) -> dict[str, Callable[[], Iterator[Window]]]:
    """Name and windows of each way to read the clips in `folder`, those not installed left out."""
    paths = write_clips(folder, count)
    raw = load_manifest(folder / "clips.csv")
    found: dict[str, Callable[[], Iterator[Window]]] = {}
    for reader in ("pyav", "torchcodec", "decord"):
        try:
            resolve_reader(reader)
        except ConfigError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        found[f"raw_{reader}"] = partial(by_loader, raw, reader)
    for codec in CODECS:
        pack(folder / "clips.csv", folder / codec, PackOptions(codec=codec), jobs=1)
        packed = load_manifest(folder / codec)
        found[f"packed_{codec}"] = partial(by_loader, packed, "pyav")
        found[f"packed_{codec}_planes"] = partial(by_loader, packed, "pyav", "yuv420")
    with tarfile.open(folder / "raw.tar", "w") as tar:
        for path in paths:
            tar.add(path, path.name)
    found["webdataset"] = partial(by_webdataset, folder / "raw.tar", count)
    return found


def kept(way: Callable[[], Iterator[Window]]) -> list[Window]:
    """The windows of a way, which writes them all to one place; planes as RGB."""
    return [(_as_rgb(video), sound.copy()) for video, sound in way()]


def _as_rgb(video: np.ndarray) -> np.ndarray:
    if video.ndim == 4:
        return video.copy()
    return i420_to_rgb(torch.from_numpy(video)[None])[0].numpy()


def check(name: str, windows: list[Window], wanted: list[Window]) -> float:
    """Mean difference of the pictures in levels; a fast wrong answer must not become a number."""
    differences = []
    for (video, sound), (expected, heard) in zip(windows, wanted, strict=True):
        if video.shape != expected.shape or sound.shape != heard.shape:
            raise harness.BenchmarkError(f"{name} gives {video.shape} and {sound.shape}")
        differences.append(float(np.abs(video.astype(np.int16) - expected).mean()))
        noise = np.abs(sound.astype(np.int32) - heard).mean()
        if differences[-1] > 4 or noise > 0.05 * np.abs(heard.astype(np.int32)).mean() + 2:
            raise harness.BenchmarkError(
                f"{name} gives other windows: pictures differ by {differences[-1]:.1f} levels, "
                f"sound by {noise:.1f}"
            )
    return float(np.mean(differences))


@contextmanager
def _one_core() -> Iterator[None]:
    """Keep this process on one core, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with _one_core(), tempfile.TemporaryDirectory() as folder:
        ways = candidates(Path(folder), args.clips)
        expected = kept(ways["raw_pyav"])
        result: dict[str, Any] = {"clips": args.clips, "rounds": args.rounds}
        for name, way in ways.items():
            result[f"difference_{name}"] = check(name, kept(way), expected)
        kilobytes: dict[str, int] = {
            "raw": sum(path.stat().st_size for path in Path(folder).glob("*.mp4")),
        }
        for codec in CODECS:
            shards = Path(folder, codec).glob("*.tar")
            kilobytes[codec] = sum(path.stat().st_size for path in shards)
        seconds = time_rounds(ways, args.rounds)
    for name, times in seconds.items():
        result[f"ms_{name}"] = float(np.median(times)) / args.clips * 1e3
        ratio = float(np.median(seconds["raw_pyav"] / times))
        result[f"ratio_{name.removeprefix('packed_')}"] = ratio
    for name, size in kilobytes.items():
        result[f"kilobytes_{name}"] = size / args.clips / 1e3
    result["load"] = os.getloadavg()[0]
    return result


def time_rounds(
    ways: dict[str, Callable[[], Iterator[Window]]], rounds: int
) -> dict[str, np.ndarray]:
    """Processor seconds that each way takes for all windows, in each round, all ways in turn.

    A way goes over them as often as fits into `_SAMPLE_S`: caches are its own then.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start, passes, elapsed = time.process_time(), 0, 0.0
            while elapsed < _SAMPLE_S:
                for _ in way():
                    pass
                passes, elapsed = passes + 1, time.process_time() - start
            seconds[name].append(elapsed / passes)
    return {name: np.array(values) for name, values in seconds.items()}


def main(argv: list[str] | None = None) -> int:
    options = harness.parser(__doc__ or "")
    options.add_argument("--clips", type=int, default=16, help="how many clips to make (16)")
    options.add_argument("--rounds", type=int, default=9, help="how often each way is timed (9)")
    return harness.run(options, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
