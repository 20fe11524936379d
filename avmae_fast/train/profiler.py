"""A trace of some steps, to be looked at in Perfetto or chrome://tracing."""

import logging
from pathlib import Path
from typing import Any, Self

import torch

logger = logging.getLogger(__name__)


class Profiler:
    """Traces the steps `first` to `last` into `folder/steps-<first>-<last>.json.gz`.

    Args:
        steps: numbers of the first and the last step, None for no trace.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None) -> None:
        self._folder, self._steps = folder, steps
        self._profile: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._profile is not None:
            self._write()

    def before(self, step: int) -> None:
        """Start or end the trace where it is due; to be called before each step."""
        if self._steps is None:
            return
        first, last = self._steps
        if self._profile is None and step == first:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.start()
        elif self._profile is not None and step == last + 1:
            self._write()

    def _write(self) -> None:
        assert self._steps is not None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profile.stop()
        self._folder.mkdir(exist_ok=True)
        path = self._folder / "steps-{}-{}.json.gz".format(*self._steps)
        self._profile.export_chrome_trace(str(path))
        self._profile = None
        logger.warning("trace of steps %d to %d: %s", *self._steps, path)
