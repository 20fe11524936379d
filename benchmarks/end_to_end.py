"""From files on disk to updated weights: what a user waits for.

B+ trains from an ordinary DataLoader whose workers decode each clip, resize, crop, and take the
log-mel; the engine trains from `ClipLoader`, on the same media files and on packed shards where
`avmae_fast.data.pack` exists. All with the same number of worker processes. Files are read once
before, so that a cold disk cache hits nobody.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from avmae_fast.config import Config, DataConfig, ModelConfig, TrainConfig
from avmae_fast.data.loader import Batch, ClipLoader
from avmae_fast.data.manifest import load_manifest
from avmae_fast.data.readers import read_clip
from avmae_fast.data.windows import waveform_samples
from avmae_kernels.logmel import log_mel
from benchmarks import device as devices
from benchmarks import results
from benchmarks.harness import BenchmarkError
from benchmarks.step_rows import EngineRow, RivalRow, Row
from benchmarks.workload import DATASETS, SIZES, HostBatch, Workload

_FPS = 25.0
PACKED = ("h264", "mjpeg")


class OrdinaryClips(Dataset[tuple[Tensor, Tensor]]):
    """Clips as most people read them: one file an item, everything done by the worker."""

    def __init__(self, manifest: Path, model: ModelConfig, stride: int, short_side: int) -> None:
        self.paths = [record.path for record in load_manifest(manifest)]
        self.model, self.stride, self.short_side = model, stride, short_side

    def __len__(self) -> int:
        return 2**31  # epoch after epoch

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """uint8 frames [T, H, W, 3] and standardised log-mel [rows, bins] of a random window."""
        video, audio = self.model.video, self.model.audio
        assert video is not None and audio is not None
        draw = np.random.default_rng(index)
        start_s = draw.random()
        times_s = start_s + np.arange(video.frames) * self.stride / _FPS
        samples = waveform_samples(audio.frames)
        path = self.paths[index % len(self.paths)]
        clip = read_clip(path, times_s, (start_s, samples), size=self.short_side)
        top = draw.integers(clip.video.shape[1] - video.height + 1)
        left = draw.integers(clip.video.shape[2] - video.width + 1)
        frames = clip.video[:, top : top + video.height, left : left + video.width]
        mel = (log_mel(torch.from_numpy(clip.waveform)[None], audio.mel_bins) - audio.mean)[0]
        return torch.from_numpy(np.ascontiguousarray(frames)), mel / audio.std


def ordinary_batches(args: argparse.Namespace, work: Workload, manifest: Path) -> Iterator[Batch]:
    """Batches of `OrdinaryClips`; `Batch.waveform` holds the log-mel."""
    dataset = OrdinaryClips(manifest, work.model, args.stride, args.short_side)
    loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
        dataset,
        batch_size=work.batch,
        num_workers=args.workers,
        pin_memory=work.device.type == "cuda",
        persistent_workers=args.workers > 0,
        multiprocessing_context="spawn" if args.workers else None,
    )
    for number, (frames, mel) in enumerate(loader):
        keys = torch.arange(work.batch) + number * work.batch
        yield Batch(frames, mel, keys, -torch.ones_like(keys), torch.ones_like(keys).bool())


@dataclasses.dataclass(frozen=True)
class OrdinaryBatch(HostBatch):
    """A host batch whose sound is log-mel already."""

    @property
    def mel(self) -> Tensor:
        assert self.clips.waveform is not None
        return self.clips.waveform


def engine_batches(args: argparse.Namespace, work: Workload, manifest: Path) -> ClipLoader:
    """The project's loader on media files or on a packed folder."""
    data = DataConfig(
        manifest=manifest, stride=args.stride, short_side=args.short_side, workers=args.workers
    )
    train = TrainConfig(out=Path("unused"), batch=work.batch, steps=1)
    return ClipLoader(Config(model=work.model, data=data, train=train))


def measure(args: argparse.Namespace, result: results.Result, deadline: results.Deadline) -> None:
    if args.steps < 1 or args.workers < 0:
        raise BenchmarkError(
            f"--steps wants 1 or more and --workers 0 or more, got {args.steps} and {args.workers}"
        )
    batch = 2 if args.tiny else args.batch
    work = Workload(args.model, args.dataset, batch, result.device, args.tiny, 0, args.compiler)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="avmae-bench-")))
        manifest = args.manifest or _clips(folder / "clips", args)
        for record in load_manifest(manifest):
            Path(record.path).read_bytes()
        for name, start in _rows(args, work, manifest, folder).items():
            _row(name, start, args, result, deadline, work)


Start = Callable[[ExitStack], tuple[Row, Iterator[HostBatch]]]


def _rows(
    args: argparse.Namespace, work: Workload, manifest: Path, folder: Path
) -> dict[str, Start]:
    def rival(stack: ExitStack) -> tuple[Row, Iterator[HostBatch]]:
        batches = ordinary_batches(args, work, manifest)
        return RivalRow(work, args.rival_mode), (OrdinaryBatch(b, work.model) for b in batches)

    def engine(source: Callable[[], Path]) -> Start:
        def start(stack: ExitStack) -> tuple[Row, Iterator[HostBatch]]:
            loader = stack.enter_context(engine_batches(args, work, source()))
            return EngineRow(work), (HostBatch(b, work.model) for b in loader)

        return start

    rows: dict[str, Start] = {"B+, raw mp4": rival, "C, raw mp4": engine(lambda: manifest)}
    for codec in PACKED:
        rows[f"C, packed {codec}"] = engine(partial(_packed, codec, manifest, folder, args))
    return rows


def _clips(folder: Path, args: argparse.Namespace) -> Path:
    """Synthetic clips in files like those of a data set: 10 s of H.264 at 25 frames a second."""
    side, count = (40, 4) if args.tiny else (340, args.clips)
    seconds = 2.0 if args.tiny else 10.0
    try:
        from avmae_fast.data.synth import synthesise
    except ImportError as error:
        raise BenchmarkError(f"media files are written with PyAV ({error}): install av") from error
    return synthesise(folder, clips=count, seconds=seconds, size=side, workers=args.workers or 1)


def _packed(codec: str, manifest: Path, folder: Path, args: argparse.Namespace) -> Path:
    """A folder of shards: the one that was named, or one packed now."""
    given: Path | None = getattr(args, f"packed_{codec}")
    if given is not None:
        return given
    if importlib.util.find_spec("avmae_fast.data.pack") is None:
        raise BenchmarkError("this version has no packed shards (avmae_fast.data.pack)")
    from avmae_fast import cli

    out = folder / codec
    command = ["pack", str(manifest), str(out), "--codec", codec]
    jobs = str(max(1, args.workers))
    code = cli.main([*command, "--short-side", str(args.short_side), "--jobs", jobs])
    if code != 0:
        raise BenchmarkError(f"avmae {' '.join(command)} failed with exit code {code}")
    return out


def _row(
    name: str,
    start: Start,
    args: argparse.Namespace,
    result: results.Result,
    deadline: results.Deadline,
    work: Workload,
) -> None:
    names = {"source": name, "model": work.size, "dataset": work.dataset, "batch": work.batch,
             "workers": args.workers}  # fmt: skip
    if deadline.passed():
        result.skip(results.OUT_OF_TIME, **names)
        return
    try:
        with ExitStack() as stack:
            row, batches = start(stack)
            stack.callback(row.close)
            seconds, waited = _run(row, batches, args)
    except (Exception, SystemExit) as error:
        result.skip(str(error) if isinstance(error, BenchmarkError) else error, **names)
        devices.release(work.device)
        return
    clips = args.steps * work.batch
    result.add(**names, clips_per_s=clips / seconds, share_waiting=waited / seconds)
    devices.release(work.device)


def _run(row: Row, batches: Iterator[HostBatch], args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of the timed steps, and those that they waited for the loader."""
    pairs = itertools.pairwise(batches)
    for _ in range(args.warm_up):
        row.step(*next(pairs))
    devices.synchronize(row.device)
    waited, began = 0.0, time.perf_counter()
    for _ in range(args.steps):
        asked = time.perf_counter()
        current, coming = next(pairs)
        waited += time.perf_counter() - asked
        row.step(current, coming)
        # Work queued on the GPU would let the loader run ahead unseen.
        devices.synchronize(row.device)
    return time.perf_counter() - began, waited


def main(argv: list[str] | None = None) -> int:
    options = results.parser(__doc__ or "")
    options.add_argument("--model", choices=SIZES, default="B")
    options.add_argument("--dataset", choices=DATASETS, default="audioset")
    options.add_argument("--batch", type=int, default=128)
    options.add_argument("--workers", type=int, default=16, help="loader processes (default 16)")
    options.add_argument("--steps", type=int, default=12)
    options.add_argument("--warm-up", type=int, default=4)
    options.add_argument("--stride", type=int, default=4)
    options.add_argument("--short-side", type=int, default=256)
    options.add_argument("--clips", type=int, default=128, help="synthetic clips to make")
    options.add_argument("--manifest", type=Path, help="media files to read instead")
    for codec in PACKED:
        options.add_argument(f"--packed-{codec}", type=Path, metavar="FOLDER")
    options.add_argument("--rival-mode", default="default")
    options.add_argument("--compiler", default="inductor", help="back end of torch.compile")
    return results.run("end_to_end", options, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
