"""A full pretraining step, from a batch in the host's memory to updated weights.

Rows A, B, B+ and C (see `benchmarks.step_rows`) start from the same weights, are checked against
the reference in higher precision on the batch they are timed on, and are timed A B B+ C C B+ B A,
each with the card's memory to itself. Host batches alternate; masks are drawn anew in each step.
"""

import argparse
import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from avmae_kernels import masking
from avmae_kernels.attention_backends import BACKENDS, describe
from benchmarks import ceilings, put_back, results
from benchmarks import device as devices
from benchmarks.harness import BenchmarkError, summary
from benchmarks.largest import largest_batch
from benchmarks.profiles import kernel_times
from benchmarks.roofline import gpu_of, model_flops
from benchmarks.roofline_ops import parameters
from benchmarks.step_check import Truth
from benchmarks.step_rows import (
    RIVAL_MODES,
    ROWS,
    EngineRow,
    GraphRow,
    RivalRow,
    Row,
    build,
    sdpa_choice,
)
from benchmarks.workload import DATASETS, SIZES, HostBatch, Workload

Build = Callable[[Workload], Row]
_WARM_UP_STEPS = 3


@dataclass
class Entry:
    """A row while it is measured: how to build it, and its samples so far."""

    name: str
    build: Build
    row: Row | None = None
    check: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    issue_s: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    peak: int | None = None
    note: str = ""

    def drop(self) -> None:
        if self.row is not None:
            self.row.close()
        self.row = None


def measure(args: argparse.Namespace, result: results.Result, deadline: results.Deadline) -> None:
    device = result.device
    if args.tiny and device.type == "cuda":
        raise BenchmarkError("--tiny tries the rows on a CPU; leave it out on a GPU")
    unknown = sorted(set(args.rows) - set(ROWS))
    if unknown:
        raise BenchmarkError(f"--rows {' '.join(unknown)} not known: choose from {' '.join(ROWS)}")
    result.extra["matmul_flops_per_s"] = ceilings.matmul_ceiling(device, args.tiny)
    result.extra |= {"ablation": [], "largest": [], "profile": {}}
    result.extra["masks_by"] = masking.implementation().__name__
    result.extra["attention_by"] = describe(device)
    for batch in args.batch:
        work = Workload(args.model, args.dataset, batch, device, args.tiny, compiler=args.compiler)
        one_batch(args, result, deadline, work)
    # Once more, as the card is now: warm.
    result.extra["matmul_flops_per_s_after"] = ceilings.matmul_ceiling(device, args.tiny)
    result.extra["device_state_after"] = devices.state(device)


def one_batch(
    args: argparse.Namespace,
    result: results.Result,
    deadline: results.Deadline,
    work: Workload,
) -> None:
    """Every row at one batch, then what was asked for beside."""
    hosts = work.host_batches(2)
    names = {"model": work.size, "dataset": work.dataset, "batch": work.batch}
    head_dim = work.model.decoder.head_dim
    video = work.model.input("video").tokens
    result.extra["sdpa_by_itself"] = sdpa_choice(work, video, head_dim)
    try:
        truth = Truth(work, hosts[0])
    except Exception as error:
        for name in args.rows:
            result.skip(error, **names, row=name)
        return
    entries = [Entry(n, partial(build, n, rival_mode=args.rival_mode)) for n in args.rows]
    kept = list(_first_pass(entries, result, deadline, truth, hosts, args.steps, names))
    for entry in reversed(kept):
        if deadline.passed():
            break
        _again(entry, work, hosts, args.steps)
    if args.profile and not deadline.passed():
        for entry in kept:
            _profile(entry, result, work, hosts)
    for entry in kept:
        result.add(**names, **figures(entry, work, result.extra["matmul_flops_per_s"]))
        entry.drop()
    _forget(work.device)
    if args.ablation:
        _ladder(result, deadline, truth, hosts, args, names)
    if args.largest:
        _largest(result, deadline, work, args, names)


def _first_pass(
    entries: list[Entry],
    result: results.Result,
    deadline: results.Deadline,
    truth: Truth,
    hosts: list[HostBatch],
    steps: int,
    names: dict[str, Any],
) -> Iterable[Entry]:
    """Build, check and time each; yields those that could, parked."""
    for entry in entries:
        if deadline.passed():
            result.skip(results.OUT_OF_TIME, **names, row=entry.name)
            continue
        try:
            entry.row = entry.build(truth.work)
            entry.note = entry.row.note
            entry.check = truth.check(entry.row)
            for i in range(_WARM_UP_STEPS):
                entry.row.step(hosts[i % 2], hosts[(i + 1) % 2])
            _sample(entry, hosts, steps)
            entry.row.park(torch.device("cpu"))
        except Exception as error:
            result.skip(error, **names, row=entry.name)
            entry.drop()
            # The traceback holds the activations.
            del error
            _collect(result.device)
            continue
        _collect(result.device)
        seconds = summary(entry.seconds).median_s
        print(f"{entry.name}: first pass {1e3 * seconds:.4g} ms", flush=True)
        yield entry


def _again(entry: Entry, work: Workload, hosts: list[HostBatch], steps: int) -> None:
    assert entry.row is not None
    entry.row.park(work.device)
    entry.row.step(hosts[0], hosts[1])
    _sample(entry, hosts, steps)
    entry.row.park(torch.device("cpu"))
    _collect(work.device)


def _forget(device: torch.device) -> None:
    """Drop compiled code: a captured graph keeps its memory, and torch compiles one function for
    so many shapes only before it gives up."""
    torch.compiler.reset()
    _collect(device)


def _collect(device: torch.device) -> None:
    gc.collect()
    devices.release(device)


def _sample(entry: Entry, hosts: list[HostBatch], steps: int) -> None:
    """Time `steps` steps, queued without waiting; also the host's time to queue one."""
    row = entry.row
    assert row is not None
    device = row.device
    devices.synchronize(device)
    devices.reset_peak(device)
    joules = devices.energy_j(device)
    marks, began = [_mark(device)], time.perf_counter()
    for i in range(steps):
        row.step(hosts[i % 2], hosts[(i + 1) % 2])
        marks.append(_mark(device))
    entry.issue_s.append((time.perf_counter() - began) / steps)
    devices.synchronize(device)
    entry.seconds += [_between(a, b) for a, b in zip(marks, marks[1:], strict=False)]
    after = devices.energy_j(device)
    if joules is not None and after is not None:
        entry.joules.append((after - joules) / steps)
    peak = devices.peak_bytes(device)
    entry.peak = peak if entry.peak is None else max(entry.peak, peak or 0)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def figures(entry: Entry, work: Workload, ceiling: float) -> dict[str, Any]:
    """The columns of one row."""
    timing = summary(entry.seconds)
    flops = model_flops(work.model, work.batch)
    gpu = gpu_of(devices.gpu_name(work.device))
    joules = min(entry.joules) / work.batch if entry.joules else None
    return {
        "row": entry.name,
        "ms": 1e3 * timing.median_s,
        "ms_lower": 1e3 * timing.lower_quartile_s,
        "ms_upper": 1e3 * timing.upper_quartile_s,
        "clips_per_s": work.batch / timing.median_s,
        "share_of_matmul_ceiling": flops / timing.median_s / ceiling,
        "share_of_datasheet": flops / timing.median_s / gpu.datasheet if gpu else None,
        "peak_bytes": entry.peak,
        "joules_per_clip": joules,
        "issue_ms": 1e3 * min(entry.issue_s),
        **entry.check,
        "note": entry.note,
        "samples_ms": [1e3 * s for s in entry.seconds],
    }


def variants() -> dict[str, Build]:
    """What the ablation ladder times: the engine with one thing changed, and B+ in other modes."""
    found: dict[str, Build] = {
        name: partial(EngineRow, part=part) for name, part in put_back.PARTS.items()
    }
    for policy in ("none", "full"):
        found[f"activation checkpointing {policy}"] = partial(EngineRow, checkpoint=policy)
    for impl in BACKENDS:
        found[f"attention by {impl}"] = partial(EngineRow, part=partial(put_back.attention, impl))
    found["torch's AdamW, foreach"] = partial(EngineRow, foreach=True)
    found["float frames from the host"] = partial(EngineRow, float_frames=True)
    found["steps as CUDA graphs"] = GraphRow
    found["under torch.compile"] = partial(EngineRow, compiled=True)
    for mode in RIVAL_MODES[1:]:
        found[f"B+ in mode {mode}"] = partial(RivalRow, mode=mode)
    found["whole engine, once more"] = EngineRow
    return found


def _ladder(
    result: results.Result,
    deadline: results.Deadline,
    truth: Truth,
    hosts: list[HostBatch],
    args: argparse.Namespace,
    names: dict[str, Any],
) -> None:
    chosen = [Entry(n, b) for n, b in variants().items() if not args.only or args.only in n]
    for entry in chosen:
        quiet = _Collector(result, names)
        for done in _first_pass([entry], quiet, deadline, truth, hosts, args.steps, names):
            found = figures(done, truth.work, result.extra["matmul_flops_per_s"])
            result.extra["ablation"].append({**names, "variant": found.pop("row"), **found})
            done.drop()
        _forget(result.device)
        result.save()
    _promote_rival(result, names)


def _promote_rival(result: results.Result, names: dict[str, Any]) -> None:
    """B+ is the best that is to be had without us, so its fastest mode is the row."""
    for row in result.rows:
        if row["row"] != "B+" or any(row[key] != value for key, value in names.items()):
            continue
        for found in result.extra["ablation"]:
            rival = found["variant"].startswith("B+ in mode") and "why" not in found
            same = all(found[key] == value for key, value in names.items())
            if rival and same and found["clips_per_s"] > row["clips_per_s"]:
                row |= {key: value for key, value in found.items() if key != "variant"}
    result.save()


class _Collector(results.Result):
    """Puts what could not run among the ablation's rows."""

    def __init__(self, result: results.Result, names: dict[str, Any]) -> None:
        self._result, self.device = result, result.device

    def skip(self, why: str | BaseException, **row: Any) -> None:
        text = results.reason(why) if isinstance(why, BaseException) else why
        row["variant"] = row.pop("row")
        self._result.extra["ablation"].append({**row, "why": text})
        print(f"{results.line(row)}  not run: {text}", flush=True)


def _profile(entry: Entry, result: results.Result, work: Workload, hosts: list[HostBatch]) -> None:
    """Where the time of one step goes, kernel by kernel."""
    assert entry.row is not None
    entry.row.park(work.device)
    row = entry.row
    for _ in range(2):
        row.step(hosts[0], hosts[1])
    found = kernel_times(lambda: row.step(hosts[0], hosts[1]), work.device)
    result.extra["profile"][f"{work.size} {work.dataset} {work.batch} {entry.name}"] = found
    row.park(torch.device("cpu"))
    _collect(work.device)


def _largest(
    result: results.Result,
    deadline: results.Deadline,
    work: Workload,
    args: argparse.Namespace,
    names: dict[str, Any],
) -> None:
    total = devices.total_bytes(work.device)
    for name in args.rows:
        row = {"model": work.size, "dataset": work.dataset, "row": name}
        measured = [r for r in result.rows if r["row"] == name and r["batch"] == work.batch]
        if total is None:
            why = "a CPU has no memory of its own to fill"
        elif not measured:
            why = "the row itself did not run"
        elif deadline.passed():
            why = results.OUT_OF_TIME
        else:
            fixed = 16.0 * parameters(work.model)
            guess = (0.95 * total - fixed) / ((measured[0]["peak_bytes"] - fixed) / work.batch)
            fits = partial(_fits, work, name, args.rival_mode)
            found = largest_batch(fits, work.batch, int(guess), deadline.passed)
            result.extra["largest"].append({**row, "batch": found.batch, "bracket": found.bracket})
            measured[0]["largest_batch"] = found.batch
            result.save()
            continue
        result.extra["largest"].append({**row, "why": why})
        print(f"largest batch of {name}: not run: {why}", flush=True)


def _fits(work: Workload, name: str, rival_mode: str, batch: int) -> bool:
    """Whether a row can take a step at a batch."""
    bigger = dataclasses.replace(work, batch=batch)
    bigger.__dict__["weights"] = work.weights  # the same model: not to be drawn again
    row = None
    try:
        row = build(name, bigger, rival_mode)
        host = bigger.host_batches(1)[0]
        for _ in range(2):
            row.step(host, host)
        devices.synchronize(work.device)
        return True
    except Exception as error:
        if not devices.out_of_memory(error):
            raise
        return False
    finally:
        if row is not None:
            row.close()
        del row
        _forget(work.device)


def main(argv: list[str] | None = None) -> int:
    options = results.parser(__doc__ or "")
    options.add_argument("--model", choices=SIZES, default="L")
    options.add_argument("--dataset", choices=DATASETS, default="audioset")
    options.add_argument("--batch", type=int, nargs="+", default=[128])
    options.add_argument("--rows", nargs="+", default=["A", "C", "B+", "B"], metavar="ROW")
    options.add_argument("--steps", type=int, default=10, help="steps a sample (default 10)")
    options.add_argument("--rival-mode", choices=RIVAL_MODES, default=RIVAL_MODES[0])
    options.add_argument("--compiler", default="inductor", help="back end of torch.compile")
    options.add_argument("--ablation", action="store_true", help="also time the ladder of variants")
    options.add_argument("--only", metavar="TEXT", help="only variants whose name holds TEXT")
    options.add_argument("--largest", action="store_true", help="also search the largest batch")
    options.add_argument("--profile", action="store_true", help="also one step kernel by kernel")
    return results.run("step", options, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
