"""The rows of the step benchmark compute the reference's loss and gradient, whatever is put back.

Each runs on tiny shapes; `Truth.check` raises where loss or gradient are too far from float64.
"""

from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from avmae_fast.config import ModelConfig
from avmae_fast.models import blocks
from avmae_kernels.attention import packed_attention
from benchmarks import put_back
from benchmarks.harness import BenchmarkError
from benchmarks.rival import Prefetcher, RivalMAE
from benchmarks.step import variants
from benchmarks.step_check import Truth
from benchmarks.step_rows import ROWS, EngineRow, RivalRow, build, random_masks
from benchmarks.workload import Workload, chunk_size, model_config

CPU = torch.device("cpu")


def _truth(dataset: str) -> Truth:
    work = Workload("B", dataset, 4, CPU, tiny=True, compiler="eager")
    return Truth(work, work.host_batches(1)[0])


@pytest.fixture(scope="module")
def truth() -> Truth:
    return _truth("audioset")


def _uncompiled(work: Workload) -> RivalRow:
    row = RivalRow(work)
    row._loss = row.model
    return row


@pytest.mark.parametrize("name", ["A", "C", "B+"])
def test_vggsound_s_separate_encoders(name: str) -> None:
    truth = _truth("vggsound")
    truth.check(_uncompiled(truth.work) if name == "B+" else build(name, truth.work))


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_the_reference(name: str, truth: Truth) -> None:
    row = build(name, truth.work)
    found = truth.check(row)
    assert 0 < found["gradient_allowed"] < 1e-5
    before = [p.detach().clone() for p in row.model.parameters()]
    row.step(truth.host, truth.host)
    row.park(CPU)
    row.step(truth.host, truth.host)
    after = list(row.model.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


ELSEWHERE = ("B+", "compile", "CUDA graphs")


@pytest.mark.parametrize("name", [n for n in variants() if not any(w in n for w in ELSEWHERE)])
def test_every_variant_is_the_engine(name: str, truth: Truth) -> None:
    try:
        truth.check(variants()[name](truth.work))
    except RuntimeError as error:
        assert "cannot run" in str(error)  # a back end that wants a GPU or a package
        assert "attention by" in name
    assert blocks.packed_attention is packed_attention


def test_graphs_want_a_gpu(truth: Truth) -> None:
    with pytest.raises(BenchmarkError, match="CUDA graphs want a GPU"):
        variants()["steps as CUDA graphs"](truth.work)


@pytest.mark.parametrize("name", ["B", "B+"])
def test_nothing_is_compiled_twice(name: str, truth: Truth) -> None:
    """Minutes on a GPU: the timed steps must run what the check compiled."""
    torch.compiler.reset()
    counters.clear()
    row = build(name, truth.work)
    truth.check(row)
    compiled = dict(counters["stats"])
    assert compiled["unique_graphs"] >= 1
    row.step(truth.host, truth.host)
    row.park(CPU)
    row.step(truth.host, truth.host)
    assert dict(counters["stats"]) == compiled


def test_a_wrong_gradient_is_not_timed(truth: Truth) -> None:
    def wrong(z: torch.Tensor, bias: torch.Tensor, approximate: str) -> torch.Tensor:
        return nn.functional.gelu(z + 1.001 * bias, approximate="tanh") * 1.001

    part = partial(put_back.replaced, blocks, bias_gelu=wrong)
    with pytest.raises(AssertionError, match="not the reference's"):
        truth.check(EngineRow(truth.work, part=part))


def test_a_part_that_is_gone_is_an_error() -> None:
    with pytest.raises(AttributeError), put_back.replaced(blocks, no_such_operation=None):
        pass


def test_a_failure_puts_the_part_back() -> None:
    before = blocks.bias_gelu
    with pytest.raises(ZeroDivisionError), put_back.replaced(blocks, bias_gelu=None):
        raise ZeroDivisionError
    assert blocks.bias_gelu is before


@pytest.mark.parametrize(
    "fields",
    [
        {"fusion": "early"},
        {"fusion": "shared", "decoding": "joint"},
        {"decoding": "separate", "target_norm": "patch", "loss_mean_over_patch": False},
        {"projection_bias": False, "encoder_norm": False},
    ],
    ids=str,
)
def test_the_rival_knows_other_presets(fields: dict) -> None:
    work = Workload("B", "audioset", 2, CPU, tiny=True, compiler="eager")
    values = {name: getattr(work.model, name) for name in work.model.__dataclass_fields__}
    work.__dict__["model"] = ModelConfig(**{**values, **fields})
    truth = Truth(work, work.host_batches(1)[0])
    truth.check(_uncompiled(work))


def test_the_rival_refuses_what_it_is_not() -> None:
    model = model_config("B", "audioset", tiny=True)
    values = {name: getattr(model, name) for name in model.__dataclass_fields__}
    with pytest.raises(BenchmarkError, match="presets' objective"):
        RivalMAE(ModelConfig(**{**values, "objective": "inpainting"}))


def test_masks_of_the_plain_rows_are_masks() -> None:
    work = Workload("B", "vggsound", 3, CPU, tiny=True)
    for m, mask in random_masks(work).items():
        both = torch.cat([mask.visible, mask.masked], 1).sort(dim=1).values
        assert torch.equal(both, torch.arange(work.model.input(m).tokens).expand(3, -1))


def test_prefetcher_gives_what_was_asked_for() -> None:
    first, second = torch.arange(3), torch.arange(4)
    assert torch.equal(Prefetcher(CPU).take((first,), (second,))[0], first)


def test_sizes_and_chunks() -> None:
    with pytest.raises(BenchmarkError, match="size 'XL'"):
        model_config("XL", "audioset")
    assert [chunk_size(n) for n in (128, 6, 7, 9, 11)] == [8, 6, 7, 3, 1]
    model = model_config("L", "vggsound")
    assert (model.fusion, model.encoder.width, model.input("audio").tokens) == (
        "separate",
        1024,
        400,
    )


def test_the_engine_s_inputs_are_those_of_the_batch(truth: Truth) -> None:
    """Also where the batch is not the one that was announced."""
    work = truth.work
    row = EngineRow(work)
    first, second, third = work.host_batches(3)
    for batch, coming in ((first, second), (second, first), (first, third), (second, third)):
        inputs = row._ahead(batch.clips, coming.clips)
        assert torch.equal(inputs["video"], batch.clips.video)
