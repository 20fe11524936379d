"""A run that is killed again and again ends as one that is not; a tampered one differs."""

from pathlib import Path

import pytest

from soak import kill_loop
from soak.case import Case, logged_steps
from soak.kill_loop import Aim, Broken, KillLoop, passed
from soak.marks import Marks


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the report, which takes longer than the rest."""
    monkeypatch.setenv("AVMAE_SOAK_REPORT", "0")


def test_killed_eight_times(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    result = kill_loop.kill_loop(8, seed=3)
    assert passed(result), result
    assert result["kills"] == 8 and result["runs_equal"] == 1
    assert result["most_resumes_of_a_run"] >= 3
    assert sum(result[f"kills_in_{part}"] for part in ("step", "checkpoint", "validation")) >= 2
    assert "equal; 8 kills in all" in capsys.readouterr().out


def test_what_differs_is_named() -> None:
    wanted = {"model.safetensors": "a", "metrics": [{"step": s} for s in logged_steps()]}
    kill_loop._require_equal(wanted, dict(wanted), "run")
    with pytest.raises(Broken, match="run differs from the unbroken run in model.safetensors"):
        kill_loop._require_equal(wanted, {**wanted, "model.safetensors": "b"}, "run")
    twice = {**wanted, "metrics": [*wanted["metrics"], wanted["metrics"][-1]]}
    with pytest.raises(Broken, match="metrics"):
        kill_loop._require_equal(wanted, twice, "run")
    with pytest.raises(Broken, match="not each logged step once"):
        kill_loop._require_equal(twice, twice, "run")


def test_a_faster_end_is_no_kill(tmp_path: Path) -> None:
    """A trainer that ends before its part comes is reported by its exit code."""

    class Ended:
        pid = 0

        def exit_code(self) -> int:
            return 2

    loop = KillLoop(Case(tmp_path), 1, 0)
    assert loop._kill_at(Ended(), Marks.fresh(tmp_path / "marks"), Aim("step", 1, 0.0)) == 2


def test_marks_are_seen_by_others(tmp_path: Path) -> None:
    ours = Marks.fresh(tmp_path / "marks")
    theirs = Marks(tmp_path / "marks")
    assert (ours.part, ours.entries("start"), ours.steps) == ("start", 1, 0)
    with theirs.inside("step"):
        assert (ours.part, ours.entries("step"), ours.steps) == ("step", 1, 0)
    assert (ours.part, ours.entries("between"), ours.steps) == ("between", 1, 1)
    theirs.enter("report")
    assert ours.part == "report" and ours.usual_s("step") > 0


def test_wants_kills(capsys: pytest.CaptureFixture[str]) -> None:
    assert kill_loop.main(["--kills", "0"]) == 2
    assert "--kills wants 1 or more, got 0" in capsys.readouterr().err
