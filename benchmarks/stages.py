"""Everything a GPU is wanted for, in stages that each fit eight minutes: `make gpu`.

Stages come in order of worth, each writes its results as it goes, and one that has finished is not
run again: an interrupted campaign goes on with the same command. `--stage tests` (or any other
name, or several) runs only that; `--force` runs it anew.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from benchmarks import device as devices
from benchmarks import harness, results

STAGES = ("tests", "rivals", "step", "curve", "kernels", "peers", "largest", "ablation")
STAGE_S = 480.0
# The rest of a stage's time, from which the last row may still take some.
_LAST_ROW_S = 60.0


@dataclass(frozen=True)
class Job:
    """A command of a stage. result: the JSON it writes, or None where it leaves none."""

    stage: str
    result: str | None
    module: str
    options: tuple[str, ...] = ()
    tiny: tuple[str, ...] = ()  # instead of the options, where shapes are tiny


def _job(stage: str, result: str, options: str = "", tiny: str | None = None) -> Job:
    module = result.partition("-")[0]
    split = tuple(options.split())
    return Job(stage, result, module, split, split if tiny is None else tuple(tiny.split()))


_STEP = "--batch 2 --steps 1 --compiler eager"
JOBS: tuple[Job, ...] = (
    Job("tests", None, "pytest", ("-m", "gpu and not slow", "tests/gpu", "-q", "--maxfail=20")),
    # What the card can do, and whom to beat: it decides what is worth writing.
    _job("rivals", "ceilings"),
    Job("rivals", "kernels-attention-rivals", "kernels",
        ("--op", "attention", "--no-compile", "--write-table",
         "--shape", "2064 tokens", "306 tokens", "157+149", "1568+496"),
        ("--op", "attention", "--no-compile")),
    _job("step", "step-L-audioset-128", "--model L --profile", f"--model L --profile {_STEP}"),
    _job("step", "step-B-audioset-128", "--model B --profile", f"--model B --profile {_STEP}"),
    # 200 steps beside the reference, and the memory checker where it is installed.
    Job("curve", None, "pytest", ("-m", "gpu and slow", "tests/gpu", "-q")),
    _job("kernels", "kernels-memory", "--op add_layer_norm bias_gelu patch_embed_visible "
         "assemble_decoder reconstruction_loss", "--op bias_gelu --no-compile"),
    _job("kernels", "kernels-attention", "--op attention --no-compile --write-table",
         "--op attention --no-compile"),
    Job("kernels", "kernels-attention-compiled", "kernels",
        ("--op", "attention", "--shape", "306 tokens, head_dim 64", "2064 tokens, head_dim 64"),
        ("--op", "attention", "--no-compile")),
    _job("peers", "peers-B", "--model B", "--model B --compiler eager"),
    _job("peers", "end_to_end-B-audioset", "--model B",
         "--workers 0 --steps 1 --warm-up 1 --short-side 40 --compiler eager"),
    _job("peers", "finetune-B", "--model B", "--model B --compiler eager"),
    _job("largest", "step-L-audioset-largest",
         "--model L --rows A C B+ B --largest --rival-mode default",
         f"--model L --largest {_STEP}"),
    _job("largest", "step-B-vggsound-128", "--model B --dataset vggsound --rival-mode default",
         f"--model B --dataset vggsound {_STEP}"),
    _job("largest", "step-H-audioset-64", "--model H --batch 64 --rival-mode default",
         f"--model H {_STEP}"),
    _job("ablation", "step-L-audioset-ablation", "--model L --rows C B+ --ablation --steps 6",
         f"--model L --rows C B+ --ablation {_STEP}"),
)  # fmt: skip


def command(job: Job, folder: Path, device: str, tiny: bool, budget_s: float) -> list[str]:
    """What to run for a job."""
    if job.module == "pytest":
        return [sys.executable, "-m", "pytest", *job.options]
    options = [*(job.tiny if tiny else job.options), "--device", device]
    if tiny:
        options.append("--tiny")
    options += ["--json", str(folder / f"{job.result}.json"), "--budget-s", f"{budget_s:.0f}"]
    return [sys.executable, "-m", f"benchmarks.{job.module}", *options]


def finished(job: Job, folder: Path) -> bool:
    if job.result is None:
        return (folder / f".{job.stage}-passed").exists()
    found = results.load(folder / f"{job.result}.json")
    return found is not None and bool(found.get("complete"))


def run_job(job: Job, folder: Path, device: str, tiny: bool, left_s: float) -> bool:
    """Run a job within the time that is left; its log lies beside its result."""
    budget_s = max(1.0, left_s - _LAST_ROW_S)
    words = command(job, folder, device, tiny, budget_s)
    log = folder / "logs" / f"{job.result or job.stage}.log"
    log.parent.mkdir(exist_ok=True)
    print(f"\n== {job.stage}: {shlex.join(words[1:])}", flush=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if device == "cuda":
        environment["AVMAE_REQUIRE_GPU"] = "1"
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        code = _tee(process, file, began + left_s)
    print(f"== {job.result or job.stage}: exit code {code}, {time.monotonic() - began:.0f} s")
    if job.result is None and code == 0:
        (folder / f".{job.stage}-passed").touch()
    return code == 0


def _tee(process: subprocess.Popen[str], file: TextIO, end: float) -> int:
    """Show and keep what a process prints; end it when the time is up."""

    def kill() -> None:
        # With the compilers and loaders it started, which hold the pipe open.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    stop = threading.Timer(max(0.1, end - time.monotonic()), kill)
    stop.start()
    try:
        assert process.stdout is not None
        for text in process.stdout:
            print(text, end="", flush=True)
            file.write(text)
        return process.wait()
    finally:
        stop.cancel()
        if process.poll() is None:
            kill()


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--stage", nargs="*", default=[], metavar="STAGE", help=", ".join(STAGES))
    options.add_argument("--results", type=Path, help="default: benchmarks/results/<gpu>")
    options.add_argument("--stage-s", type=float, default=STAGE_S, help="seconds a stage may take")
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--tiny", action="store_true", help="tiny shapes: try rows, not speed")
    options.add_argument("--force", action="store_true", help="run finished jobs anew")
    args = options.parse_args(argv)
    unknown = sorted(set(args.stage) - set(STAGES))
    if unknown:
        names = ", ".join(STAGES)
        print(f"error: no stage {', '.join(unknown)}: choose from {names}", file=sys.stderr)
        return 2
    try:
        device = devices.choose(args.device)
    except harness.BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = args.results or Path(__file__).parent / "results" / devices.slug(
        devices.gpu_name(torch.device(device))
    )
    folder.mkdir(parents=True, exist_ok=True)
    return _campaign(args, folder, args.stage or list(STAGES))


def _campaign(args: argparse.Namespace, folder: Path, stages: list[str]) -> int:
    failed = []
    for stage in STAGES:
        if stage not in stages:
            continue
        end = time.monotonic() + args.stage_s
        for job in (job for job in JOBS if job.stage == stage):
            name = job.result or job.stage
            if finished(job, folder) and not args.force:
                print(f"== {name}: finished before")
                continue
            left_s = end - time.monotonic()
            if left_s < 1:
                print(f"== {name}: no time left in stage {stage}; run it again to go on")
                failed.append(name)
            elif not run_job(job, folder, args.device, args.tiny, left_s):
                failed.append(name)
    print(f"\nresults: {folder}" + (f"; not finished: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
