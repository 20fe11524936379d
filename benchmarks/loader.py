"""What the loader costs beside the decoding that it is for, on one core.

The same samples are read twice in turn: bare, by one loop over open, cut and close in this process,
and by a `ClipLoader` with one worker, of which the processor time of both processes counts. With
`--samples 3000` the growth of the worker's memory is what a long run shows.
"""

import argparse
import re
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from avmae_fast.config import Config, DataConfig, ModelConfig, TrainConfig
from avmae_fast.data.bench import mask_ms_of
from avmae_fast.data.loader import ClipLoader
from avmae_fast.data.order import Order
from avmae_fast.data.samples import SampleSpec, cut_into, open_source
from avmae_fast.data.synth import synthesise
from benchmarks import harness

_BATCH, _BLOCK = 8, 32


def private_mib(pid: int) -> float:
    """Memory of a process that it shares with nobody, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


class Bare:
    """Samples read one after the other, with nothing around."""

    def __init__(self, config: Config, loader: ClipLoader) -> None:
        self._spec, self._manifest = SampleSpec.of(config), loader.manifest
        self._order = Order(len(loader.manifest), config.train.seed, shuffle=True)
        spec = self._spec
        self._video = np.empty((1, spec.frames, *spec.crop, 3), np.uint8)
        self._waveform = np.empty((1, spec.samples), np.int16)

    def read(self, first: int, count: int) -> float:
        """Processor time of reading `count` samples from a position on, in seconds."""
        groups = self._order.groups(first, count)
        draws = [self._order.draws(group) for group in groups]
        began_s = time.process_time()
        for group, draw in zip(groups, draws, strict=True):
            with open_source(self._manifest[group.record], self._spec) as source:
                cut_into(source, self._spec, draw, self._video, self._waveform)
        return time.process_time() - began_s


def measure(args: argparse.Namespace) -> dict[str, Any]:
    blocks = args.samples // _BLOCK
    if blocks < 2:
        raise harness.BenchmarkError(f"--samples wants {2 * _BLOCK} or more, got {args.samples}")
    with tempfile.TemporaryDirectory(prefix="avmae_fast-loader-") as name:
        manifest = synthesise(Path(name) / "clips", clips=16, seconds=6.0, size=256, workers=1)
        config = Config(
            model=ModelConfig.of_size("B"),
            data=DataConfig(manifest=manifest, workers=1),
            train=TrainConfig(out=Path(name), batch=_BATCH, steps=1, device="cpu"),
        )
        with ClipLoader(config) as loader:
            return _compare(config, loader, blocks)


def _compare(config: Config, loader: ClipLoader, blocks: int) -> dict[str, Any]:
    bare, batches = Bare(config, loader), iter(loader)
    for _ in islice(batches, loader.ahead + 1):
        pass
    bare.read(0, 16)
    before, memory = loader.seconds(), [private_mib(loader.worker_pids[0])]
    bare_s = ours_s = 0.0
    for block in range(blocks):
        bare_s += bare.read(block * _BLOCK, _BLOCK)
        began_s = time.process_time()
        for _ in islice(batches, _BLOCK // _BATCH):
            pass
        ours_s += time.process_time() - began_s
        memory.append(private_mib(loader.worker_pids[0]))
    after, count = loader.seconds(), blocks * _BLOCK
    spent = {stage: after[stage] - before[stage] for stage in after}
    worker_s = sum(spent.values()) - spent["cpu"] - spent["wait"]
    mask_ms = mask_ms_of(config)
    settled = memory[min(8, len(memory) // 2) :]
    return {
        "samples": count,
        "bare_ms": 1e3 * bare_s / count,
        "loader_ms": 1e3 * (ours_s + spent["cpu"]) / count,
        "overhead": (ours_s + spent["cpu"]) / bare_s - 1,
        "order_share": spent["order"] / worker_s,
        "order_and_masks_share": (spent["order"] + mask_ms * count / 1e3) / worker_s,
        "worker_private_mib": memory[-1],
        "worker_growth_mib": max(settled) - settled[0],
    }


def main(argv: list[str] | None = None) -> int:
    options = harness.parser((__doc__ or "").partition("\n")[0])
    options.add_argument("--samples", type=int, default=640, help="samples read (default 640)")
    return harness.run(options, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
