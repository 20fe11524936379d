"""`avmae doctor`: it tries what it reports, says what is wrong, and names nobody."""

import json
import logging
from pathlib import Path

import pytest
import torch

from avmae_fast import doctor
from avmae_fast.cli import main
from avmae_fast.doctor import Finding, examine
from avmae_kernels.self_check import Verdict

CPU = torch.device("cpu")
RIGHT = [Verdict("bias_gelu", "a case", 0.5)]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_TIMED_S", 0.0)


def _named(findings: tuple[Finding, ...], section: str) -> dict[str, Finding]:
    return {found.name: found for found in findings if found.section == section}


def test_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    assert main(["doctor", "--device", "cpu", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    record = json.loads(file.read_text())
    assert record["usable"] and record["obstacles"] == []
    assert text.splitlines()[-1] == "avmae_fast can train here"
    sections = {found["section"] for found in record["findings"]}
    wanted = "versions host GPU kernels attention data operations training"
    assert sections == set(wanted.split())
    for found in record["findings"]:
        assert f"{found['name']}: {found['text']}" in text
    tried = [f["name"] for f in record["findings"] if f["section"] == "operations"]
    assert {"packed_attention", "add_layer_norm", "patch_embed_visible"} < set(tried)
    for secret in (str(Path.home()), str(tmp_path)):
        assert secret not in text + file.read_text()


def test_wrong_kernels_are_told_and_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {"3072 channels": 7.0, "other": float("nan")}
    wrong = [Verdict("bias_gelu", case, share) for case, share in shares.items()]
    monkeypatch.setattr(doctor, "self_check", lambda device, use: RIGHT + wrong)
    diagnosis = examine(CPU)
    found = _named(diagnosis.findings, "operations")["bias_gelu"]
    assert not found.ok and "WRONG for 3072 channels, other; plain PyTorch" in found.text
    assert "  ! bias_gelu: WRONG" in str(diagnosis)
    # Its meaning takes over, so training goes on.
    assert diagnosis.usable


def test_an_error_is_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(device: torch.device, use: object) -> None:
        raise RuntimeError(f"no such file: {Path.home()}/driver\nand more")

    monkeypatch.setattr(doctor, "self_check", broken)
    assert main(["doctor", "--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "! RuntimeError: no such file: ~/driver and more" in text
    assert text.splitlines()[-1].endswith("cannot train here: operations failed with RuntimeError")


def test_what_training_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "self_check", lambda device, use: RIGHT)
    monkeypatch.setattr(doctor, "reader_problems", lambda: {"pyav": "No module named 'av'"})
    diagnosis = examine(CPU)
    assert diagnosis.obstacles == ("no reader of media files loads (pip install av)",)
    monkeypatch.setattr(doctor, "reader_problems", lambda: {"pyav": None})
    # A model that learns nothing.
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    assert "did not fall" in str(examine(CPU))
    assert not examine(CPU).usable


def test_bad_arguments(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor", "--json", str(tmp_path / "absent" / "x.json")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err
    monkeypatch.setattr(doctor, "self_check", lambda device, use: RIGHT)
    assert main(["doctor", "--device", "cpu", "--json", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["doctor", "--device", "abacus"]) == 2
    assert "--device abacus cannot be had" in capsys.readouterr().err


def test_masks_from_numpy_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from avmae_kernels import masking, masking_reference

    monkeypatch.setattr(masking, "implementation", lambda: masking_reference)
    with caplog.at_level(logging.WARNING):
        (found,) = (f for f in doctor._data() if f.name == "masks")
    assert "slower" in found.text
