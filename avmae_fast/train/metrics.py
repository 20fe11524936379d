"""What a run reports while it runs: metrics.jsonl, TensorBoard and a progress bar.

A line of metrics.jsonl holds `step`, `samples` (seen so far), `loss`, `loss_<modality>` and
`grad_norm` (means over the finite steps since the line before; absent if there was none), `lr` (of
that step), `clips_per_s`, `data_wait_fraction` (of the time of those steps), `mfu` (share of the
GPU's bf16 peak, null where that is not known) and `time_s` (since the run began, pauses between a
stop and a resume left out). Validation has a file of its own, validation.jsonl, and so have steps
that stood out, events.jsonl, and the files that could not be read and had to be substituted,
bad_samples.jsonl.
"""

import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, Self

import torch
from tqdm import tqdm

from avmae_fast.config import Run
from avmae_fast.config_file import to_dict
from avmae_fast.data.loader import Batch
from avmae_fast.train.distributed import World
from avmae_fast.train.flops import peak_flops
from avmae_fast.train.lines import append_lines
from avmae_fast.train.run_folder import (
    METRICS,
    TENSORBOARD,
    VALIDATION,
    ResumePoint,
    bad_samples_of,
)


class Metrics:
    """Means over the steps since the last line, and everywhere they are written.

    Args:
        steps: where the run ends.
        point: where it is resumed; what the earlier run wrote beyond it is dropped.
        device: what it runs on.
        clip_flops: operations of one training step for one clip.
        world: of several processes, the one that writes; the others write their bad samples only.
    """

    def __init__(
        self,
        config: Run,
        steps: int,
        point: ResumePoint | None,
        device: torch.device,
        world: World,
        clip_flops: int,
    ) -> None:
        self._writes = world.writes
        # Files of a process each: appending to one from several machines would mix up lines.
        self._bad_samples = config.train.out / bad_samples_of(world.rank)
        peak = peak_flops(device)
        self._mfu_of_one = None if peak is None else clip_flops / peak
        self._batch = config.train.batch
        self._folder = config.train.out
        state: dict[str, Any] = {"sums": {}, "count": 0, "time_s": 0.0}
        if point is not None:
            state = point.state["metrics"]
        self._sums: dict[str, float] = dict(state["sums"])
        self._count: int = state["count"]
        self._began_s = time.monotonic() - state["time_s"]
        self._timed_steps, self._step_s, self._wait_s = 0, 0.0, 0.0
        step = point.step if point else 0
        self.tensorboard = None
        if config.train.tensorboard and world.writes:
            from torch.utils.tensorboard import SummaryWriter

            folder = self._folder / TENSORBOARD
            self.tensorboard = SummaryWriter(str(folder), purge_step=step + 1)
        self._wandb = None
        if config.train.wandb is not None and world.writes:
            self._wandb = _start_wandb(config)
        self._bar = tqdm(
            total=steps,
            initial=step,
            desc="step",
            disable=None if world.writes else True,
            dynamic_ncols=True,
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar:16}| ETA {remaining}{postfix}",
        )
        self._steps = steps

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with the time spent waiting for them and their bad samples noted."""
        while True:
            began_s = time.monotonic()
            batch = next(batches)
            self._wait_s += time.monotonic() - began_s
            append_lines(self._bad_samples, map(asdict, batch.substituted))
            yield batch

    def add(self, values: Mapping[str, float]) -> None:
        """Count one step's losses and gradient norm."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1

    def took(self, step_s: float) -> None:
        """Count the time of one step."""
        self._timed_steps += 1
        self._step_s += step_s
        self._bar.update()

    def write(self, step: int, samples: int, lr: float) -> None:
        """Write one line, the means since the last; without losses if no step was finite."""
        line: dict[str, Any] = {"step": step, "samples": samples}
        if self._count:
            line |= {name: total / self._count for name, total in self._sums.items()}
        line["lr"] = lr
        line["clips_per_s"] = self._timed_steps * self._batch / self._step_s
        line["data_wait_fraction"] = self._wait_s / self._step_s
        line["mfu"] = self._mfu_of_one and self._mfu_of_one * line["clips_per_s"]
        line["time_s"] = self._elapsed_s()
        if self._writes:
            append_lines(self._folder / METRICS, [line])
            self._to_tensorboard("train", line, step)
            self._show(step, line)
        self._sums, self._count = {}, 0
        self._timed_steps, self._step_s, self._wait_s = 0, 0.0, 0.0

    def write_validation(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line of validation.jsonl."""
        if not self._writes:
            return
        append_lines(self._folder / VALIDATION, [{"step": step, **values}])
        self._to_tensorboard("validation", values, step)
        scores = [f", {n} {x:.4f}" for n, x in values.items() if not n.startswith("loss")]
        self._say(f"step {step}: validation " + _losses(values) + "".join(scores))

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same means and the same clock."""
        return {"sums": self._sums, "count": self._count, "time_s": self._elapsed_s()}

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    def _to_tensorboard(self, group: str, values: Mapping[str, float], step: int) -> None:
        scalars = {
            f"{group}/{name}": value
            for name, value in values.items()
            if name not in ("step", "samples") and value is not None
        }
        if self.tensorboard is not None:
            for name, value in scalars.items():
                self.tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def _show(self, step: int, line: Mapping[str, float]) -> None:
        speed = f"{line['clips_per_s']:.1f} clips/s, data wait {line['data_wait_fraction']:.0%}"
        if line["mfu"] is not None:
            speed += f", MFU {line['mfu']:.0%}"
        text = f"{_losses(line)}, {speed}"
        self._bar.set_postfix_str(text, refresh=False)
        if self._bar.disable:
            left_s = (self._steps - step) * self._batch / line["clips_per_s"]
            self._say(f"step {step}/{self._steps}: {text}, ETA {tqdm.format_interval(left_s)}")

    def _say(self, text: str) -> None:
        tqdm.write(text)


def _start_wandb(config: Run) -> Any:
    """A run of Weights & Biases; one that is resumed goes on under its name."""
    import wandb

    out = config.train.out.resolve()
    return wandb.init(
        project=config.train.wandb,
        name=out.name,
        id=f"{zlib.crc32(str(out).encode()):08x}",
        resume="allow",
        dir=str(out),
        config=to_dict(config),
    )


def _losses(values: Mapping[str, float]) -> str:
    parts = [
        f"{name.removeprefix('loss_')} {value:.4f}"
        for name, value in values.items()
        if name.startswith("loss_")
    ]
    if "loss" not in values:
        return "no step was finite"
    listed = f" ({', '.join(parts)})" if parts else ""
    return f"loss {values['loss']:.4f}{listed}"
