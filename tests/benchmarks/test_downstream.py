"""The claim in miniature, at a size that shows only that all of it runs and is told right."""

import json
from pathlib import Path

import numpy as np
import pytest

from avmae_fast.data.manifest import load_manifest
from benchmarks import ablation, downstream, harness
from benchmarks.tables import ablation_table, downstream_table

TINY = ["--steps", "2", "--tune-steps", "1", "--labels", "1"]


@pytest.fixture
def few_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(downstream.CLIPS, "clips", 32)
    shorter = ["train.batch=4", "train.warmup_steps=0"]
    monkeypatch.setattr(downstream, "MODEL", [*downstream.MODEL, *shorter])


def test_a_run_and_its_table(few_clips: None, tmp_path: Path) -> None:
    out = tmp_path / "downstream.json"
    words = ["--folder", str(tmp_path), "--json", str(out), "--kinds", "A"]
    assert downstream.main([*words, *TINY, "--seeds", "2"]) == 0
    result = json.loads(out.read_text())
    assert result["accuracy"].keys() == {"1 A scratch", "1 A pretrained"}
    assert all(len(x) == 2 and 0 <= min(x) <= max(x) <= 1 for x in result["accuracy"].values())
    assert (result["test_clips"], result["pretraining_clips"]) == (8, 24)
    assert (tmp_path / "downstream.png").stat().st_size > 1000
    text = downstream_table(result)
    assert "| A | pretrained |" in text and "8 classes, chance 12.5%, 8 held-out clips" in text
    assert "| V |" not in text  # not measured, not shown


def test_labelled_clips_are_training_clips_and_as_many_of_each_class(
    few_clips: None, tmp_path: Path
) -> None:
    everything = downstream.make_clips(tmp_path)
    held_out = {record.path for record in everything.select("val")}
    chosen = []
    for seed in (0, 1):
        manifest = load_manifest(downstream.labelled(everything, tmp_path / "few.csv", 2, seed))
        assert np.bincount([record.label for record in manifest]).tolist() == [2] * 8
        chosen.append({record.path for record in manifest})
        assert not chosen[-1] & held_out
    assert chosen[0] != chosen[1]
    with pytest.raises(harness.BenchmarkError, match="--labels 4: class 0 has 3 training clips"):
        downstream.labelled(everything, tmp_path / "few.csv", 4, 0)
    unlabelled = load_manifest(tmp_path / "unlabelled.csv")
    assert not {record.path for record in unlabelled} & held_out
    assert not unlabelled.classes


@pytest.mark.slow
def test_the_ablation(few_clips: None, tmp_path: Path) -> None:
    out = tmp_path / "ablation.json"
    words = ["--folder", str(tmp_path), "--json", str(out), "--fusions", "early"]
    assert ablation.main([*words, *TINY, "--seeds", "1"]) == 0
    result = json.loads(out.read_text())
    assert result["accuracy"].keys() == {"early reconstruction", "early inpainting"}
    assert "| early |" in ablation_table(result)
