"""The page and its plots are made from saved results, and say so where there are none."""

import json
from pathlib import Path

import pytest

from benchmarks import page, plots, tables, targets

STEP = {
    "benchmark": "step",
    "gpu": "NVIDIA H200",
    "date": "2000-01-01T00:00:00+00:00",
    "rows": [
        {
            "model": size,
            "dataset": "audioset",
            "batch": 128,
            "row": row,
            "ms": ms,
            "ms_lower": ms - 1,
            "ms_upper": ms + 1,
            "clips_per_s": 128e3 / ms,
            "share_of_matmul_ceiling": 0.5,
            "peak_bytes": 5e10,
            "joules_per_clip": None,
        }
        for size in "BL"
        for row, ms in (("A", 300.0), ("B", 250.0), ("B+", 200.0), ("C", 100.0))
    ],
    "not_run": [{"model": "H", "dataset": "audioset", "batch": 128, "row": "A", "why": "full"}],
    "largest": [{"row": row, "batch": n} for row, n in (("A", 100), ("B+", 200), ("C", 300))],
    "profile": {"L audioset 128 C": {"groups": {"products": 60.0, "attention": 20.0}}},
    "ablation": [
        {"model": "L", "dataset": "audioset", "batch": 128, "variant": name, "ms": ms}
        for name, ms in (("whole engine", 100.0), ("PyTorch's GELU", 108.0))
    ],
}
KERNELS = {
    "benchmark": "kernels",
    "gpu": "NVIDIA H200",
    "date": "2000-01-02T00:00:00+00:00",
    "matmul_flops_per_s": 8e14,
    "copy_bytes_per_s": 4e12,
    "rows": [
        {
            "op": op,
            "shape": f"{n} tokens",
            "candidate": candidate,
            "direction": "training",
            "us": us,
            "tflops": 300.0 if op == "attention" else None,
            "tb_per_s": 1.0,
            "share_of_matmul_ceiling": 0.4 if op == "attention" else None,
            "share_of_copy_ceiling": 0.9,
            "max_error": 1e-3,
            "lengths": [n],
            "head_dim": 64,
        }
        for op, n in (("attention", 157), ("attention", 2064), ("add_layer_norm", 1))
        for candidate, us in (("ours", 10.0), ("sdpa-flash", 15.0), ("eager", 99.0))
    ],
    "not_run": [],
}


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "results" / "nvidia-h200"
    folder.mkdir(parents=True)
    (folder / "step-made-up.json").write_text(json.dumps(STEP))
    (folder / "kernels-made-up.json").write_text(json.dumps(KERNELS))
    monkeypatch.setattr(tables.results_of, "__defaults__", (folder.parent,))
    return folder.parent


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables.results_of, "__defaults__", (tmp_path,))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(page, "PLOTS", tmp_path)


def test_page_is_made_from_saved_results() -> None:
    text = page.PATH.read_text()
    assert page.filled(text) == text, "run python -m benchmarks.tables"


def test_links_exist() -> None:
    import re

    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.PATH.read_text()):
        assert (page.FOLDER / target).exists(), target


def test_what_is_not_measured_says_so(nothing: None) -> None:
    blocks = page.blocks()
    for name, text in blocks.items():
        assert tables.NOT_MEASURED in text or name == "predictions"
    assert "estimate" in blocks["predictions"] and "none was measured" in blocks["predictions"]
    for target in targets.targets():
        assert target.measured() == tables.NOT_MEASURED


def test_targets_are_read_off_results(measured: Path) -> None:
    found = {target.what: target.measured() for target in targets.targets()}
    assert found["step vs B+, ViT-B / L"] == "2.00× on NVIDIA H200 / 2.00× on NVIDIA H200"
    assert found["largest batch vs A / vs B+, ViT-L"] == "3.0× / 1.5× on NVIDIA H200"
    best = found["packed attention, ≤ 320 tokens, head_dim 64, vs the best library"]
    assert best == "1.50×..1.50× on NVIDIA H200"
    assert [text for what, text in found.items() if what.startswith("add_layer_norm")] == [
        "90..90 % on NVIDIA H200"
    ]
    assert found["step over its products and attention"] == tables.NOT_MEASURED


def test_tables_show_rows_and_misses(measured: Path) -> None:
    blocks = page.blocks()
    assert (
        "| ViT-L, audioset, 128 | C | 100.0 (99.0..101.0) | 1280 | 50 % | 50.0 |" in blocks["step"]
    )
    assert "- H, audioset, 128, A: full" in blocks["step"]
    assert "| attention | 157 tokens | ours | training | 10.0 | 300 |" in blocks["kernels"]


def test_plots_are_drawn_of_what_was_measured(measured: Path, tmp_path: Path) -> None:
    names = [path.name for path in plots.draw_all(measured, tmp_path / "plots")]
    assert names == [
        "nvidia-h200-step-B-audioset-128.png",
        "nvidia-h200-step-L-audioset-128.png",
        "nvidia-h200-waterfall-L-audioset-128-C.png",
        "nvidia-h200-ablation-L-audioset-128.png",
        "nvidia-h200-roofline-attention.png",
    ]
    assert all((tmp_path / "plots" / name).stat().st_size > 5000 for name in names)


def test_no_empty_plots(tmp_path: Path) -> None:
    assert plots.draw_all(tmp_path, tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()
