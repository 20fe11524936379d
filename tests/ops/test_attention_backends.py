"""Which back end computes attention, and why; the libraries' own results where they are at hand."""

import importlib.machinery
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import offsets, self_problem, self_reference
from torch import Tensor

from avmae_kernels import attention_backends as backends
from avmae_kernels.attention import packed_attention
from avmae_kernels.attention_backends import BackendUnavailable
from avmae_kernels.attention_hopper import why_misplaced

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16


@pytest.mark.parametrize("fixed_length", [None, 6])
def test_sdpa_by_name(fixed_length: int | None) -> None:
    inputs = self_problem([6, 6], 2, 8, torch.float32) | {"fixed_length": fixed_length}
    out = packed_attention(**inputs, impl="sdpa")
    torch.testing.assert_close(out, self_reference(**inputs), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("triton", "it wants tensors on a CUDA device, these are on cpu"),
        ("triton-hopper", "it wants tensors on a CUDA device, these are on cpu"),
        ("sdpa-flash", "it wants tensors on a CUDA device, these are on cpu"),
        ("sdpa-cudnn", "it wants tensors on a CUDA device, these are on cpu"),
        ("torch-varlen", "it wants tensors on a CUDA device, these are on cpu"),
        ("flash-attn", "install flash-attn"),
        ("xformers", "install xformers"),
    ],
)
def test_absent_by_name(name: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("flash_attn_interface", "flash_attn", "flash_attn.cute", "xformers.ops"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(backends, "_importable", lambda module: module.startswith("torch."))
    inputs = self_problem([6, 6], 2, 8, torch.float32)
    with pytest.raises(BackendUnavailable, match=f"impl = '{name}' cannot run: .*{reason}"):
        packed_attention(**inputs, impl=name)


def test_torch_by_name_for_varying_and_fixed_lengths() -> None:
    """cuDNN makes a plan for every new shape, so it is not asked about varying ones."""
    inputs = self_problem([6, 6], 2, 8, torch.float32)
    q, k, v = inputs["qkv"].unbind(1)
    cu = inputs["cu_seqlens"]
    out = backends.attend("sdpa-flash", q, k, v, cu, cu, None)
    torch.testing.assert_close(out.flatten(1), self_reference(**inputs), rtol=0, atol=1e-6)
    with pytest.raises(BackendUnavailable, match="wants a fixed length"):
        backends.attend("sdpa-cudnn", q, k, v, cu, cu, None)


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("with_statistics", [False, True])
@pytest.mark.parametrize("fixed", [None, (5, 5)])
def test_flash_attn_is_called_as_its_versions_want(
    fixed: tuple[int, int] | None, with_statistics: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = self_problem([5, 5], 2, 8, torch.float32)
    cu, seen = inputs["cu_seqlens"], {}

    def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        seen.update(options)
        out = backends.attend("sdpa", q, k, v, cu, cu, None)
        return (out, None) if with_statistics else out

    _module(monkeypatch, "flash_attn_interface", flash_attn_varlen_func=flash_attn_varlen_func)
    out = backends.attend("flash-attn", *inputs["qkv"].unbind(1), cu, cu, fixed)
    assert torch.equal(out.flatten(1), self_reference(**inputs))
    assert seen["cu_seqlens_q"] is cu and seen["cu_seqlens_k"] is cu
    assert (seen["max_seqlen_q"], seen["max_seqlen_k"], seen["deterministic"]) == (5, 5, False)


def test_xformers_is_called_with_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    cu_q, cu_kv = offsets([2, 0]), offsets([3, 4])

    class BlockDiagonalMask:
        @classmethod
        def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: list[int]) -> tuple:
            return q_seqlen, kv_seqlen

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any) -> Tensor:
        assert attn_bias == ([2, 0], [3, 4])
        return backends.attend("sdpa", q[0], k[0], v[0], cu_q, cu_kv, None)[None]

    bias = types.SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)
    _module(monkeypatch, "xformers")
    _module(
        monkeypatch,
        "xformers.ops",
        fmha=types.SimpleNamespace(attn_bias=bias),
        memory_efficient_attention=memory_efficient_attention,
    )
    q, kv = torch.randn(2, 1, 8), torch.randn(7, 2, 1, 8)
    out = backends.attend("xformers", q, *kv.unbind(1), cu_q, cu_kv, None)
    expected = backends.attend("sdpa", q, *kv.unbind(1), cu_q, cu_kv, None)
    assert torch.equal(out, expected)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "kernels_usable", lambda: True)
    monkeypatch.setattr(backends, "HAVE_TRITON", True)


def _with_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *choices: dict) -> None:
    path = tmp_path / "attention.json"
    path.write_text(json.dumps({"measured_on": "some GPU", "choices": choices, "proven": []}))
    monkeypatch.setattr(backends, "TABLE", path)
    # Uncached, so that the shipped table is still there afterwards.
    for cached in (backends.table, backends.measured_choices):
        monkeypatch.setattr(backends, cached.__name__, cached.__wrapped__)


CHOICE = {"arch": 90, "length": "long", "head_dim": 64, "direction": "training"}


def test_shipped_table_has_nothing_that_was_not_measured() -> None:
    table = backends.table()
    assert (table["measured_on"] is None) == (not table["choices"])


@pytest.mark.usefixtures("hopper")
def test_auto_without_measurements_is_our_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_table(monkeypatch, tmp_path)
    for fixed_keys in (10, 2064, None):
        name, why = backends.explain(GPU, BF16, 64, fixed_keys, True)
        assert name == "triton" and "nothing measured for sm_90" in why


@pytest.mark.usefixtures("hopper")
def test_auto_follows_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_table(monkeypatch, tmp_path, CHOICE | {"impl": "sdpa-cudnn"})
    assert backends.choose(GPU, BF16, 64, 2064, True) == "sdpa-cudnn"
    # Another length, head_dim or direction is another entry.
    for others in ((64, 320, True), (64, None, True), (32, 2064, True), (64, 2064, False)):
        assert backends.choose(GPU, BF16, *others) == "triton"


@pytest.mark.usefixtures("hopper")
def test_auto_without_the_measured_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "_importable", lambda module: False)
    _with_table(monkeypatch, tmp_path, CHOICE | {"impl": "flash-attn"})
    backends._warn_once.cache_clear()
    for _ in range(2):
        assert backends.choose(GPU, BF16, 64, 2064, True) == "triton"
    (record,) = caplog.records
    assert "flash-attn" in record.message and "install flash-attn" in record.message


@pytest.mark.usefixtures("hopper")
def test_auto_takes_the_kernels_for_hopper_where_they_were_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_table(monkeypatch, tmp_path, CHOICE | {"impl": "triton-hopper"})
    assert backends.choose(GPU, BF16, 64, 2064, True) == "triton-hopper"
    assert backends.choose(GPU, BF16, 64, 306, True) == "triton"
    assert backends.may_choose_hopper(GPU, 64) and not backends.may_choose_hopper(GPU, 32)
    assert not backends.may_choose_hopper(CPU, 64)
    assert "long sequences, head_dim 64, training: triton-hopper (measured on some GPU)" in "".join(
        backends.describe(GPU, (64,))
    )


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("setting", "obstacle"),
    [
        ("float32", "it wants bfloat16 or float16, not float32"),
        ("head_dim", "it wants head_dim 32, 64, 128, not 80"),
        ("rejected", "it failed its self-check here"),
    ],
)
def test_auto_where_the_kernels_for_hopper_cannot_run(
    setting: str,
    obstacle: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    head_dim = 80 if setting == "head_dim" else 64
    _with_table(monkeypatch, tmp_path, CHOICE | {"impl": "triton-hopper", "head_dim": head_dim})
    monkeypatch.setattr(backends, "_REJECTED", set())
    if setting == "rejected":
        backends.reject("triton-hopper", GPU, BF16, 64)
    backends._warn_once.cache_clear()
    dtype = torch.float32 if setting == "float32" else BF16
    assert backends.choose(GPU, dtype, head_dim, 2064, True) == "triton"
    assert obstacle in caplog.text


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_kernels_for_hopper_elsewhere(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "HAVE_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    want = r"it wants compute capability 9.x \(Hopper\), this is {}.{}".format(*capability)
    assert re.fullmatch(want, backends.why_unavailable("triton-hopper", GPU) or "")


def test_auto_where_tensors_do_not_lie_right(caplog: pytest.LogCaptureFixture) -> None:
    """The choice is made by kinds of heads; where they lie is seen at each call."""
    whole = torch.zeros(8 * 3 * 2 * 32 + 1, dtype=torch.float16)
    q, k, v = whole[1:].view(8, 3, 2, 32).unbind(1)
    assert why_misplaced(q=k, k=k, v=v) == (
        "it wants tensors that start on a multiple of 16 bytes, q starts 130 bytes into its storage"
    )
    assert why_misplaced(q=q[:, :, ::1], k=whole[:-1].view(8, 3, 2, 32)[:, 1], v=v) is not None
    backends._warn_once.cache_clear()
    assert backends._not_hopper("some reason") == "triton"
    assert "triton-hopper cannot run: some reason" in caplog.text


@pytest.mark.parametrize("wrong", [{"impl": "fast"}, {"length": "medium"}, {"direction": "back"}])
def test_table_with_an_unknown_entry(
    wrong: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_table(monkeypatch, tmp_path, CHOICE | {"impl": "sdpa"} | wrong)
    with pytest.raises(ValueError, match="attention.json: not a choice"):
        backends.measured_choices()


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("setting", "obstacle"),
    [
        ("no triton", "Triton is not installed"),
        ("old GPU", "compute capability 8.0"),
        ("large heads", "head_dim up to 128"),
        ("rejected", "failed their self-check"),
    ],
)
def test_auto_where_our_kernels_cannot_run(
    setting: str,
    obstacle: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    head_dim = 160 if setting == "large heads" else 64
    monkeypatch.setattr(backends, "_REJECTED", set())
    if setting == "no triton":
        monkeypatch.setattr(backends, "kernels_usable", lambda: False)
    if setting == "old GPU":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    if setting == "rejected":
        backends.reject("triton", GPU, BF16, 64)
        assert backends.choose(GPU, torch.float16, 64, 10, True) == "triton"
    backends._warn_once.cache_clear()
    assert backends.choose(GPU, BF16, head_dim, 10, True) == "sdpa"
    assert obstacle in caplog.text


def test_description_on_a_cpu() -> None:
    lines = backends.describe(CPU)
    assert len(lines) == len(backends.BACKENDS) + 1
    assert "attention back end sdpa: ready" in lines


@pytest.mark.usefixtures("hopper")
def test_description_on_a_gpu() -> None:
    text = "\n".join(backends.describe(GPU, (64,)))
    assert "attention back end triton-hopper: ready" in text
    assert "auto, short sequences, head_dim 64, training: triton (" in text
    assert "proven on hardware: none yet" in text
