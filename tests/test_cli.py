"""The command line: exit codes, one-paragraph errors, and that --help needs no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from avmae_fast.cli import main
from avmae_fast.cli.synth import _SYNTH_PRESETS


def _refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message of a command that must be refused."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("avmae: error: ")
    # One paragraph, no traceback.
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    return captured.err


def test_help_and_version_load_nothing_heavy() -> None:
    code = (
        "import sys, contextlib\n"
        "from avmae_fast.cli import main\n"
        "for argv in (['--help'], ['pretrain', '--help'], ['--version']):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main(argv)\n"
        "print(sorted({'torch', 'numpy', 'matplotlib', 'av'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for word in ("pretrain", "synth", "probe-files", "--resume", "Exit codes"):
        assert word in done.stdout


@pytest.mark.parametrize("argv", [[], ["train"], ["pretrain"], ["pretrain", "demo", "--set"]])
def test_usage_errors(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2


def test_resume_and_restart_exclude_each_other() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", "demo", "--resume", "--restart"])
    assert stopped.value.code == 2


def test_bad_configurations(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "'none.toml' is neither" in _refused(capsys, "pretrain", "none.toml")
    assert "data.manifest is not set" in _refused(capsys, "pretrain", "demo")
    bad_key = ("--set", "data.manifest=x.csv", "--set", "train.bach=1")
    assert "did you mean 'batch'" in _refused(capsys, "pretrain", "demo", *bad_key)


def test_bad_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Whatever is wrong: code 2, and the output folder is not made."""
    out = tmp_path / "run"
    common = ("pretrain", "demo", "--set", f"train.out={out}", "--set", "data.cache=none")
    absent = tmp_path / "absent.csv"
    assert "absent.csv" in _refused(capsys, *common, "--set", f"data.manifest={absent}")
    empty = tmp_path / "empty.csv"
    empty.write_text("path\n")
    assert "lists no clips" in _refused(capsys, *common, "--set", f"data.manifest={empty}")
    assert not out.exists()


def test_synth(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "clips"
    size = ("--size", "32", "--seconds", "1", "--fps", "5", "--workers", "1")
    assert "clips is not set" in _refused(capsys, "synth", str(out))
    assert "clips = 0" in _refused(capsys, "synth", str(out), "--clips", "0")
    assert "size = 33" in _refused(capsys, "synth", str(out), "--clips", "2", "--size", "33")
    assert not out.exists()
    argv = ["synth", str(out), "--clips", "2", "--classes", "2", *size]
    assert main(argv) == 0
    assert (out / "manifest.csv").exists()
    assert "2 clips" in capsys.readouterr().out
    # An existing set of other parameters is left alone.
    assert "other parameters" in _refused(capsys, *argv, "--seed", "5")

    assert main(["probe-files", str(out)]) == 0
    assert "2 readable" in capsys.readouterr().out
    (out / "clips/torn.mp4").write_bytes(b"torn")
    assert main(["probe-files", str(out)]) == 1
    assert "BAD   clips/torn.mp4" in capsys.readouterr().out
    assert "is not a folder" in _refused(capsys, "probe-files", str(tmp_path / "absent"))


def test_synth_presets_are_complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from avmae_fast.data import synth

    asked = {}

    def note(out: str, **options: object) -> Path:
        asked.update(options)
        return Path(out) / "manifest.csv"

    monkeypatch.setattr(synth, "synthesise", note)
    assert main(["synth", str(tmp_path), "--preset", "demo", "--seed", "3"]) == 0
    asked.pop("progress")
    assert asked == _SYNTH_PRESETS["demo"] | {"seed": 3}
    # The demo is to have 96 clips or more.
    assert asked["clips"] >= 96


def test_other_exceptions_propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    from avmae_fast import config_file

    def broken(*_: object) -> None:
        raise KeyError("a fault of this program")

    monkeypatch.setattr(config_file, "load_config", broken)
    with pytest.raises(KeyError):
        main(["pretrain", "demo"])
