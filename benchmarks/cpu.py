"""What the host computes in training, beside what it is usually done with: ratios of one run.

Masks, the order of an epoch, log-mel, reading clips, and a step of the demo model, on one thread.
Results of a row's candidates are compared before they are timed.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avmae_fast.config_file import load_config
from avmae_fast.data.loader import ClipLoader
from avmae_fast.models import AudiovisualMAE
from avmae_fast.models.blocks import set_checkpoint
from avmae_fast.reference import ReferenceMAE
from avmae_fast.train.inputs import InputStage
from avmae_kernels.logmel import log_mel
from avmae_kernels.masking import permute
from benchmarks import harness, masking, results
from benchmarks.end_to_end import OrdinaryClips
from benchmarks.kernel_cases import Unavailable, unavailable_call
from benchmarks.workload import Workload

Candidates = dict[str, Callable[[], Any]]


def masks(args: argparse.Namespace) -> Candidates:
    batch = 2 if args.tiny else 64
    draws = {"ours": masking.ours, "NumPy argsort": masking.numpy_argsort,
             "torch argsort": masking.torch_argsort}  # fmt: skip
    for name, draw in draws.items():
        masking.check(name, draw(batch), batch)
    return {name: partial(draw, batch) for name, draw in draws.items()}


def order(args: argparse.Namespace) -> Candidates:
    """The records of a batch in a shuffled epoch of two million, as after a resume.

    NumPy's whole order serves the epoch; ours holds nothing.
    """
    records, batch = (100, 8) if args.tiny else (2_000_000, 512)
    start = records // 2

    places = np.arange(start, start + batch)

    def ours() -> np.ndarray:
        return permute(places, records, key=3, seed=1)

    def numpy_permutation() -> np.ndarray:
        return np.random.default_rng([1, 3]).permutation(records)[start : start + batch]

    for drawn in (ours(), numpy_permutation()):
        if len(np.unique(drawn)) != batch or not 0 <= drawn.min() <= drawn.max() < records:
            raise AssertionError("an order is no permutation")
    return {"ours": ours, "NumPy, the whole order": numpy_permutation}


def mel(args: argparse.Namespace) -> Candidates:
    """Log-mel of 10 s of sound."""
    samples = 4000 if args.tiny else 160_240
    waveform = torch.randint(-(2**13), 2**13, (1, samples), dtype=torch.int16)
    found: Candidates = {"ours": lambda: log_mel(waveform)}
    try:
        from torchaudio.compliance.kaldi import fbank
    except Exception as error:  # a build for another torch breaks on import
        why = f"torchaudio: {results.reason(error)}"
        return found | {"torchaudio's Kaldi fbank": unavailable_call(why)}

    def torchaudio() -> torch.Tensor:
        sound = waveform.float() / 2**15
        return fbank(
            sound,
            htk_compat=True,
            sample_frequency=16000,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=128,
            dither=0.0,
            frame_shift=10,
        )

    torch.testing.assert_close(log_mel(waveform)[0], torchaudio(), rtol=1e-4, atol=1e-4)
    return found | {"torchaudio's Kaldi fbank": torchaudio}


def loader(args: argparse.Namespace) -> Candidates:
    """Eight clips out of H.264 files, in this process."""
    from avmae_fast.data.synth import synthesise  # needs PyAV, which this row alone does

    folder = Path(args.folder) / "clips"
    count, seconds, size = (2, 2.0, 96) if args.tiny else (8, 6.0, 256)
    manifest = synthesise(folder, clips=count, classes=1, seconds=seconds, size=size, workers=1)
    sets = {"manifest": manifest, "workers": 0, "cache": "none", "short_side": size}
    overrides = [f"data.{name}={value}" for name, value in sets.items()]
    config = load_config("demo", [*overrides, f"train.batch={count}"])
    ordinary = OrdinaryClips(manifest, config.model, config.data.stride, size)
    batches = iter(ClipLoader(config))
    video, rows = config.model.video, [ordinary[i] for i in range(count)]
    assert video is not None
    ours = next(batches).video
    if ours is None or ours.shape[1:] != rows[0][0].shape or not float(ours.float().std()) > 0:
        raise AssertionError("the loaders give different shapes, or nothing")
    return {
        "ours": lambda: next(batches),
        "one item at a time, log-mel too": lambda: [ordinary[i] for i in range(count)],
    }


def step(args: argparse.Namespace) -> Candidates:
    """Forward and backward of the demo model."""
    config = load_config("demo", ["data.manifest=unused.csv"])
    stage = InputStage(config, torch.device("cpu"))
    work = Workload("B", "audioset", config.train.batch, torch.device("cpu"))
    work.__dict__.update(model=config.model, config=config)
    host = work.host_batches(1)[0]
    inputs = stage(host.clips)
    engine, reference = AudiovisualMAE(config.model), ReferenceMAE(config.model)
    reference.load_state_dict(work.weights)
    engine.load_state_dict(work.weights)
    set_checkpoint(engine, config.train.activation_checkpoint)

    def run(model: torch.nn.Module) -> float:
        model.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
        loss.backward()
        return float(loss.detach())

    torch.testing.assert_close(run(engine), run(reference), rtol=1e-5, atol=0.0)
    return {"ours": partial(run, engine), "reference": partial(run, reference)}


PARTS: dict[str, Callable[[argparse.Namespace], Candidates]] = {
    "masks of 64 clips": masks,
    "512 places in the order of 2 million, from anywhere": order,
    "log-mel of 10 s": mel,
    "reading 8 clips": loader,
    "step of the demo model": step,
}


def measure(args: argparse.Namespace, result: results.Result, deadline: results.Deadline) -> None:
    if hasattr(os, "getloadavg"):
        # Of a busy machine ratios hold, times do not.
        result.extra["load_average"] = os.getloadavg()[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="avmae-bench-") as args.folder:
            for name, make in PARTS.items():
                _part(name, make, args, result, deadline)
    finally:
        torch.set_num_threads(threads)


def _part(
    name: str,
    make: Callable[[argparse.Namespace], Candidates],
    args: argparse.Namespace,
    result: results.Result,
    deadline: results.Deadline,
) -> None:
    if deadline.passed():
        result.skip(results.OUT_OF_TIME, what=name)
        return
    try:
        candidates = _available(make(args), result, name)
        sample_s = 0.001 if args.tiny else 0.05
        times = harness.time_interleaved(candidates, repeats=args.repeats, sample_s=sample_s)
    except Exception as error:
        result.skip(error, what=name)
        return
    for candidate, found in times.items():
        result.add(
            what=name,
            candidate=candidate,
            ms=1e3 * found.median_s,
            ms_lower=1e3 * found.lower_quartile_s,
            ms_upper=1e3 * found.upper_quartile_s,
            times_ours=found.median_s / times["ours"].median_s,
        )


def _available(candidates: Candidates, result: results.Result, name: str) -> Candidates:
    """The candidates that run."""
    found: Candidates = {}
    for candidate, call in candidates.items():
        try:
            call()
        except Unavailable as error:
            result.skip(str(error), what=name, candidate=candidate)
            continue
        found[candidate] = call
    return found


def main(argv: list[str] | None = None) -> int:
    options = results.parser(__doc__ or "")
    options.set_defaults(device="cpu")
    options.add_argument("--repeats", type=int, default=15, help="samples (default 15)")
    return results.run("cpu", options, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
