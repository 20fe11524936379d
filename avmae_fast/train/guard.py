"""What happens to a run in which a step goes wrong.

A step whose losses or gradient are not finite has changed nothing (`TrainStep`); it is logged with
the samples it was made of, and the run goes on. Three in a row, or 20 in 1,000, and it stops before
anything is saved. A gradient many times the size of the recent ones is logged and let through.
"""

import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from avmae_fast.train.lines import append_lines
from avmae_fast.train.readback import Read

logger = logging.getLogger(__name__)

MAX_IN_A_ROW = 3
MAX_RECENT, RECENT = 20, 1000
# A norm this many times the median of the last steps is worth a line.
SPIKE, SPIKE_STEPS, SPIKE_MIN_STEPS = 10.0, 200, 50


class NonFiniteError(ArithmeticError):
    """Too many steps were not finite; no weight has been touched by one.

    step, first_sample, samples: the last of them, and the samples it was made of.
    """

    def __init__(self, message: str, step: int, first_sample: int, samples: int) -> None:
        super().__init__(message)
        self.step, self.first_sample, self.samples = step, first_sample, samples


class Guard:
    """Looks at the values of every step.

    Args:
        log: file that gets a line for each step that was skipped or stood out; None for a process
            that leaves that to another.
        names: of the values, as `TrainStep.names`; the last is the norm of the gradient.
        batch: samples a step.
        state: what `state` returned when the run was saved.
    """

    def __init__(
        self, log: Path | None, names: Sequence[str], batch: int, state: Mapping[str, Any] | None
    ) -> None:
        self._log, self._names, self._batch = log, names, batch
        state = state or {"skipped": [], "norms": []}
        self._skipped: list[int] = list(state["skipped"])
        self._norms: deque[float] = deque(state["norms"], maxlen=SPIKE_STEPS)
        self.alert = False

    def check(self, read: Read) -> dict[str, float] | None:
        """The values of a step by name; None where it was skipped.

        While `alert` is set, the step before was skipped, and the caller should wait for each
        step: the weights are then those that the next failure happens with.

        Raises:
            NonFiniteError: this one was too many.
        """
        values = dict(zip(self._names, read.values, strict=True))
        self.alert = not all(map(math.isfinite, read.values))
        if self.alert:
            self._skip(read, values)
            return None
        norm = values[self._names[-1]]
        if len(self._norms) >= SPIKE_MIN_STEPS:
            usual = statistics.median(self._norms)
            if norm > SPIKE * usual:
                self._spike(read, values, usual)
        self._norms.append(norm)
        return values

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to count on."""
        return {"skipped": self._skipped, "norms": list(self._norms)}

    def _spike(self, read: Read, values: Mapping[str, float], usual: float) -> None:
        self._note(read, "spike", values)
        norm = values[self._names[-1]]
        self._warn(
            f"step {read.step}: the gradient's norm is {norm:.3g}, {norm / usual:.0f} times the "
            f"median of the last {len(self._norms)} steps (samples {self._samples(read)})"
        )

    def _skip(self, read: Read, values: Mapping[str, float]) -> None:
        self._note(read, "skipped", values)
        recent = [step for step in self._skipped if step > read.step - RECENT] + [read.step]
        self._skipped = recent
        broken = " and ".join(n for n, value in values.items() if not math.isfinite(value))
        what = f"{broken} not finite at step {read.step} (samples {self._samples(read)})"
        last = recent[-MAX_IN_A_ROW:]
        in_a_row = last == list(range(read.step - MAX_IN_A_ROW + 1, read.step + 1))
        if not in_a_row and len(recent) < MAX_RECENT:
            self._warn(f"{what}: the step is skipped, weights stay as they are")
            return
        count = f"{MAX_IN_A_ROW} in a row" if in_a_row else f"{MAX_RECENT} in {RECENT}"
        raise NonFiniteError(
            f"{what}, the last of {count}; the run stops, its checkpoints are good. Look at the "
            "batch with `avmae replay-batch`; resume with a lower train.base_lr or "
            "train.clip_grad = 1, or with train.precision = 'fp32'",
            read.step, read.samples - self._batch, self._batch,
        )  # fmt: skip

    def _warn(self, text: str) -> None:
        if self._log is not None:
            logger.warning(text)

    def _note(self, read: Read, event: str, values: Mapping[str, float]) -> None:
        if self._log is None:
            return
        line: dict[str, Any] = {"step": read.step, "event": event}
        line |= {"first_sample": read.samples - self._batch, "samples": self._batch}
        # JSON has no word for what is not a number.
        line |= {n: value if math.isfinite(value) else str(value) for n, value in values.items()}
        append_lines(self._log, [line])

    def _samples(self, read: Read) -> str:
        return f"{read.samples - self._batch} to {read.samples - 1}"
