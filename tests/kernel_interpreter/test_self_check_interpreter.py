"""The start-up check passes right kernels and rejects wrong ones."""

import logging
from typing import Any

import pytest
import torch

from avmae_kernels import (
    _library,
    assemble,
    attention_backends,
    attention_check,
    gelu,
    norm_kernels,
    patch_embed,
    reconstruction_loss_kernels,
    self_check,
)
from avmae_kernels.self_check import Use

CPU = torch.device("cpu")
USE = Use(
    dtype=torch.float16,
    widths=(20,),
    hidden=(64,),
    head_dims=(16,),
    video_patch=(2, 4, 4),
    audio_patch=(4, 8),
    target_norm="patch",
)
OPERATIONS = {
    "add_layer_norm",
    "assemble_decoder",
    "bias_gelu",
    "packed_attention",
    "patch_embed_visible",
    "reconstruction_loss",
}


@pytest.fixture(autouse=True)
def nothing_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_REJECTED", set())
    monkeypatch.setattr(attention_backends, "_REJECTED", set())
    # Attention's own lengths are a test of their own, and slow in the interpreter.
    monkeypatch.setattr(attention_check, "_LENGTHS", ((1, 9), (9, 9)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_right_kernels_pass(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    verdicts = self_check.self_check(CPU, Use(**{**vars(USE), "dtype": dtype}))
    assert {verdict.operation for verdict in verdicts} == OPERATIONS
    assert all(verdict.passed for verdict in verdicts), verdicts
    assert not caplog.records and not _library._REJECTED


class _OneWrongValue:
    """A kernel whose result `pointer` is right but for its last value."""

    def __init__(self, kernel: Any, pointer: str) -> None:
        self.kernel, self.place = kernel, kernel.arg_names.index(pointer)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.kernel[grid](*args, **options)
            args[self.place].view(-1)[-1] += 4

        return launch


@pytest.mark.parametrize(
    ("module", "kernel", "pointer", "operation"),
    [
        (norm_kernels, "_forward_kernel", "y_ptr", "add_layer_norm"),
        (norm_kernels, "_backward_kernel", "partial_ptr", "add_layer_norm"),
        (gelu, "_forward_kernel", "y_ptr", "bias_gelu"),
        (gelu, "_backward_kernel", "grad_z_ptr", "bias_gelu"),
        (assemble, "_assemble_kernel", "out_ptr", "assemble_decoder"),
        (patch_embed, "_add_position_kernel", "out_ptr", "patch_embed_visible"),
        (reconstruction_loss_kernels, "_total_kernel", "loss_ptr", "reconstruction_loss"),
        (reconstruction_loss_kernels, "_scale_kernel", "out_ptr", "reconstruction_loss"),
    ],
)
def test_one_wrong_value_is_rejected_aloud(
    module: Any,
    kernel: str,
    pointer: str,
    operation: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, kernel, _OneWrongValue(getattr(module, kernel), pointer))
    monkeypatch.setattr(attention_check, "self_check", lambda *_: {})
    with caplog.at_level(logging.WARNING):
        verdicts = self_check.self_check(CPU, USE)
    assert {v.operation for v in verdicts if not v.passed} == {operation}
    assert f"kernels of {operation} FAILED" in caplog.text
    caplog.clear()
    # From now on its meaning runs, and is right.
    assert all(verdict.passed for verdict in self_check.self_check(CPU, USE))
    assert not caplog.records


def test_nan_fails() -> None:
    assert not self_check.Verdict("add_layer_norm", "", float("nan")).passed
