"""`avmae pretrain` as it is, with marks of where it is and one planted fault.

`python -m soak.trainer MARKS pretrain CONFIG ...`; with AVMAE_SOAK_REPORT=0 the report, which takes
longer than all else, is left out. The fault is a sample whose sound is not a
number, by its position: its step is skipped and noted in every run alike.
"""

import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from avmae_fast import cli
from avmae_fast.data.loader import Batch
from avmae_fast.train import pretrain
from avmae_fast.train.inputs import Inputs, InputStage
from avmae_fast.train.step import TrainStep
from soak.marks import Marks

PLANTED = 42
REPORT = "AVMAE_SOAK_REPORT"


def run_trainer(marks_path: Path, argv: Sequence[str]) -> int:
    """Run the command; its exit code."""
    marks = Marks(marks_path)
    # Sums of floats depend on the number of threads.
    torch.set_num_threads(1)
    # A fork server that is killed leaves the folder of its socket.
    tempfile.tempdir = str(marks_path.parent)
    _mark(marks, pretrain, "validate", "validation")
    _mark(marks, pretrain, "save_checkpoint", "checkpoint")
    _mark(marks, TrainStep, "__call__", "step")
    export = pretrain.export_encoder

    @wraps(export)
    def export_and_report(*args: Any) -> None:
        marks.enter("report")
        export(*args)

    loop: Any = pretrain
    loop.export_encoder = export_and_report
    if os.environ.get(REPORT) == "0":
        loop.write_report = lambda config, *_: config.train.out
    _plant()
    code = cli.main(argv)
    marks.enter("between")
    return code


def run_in_child(
    marks_path: Path, argv: Sequence[str], log: Path, environment: dict[str, str]
) -> None:
    """Run the command in a process that was forked; it ends with the command's exit code."""
    os.setsid()
    # That of the program from which it was forked may be of an earlier time.
    os.environ.update(environment)
    # As in a program that was started: its semaphores have no name that could be left behind.
    multiprocessing.set_start_method(None, force=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(run_trainer(marks_path, argv))


def _mark(marks: Marks, owner: Any, name: str, part: str) -> None:
    function: Callable[..., Any] = getattr(owner, name)

    @wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        with marks.inside(part):
            return function(*args, **kwargs)

    setattr(owner, name, marked)


def _plant() -> None:
    ahead = InputStage.ahead

    def poisoned(self: InputStage, batches: Iterator[Batch]) -> Iterator[Inputs]:
        for batch in batches:
            for inputs in ahead(self, iter([batch])):
                if PLANTED in batch.keys.tolist():
                    inputs["audio"].fill_(math.nan)
                yield inputs

    InputStage.ahead = poisoned  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    sys.exit(run_trainer(Path(sys.argv[1]), sys.argv[2:]))
