"""The roofline counts what the models are, and invents nothing for a card it does not know."""

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from avmae_fast.models import AudiovisualMAE
from avmae_fast.reference import ReferenceMAE
from benchmarks import roofline
from benchmarks.roofline_ops import NAMES, Op, operations, parameters
from benchmarks.tables import RESULTS
from benchmarks.workload import DATASETS, Workload, model_config


@pytest.mark.parametrize("dataset", DATASETS)
def test_parameters_are_the_model_s(dataset: str) -> None:
    model = model_config("L", dataset, tiny=True)
    counted = sum(p.numel() for p in AudiovisualMAE(model).parameters())
    assert parameters(model) == counted


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("name", ["A", "C"])
def test_products_are_those_that_run(name: str, dataset: str) -> None:
    """Every multiplication of a matrix product, forward and backward, counted as it runs."""
    work = Workload("B", dataset, 3, torch.device("cpu"), tiny=True)
    host = work.host_batches(1)[0]
    masks, mel = work.masks(host.clips.keys), host.mel
    model = (ReferenceMAE if name == "A" else AudiovisualMAE)(work.model)
    with FlopCounterMode(display=False) as counter:
        model(host.clips.video, mel, masks=masks).loss.backward()
    # The counter knows products; attention is not one of them here, in either model.
    products = (torch.ops.aten.mm, torch.ops.aten.addmm)
    counted = sum(counter.get_flop_counts()["Global"].get(op, 0) for op in products)
    ops = operations(work.model, 3, name)  # type: ignore[arg-type]
    if name == "C":
        # The engine's embedding is an operation of its own, which the counter does not look into.
        ops = [op for op in ops if not op.name.startswith("embed")]
    assert sum(op.flops for op in ops if op.kind == "product") == counted


def test_useful_flops_are_the_same_for_every_row() -> None:
    model = model_config("L", "audioset")
    flops = roofline.model_flops(model, 128)
    assert roofline.model_flops(model, 256) == pytest.approx(2 * flops, rel=1e-9)
    for name in NAMES:
        mine = sum(
            op.flops for op in operations(model, 128, name) if op.kind in ("product", "attention")
        )
        assert mine >= flops
    # By hand: encoder 2 * 12 D^2 FLOPs a token, layer and pass, three passes, over 306 tokens.
    encoder = 3 * 24 * 24 * 1024**2 * 306 * 128
    ops = operations(model, 128, "C")
    found = sum(op.flops for op in ops if op.kind == "product" and op.group == "encoder")
    assert found == pytest.approx(encoder, rel=1e-12)


def test_nothing_is_below_its_floor() -> None:
    for gpu in roofline.GPUS:
        for name in NAMES:
            for op in operations(model_config("B", "vggsound"), 64, name):
                assert roofline.expected_s(op, gpu, name) >= 0.999 * roofline.floor_s(op, gpu), op


def test_floor_is_the_longer_of_two() -> None:
    gpu = roofline.GPUS[0]
    assert roofline.floor_s(Op("", "", "product", gpu.matmul, 1.0), gpu) == 1.0
    assert roofline.floor_s(Op("", "", "pass", 1.0, 2 * gpu.copy), gpu) == 2.0
    assert roofline.floor_s(Op("", "", "copy", 0.0, gpu.link), gpu) == 1.0


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_cards(name: str, gpu: str | None) -> None:
    found = roofline.gpu_of(name)
    assert (found.name if found else None) == gpu


def _rounded(value: Any) -> Any:
    """With floats to ten digits: Python 3.12 sums them more exactly than 3.11."""
    if isinstance(value, dict):
        return {name: _rounded(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_rounded(x) for x in value]
    return float(f"{value:.10g}") if isinstance(value, float) else value


def test_saved_estimates_are_the_model_s() -> None:
    saved = json.loads((RESULTS / "model" / "roofline.json").read_text())
    fresh = [json.loads(json.dumps(roofline.asdict(p))) for p in roofline.everything()]
    assert _rounded(saved["rows"]) == _rounded(fresh), "run python -m benchmarks.roofline --json"
    assert {row["label"] for row in saved["rows"]} == {roofline.LABEL}


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--model", "B", "--row", "B+"]) == 0
    assert "not measured" in capsys.readouterr().out
    assert roofline.main(["--gpu", "RTX 4090"]) == 2
    assert "one of H200, H100, A100" in capsys.readouterr().err
