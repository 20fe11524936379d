"""The rows of fine-tuning agree in their first loss and come out in one file."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import finetune
from benchmarks.results import Result


def test_every_row_runs(tmp_path: Path) -> None:
    path = tmp_path / "finetune-B.json"
    options = ["--device", "cpu", "--tiny", "--compiler", "eager", "--json", str(path)]
    assert finetune.main(options) == 0
    found = json.loads(path.read_text())
    assert found["benchmark"] == "finetune" and found["not_run"] == [] and found["complete"]
    rows = {(row["modalities"], row["row"]) for row in found["rows"]}
    assert rows == {(letters, row) for letters in ("AV", "A", "V") for row in "ABC"}
    assert all(row["clips_per_s"] > 0 and row["peak_bytes"] is None for row in found["rows"])


def test_another_loss_is_refused() -> None:
    cpu, expected = torch.device("cpu"), [1.0]
    finetune._require_near(1.0 + 5e-6, expected, cpu)
    with pytest.raises(AssertionError, match="loss 1.001, the reference has 1"):
        finetune._require_near(1.001, expected, cpu)
    with pytest.raises(AssertionError):
        finetune._require_near(float("nan"), expected, cpu)


def test_a_row_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "Classifier", lambda config: torch.nn.Linear(1, 1))
    result = Result("finetune", torch.device("cpu"), None)
    args = finetune.results.parser("").parse_args(["--device", "cpu", "--tiny"])
    args.model, args.batch, args.compiler = "B", 2, "eager"
    finetune.measure(args, result, finetune.results.Deadline(None))
    assert {row["row"] for row in result.not_run} == {"A", "B", "C"} and not result.rows
