"""The step benchmark as a command: every row runs on tiny shapes, the file says what was found."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import results, step
from benchmarks.largest import largest_batch
from benchmarks.profiles import group_of
from benchmarks.step_rows import ROWS

QUICK = ["--device", "cpu", "--tiny", "--batch", "2", "--steps", "1", "--compiler", "eager"]


def _run(tmp_path: Path, *options: str) -> dict:
    path = tmp_path / "step.json"
    assert step.main([*QUICK, "--model", "B", *options, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_every_row_and_column(tmp_path: Path) -> None:
    found = _run(tmp_path)
    assert (found["benchmark"], found["gpu"], found["complete"]) == ("step", "cpu", True)
    assert {"commit", "versions", "command", "device_state", "matmul_flops_per_s"} <= found.keys()
    assert sorted(row["row"] for row in found["rows"]) == sorted(ROWS)
    assert found["not_run"] == []
    for row in found["rows"]:
        assert {"model", "row", "batch", "clips_per_s", "peak_bytes"} <= row.keys()
        assert row["clips_per_s"] == pytest.approx(2e3 / row["ms"])
        assert len(row["samples_ms"]) == 2  # both passes
        assert row["gradient_error"] <= row["gradient_allowed"]
        # An unknown device has no datasheet, a CPU no memory of its own: nothing is guessed.
        assert row["share_of_datasheet"] is None and row["peak_bytes"] is None


def test_profile_and_largest_batch(tmp_path: Path) -> None:
    found = _run(tmp_path, "--rows", "C", "--profile", "--largest")
    (miss,) = found["largest"]
    assert "CPU" in miss["why"] and "batch" not in miss
    (profile,) = found["profile"].values()
    assert sum(profile["groups"].values()) > 0 and profile["kernels"][0]["calls"] > 0


def test_ladder(tmp_path: Path) -> None:
    found = _run(tmp_path, "--rows", "C", "--ablation", "--only", "attention by sdpa")
    variants = {row["variant"]: row for row in found["ablation"]}
    assert variants["attention by sdpa"]["ms"] > 0
    assert "cannot run" in variants["attention by sdpa-cudnn"]["why"]
    assert "ms" not in variants["attention by sdpa-cudnn"]


def test_the_fastest_mode_is_the_rival(tmp_path: Path) -> None:
    result = results.Result("step", torch.device("cpu"), tmp_path / "x.json")
    names = {"model": "B", "dataset": "audioset", "batch": 2}
    result.rows = [{**names, "row": "B+", "ms": 3.0, "clips_per_s": 1.0, "note": "first"}]
    result.extra["ablation"] = [
        {**names, "variant": "B+ in mode slow", "ms": 4.0, "clips_per_s": 0.8, "note": "slow"},
        {**names, "variant": "B+ in mode quick", "ms": 2.0, "clips_per_s": 1.5, "note": "quick"},
        {**names, "variant": "B+ in mode broken", "why": "out of memory"},
        {**names, "variant": "whole engine", "ms": 1.0, "clips_per_s": 9.0, "note": ""},
    ]
    step._promote_rival(result, names)
    (row,) = result.rows
    assert (row["row"], row["ms"], row["note"]) == ("B+", 2.0, "quick")


def test_a_row_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = step.build

    def broken(name: str, *args: object, **kwargs: object) -> object:
        if name == "B+":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return build(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(step, "build", broken)
    found = _run(tmp_path, "--rows", "A", "B+", "C")
    assert [row["row"] for row in found["rows"]] == ["A", "C"]
    (miss,) = found["not_run"]
    assert (miss["row"], miss["why"]) == ("B+", "out of memory")


def test_out_of_time_is_said_and_is_not_complete(tmp_path: Path) -> None:
    found = _run(tmp_path, "--budget-s", "0")
    assert found["rows"] == [] and not found["complete"]
    assert {row["why"] for row in found["not_run"]} == {results.OUT_OF_TIME}


@pytest.mark.parametrize(
    ("options", "match"),
    [(["--rows", "A", "D"], "--rows D not known"), (["--device", "cuda"], "no CUDA device")],
)
def test_bad_input(options: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert step.main([*QUICK, *options]) == 2
    assert match in capsys.readouterr().err


@pytest.mark.parametrize("limit", [128, 135, 136, 400, 1126, 5000])
@pytest.mark.parametrize("guess", [64, 300, 1200])
def test_largest_batch(limit: int, guess: int) -> None:
    tried = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    found = largest_batch(fits, 128, guess)
    low, high = found.bracket
    assert found.batch == low <= limit and low % 8 == 0
    assert high is not None and high > limit
    assert high - low <= max(8, 0.02 * low) + 8
    assert len(tried) == len(set(tried)) < 40


def test_largest_batch_stops_when_told() -> None:
    assert largest_batch(lambda batch: True, 128, 200, lambda: True).bracket == (128, None)


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "products"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "products"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("_add_layer_norm_kernel", "LayerNorm and residual"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimiser"),
        ("Memcpy HtoD (Pinned -> Device)", "copies and casts"),
        ("nothing known", "other"),
    ],
)
def test_groups_of_kernels(kernel: str, group: str) -> None:
    assert group_of(kernel) == group


def test_errors_become_one_line() -> None:
    assert results.reason(RuntimeError("first\nsecond")) == "RuntimeError: first"
    assert results.reason(torch.OutOfMemoryError("CUDA out of memory.")) == "out of memory"
    assert results.reason(OSError("no /opt/x/lib/a.so: 1/2")) == "OSError: no a.so: 1/2"
    assert results.reason(ValueError("")) == "ValueError: no message"
