"""Which steps a run survives, and what is written down of the others."""

import math
from pathlib import Path

import pytest

from avmae_fast.train.guard import Guard, NonFiniteError
from avmae_fast.train.lines import read_lines
from avmae_fast.train.readback import Read

NAMES = ("loss", "grad_norm")
BATCH = 4


def _read(step: int, norm: float = 1.0) -> Read:
    return Read(step, step * BATCH, [0.5, norm])


def _guard(folder: Path, state: dict | None = None) -> Guard:
    return Guard(folder / "events.jsonl", NAMES, BATCH, state)


def test_finite_steps_pass(tmp_path: Path) -> None:
    guard = _guard(tmp_path)
    assert guard.check(_read(1)) == {"loss": 0.5, "grad_norm": 1.0}
    assert not guard.alert and not (tmp_path / "events.jsonl").exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_skipped_step_is_written_down(tmp_path: Path, bad: float) -> None:
    guard = _guard(tmp_path)
    assert guard.check(_read(7, bad)) is None and guard.alert
    (line,) = read_lines(tmp_path / "events.jsonl")
    assert (line["first_sample"], line["samples"]) == (24, 4)
    assert line["grad_norm"] == str(bad) and line["loss"] == 0.5
    assert guard.check(_read(8)) is not None and not guard.alert


def test_two_in_a_row_pass_and_three_do_not(tmp_path: Path) -> None:
    guard = _guard(tmp_path)
    for step in (1, 2, 4, 5, 7, 8):
        assert guard.check(_read(step, math.nan)) is None
    # A resumed run counts on.
    guard = _guard(tmp_path, guard.state())
    with pytest.raises(NonFiniteError, match="grad_norm not finite at step 9.*3 in a row") as got:
        guard.check(_read(9, math.nan))
    assert (got.value.step, got.value.first_sample, got.value.samples) == (9, 32, 4)


def test_twenty_in_a_thousand(tmp_path: Path) -> None:
    guard = _guard(tmp_path)
    # Twenty, but the first is a thousand steps before the last.
    for step in (1, *range(900, 936, 2), 1001):
        assert guard.check(_read(step, math.nan)) is None
    with pytest.raises(NonFiniteError, match="step 1004.*20 in 1000"):
        guard.check(_read(1004, math.nan))


def test_spikes_are_told_and_let_through(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guard = _guard(tmp_path)
    assert guard.check(_read(1, 100.0)) is not None  # too early to tell
    for step in range(2, 60):
        guard.check(_read(step))
    assert guard.check(_read(60, 9.9)) is not None and not caplog.records
    assert guard.check(_read(61, 10.1)) is not None
    assert "10 times the median" in caplog.text and "samples 240 to 243" in caplog.text
    (line,) = read_lines(tmp_path / "events.jsonl")
    assert line["event"] == "spike"
