"""Everything that is read fails with an error of its own kind, or reads; nothing else happens."""

import random
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from soak import fuzz, mutate
from soak.fuzz_targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_damage_is_told_or_borne(name: str) -> None:
    result = fuzz.fuzz(name, 200, workers=1)
    assert result["first_faults"] == []
    assert result["inputs"] == 200 == result["ok"] + sum(result["typed_errors"].values())
    # The inputs are neither all rubbish nor all whole.
    assert 0 < result["ok"] < 190


class _Careless:
    typed = (KeyError,)

    def __init__(self, folder: Path) -> None:
        self._errors = iter([KeyError("typed"), AttributeError("untyped")])

    def __call__(self, rng: random.Random) -> None:
        raise next(self._errors)


def test_faults_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # What a worker does to its process is not to be done to this one.
    monkeypatch.setattr("sys.addaudithook", lambda hook: None)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)
    monkeypatch.setattr("logging.disable", lambda: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TARGETS, "careless", _Careless)
    job = fuzz.FuzzJob("careless", tmp_path)
    outcomes = [job.run(fuzz.Input(number), nullcontext) for number in range(2)]
    assert outcomes == ["KeyError", "fault: AttributeError: untyped"]
    job.exclude(7, "timeout", "hangs")
    assert job.run(fuzz.Input(7), nullcontext) == "fault: timeout"


def test_what_is_done_outside_is_heard(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    code = f"""
import os, pickle, random, sys
from pathlib import Path
from soak.sandbox import Sandbox
inside = Path({str(inside)!r})
os.chdir(inside)
sandbox = Sandbox(inside)
sandbox.watching = True
(inside / "good").write_text("x")
os.rename("good", "better")
assert sandbox.take() == []
for number, act in enumerate((
    lambda: Path("../x").write_text("x"), lambda: os.rename("better", "../y"),
    lambda: os.symlink("z", "../z"), lambda: os.mkdir("../d"), lambda: os.remove("../x"),
    lambda: os.system("true"), lambda: pickle.loads(b"cos\\ngetcwd\\n."),
)):
    act()
    assert len(sandbox.take()) == 1, number
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_input_is_the_same_every_time() -> None:
    data = b'{"a": [1, 2, {"b": "c"}], "d": null}'
    for change in (mutate.change_json, mutate.damage_bytes):
        changed = [change(data, random.Random(n)) for n in range(40)]
        assert changed == [change(data, random.Random(n)) for n in range(40)]
        assert sum(one != data for one in changed) > 30


def test_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--count", "0"]) == 2
    assert "--count wants 1 or more, got 0" in capsys.readouterr().err
    for faults in (0, 3):
        monkeypatch.setattr(fuzz, "fuzz", lambda *_, faults=faults: {"faults": faults})
        assert fuzz.main(["--count", "5", "--target", "flax"]) == bool(faults)
