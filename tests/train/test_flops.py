"""The arithmetic of a step against what the engine really multiplies."""

from typing import Any

import pytest
import torch
from tiny import tiny_batch, tiny_config
from torch.utils.flop_counter import FlopCounterMode

from avmae_fast.config import ModelConfig
from avmae_fast.models import AudiovisualMAE
from avmae_fast.train.flops import clip_flops, peak_flops

BATCH = 2


def _attention(queries: torch.Tensor, keys: torch.Tensor, width: int) -> int:
    pairs = zip(queries.diff().tolist(), keys.diff().tolist(), strict=True)
    return sum(4 * q * k * width for q, k in pairs)


def _raw(formula: Any) -> Any:
    formula._get_raw = True
    return formula


# What the counter cannot see into: the engine's own operations.
FORMULAS = {
    torch.ops.avmae.packed_attention: _raw(
        lambda qkv, cu, *_, out_val=None, **__: _attention(cu, cu, qkv.shape[2] * qkv.shape[3])
    ),
    torch.ops.avmae.packed_query_attention: _raw(
        lambda q, kv, cu_q, cu_kv, *_, out_val=None, **__: _attention(
            cu_q, cu_kv, q.shape[1] * q.shape[2]
        )
    ),
    torch.ops.avmae.patch_embed_visible: _raw(
        lambda *args, out_val=None, **__: 2 * out_val.numel() * args[7].shape[1]
    ),
}


@pytest.mark.parametrize(
    "fields",
    [
        {"fusion": fusion, "decoding": decoding}
        for fusion in ("early", "mid", "separate", "shared")
        for decoding in ("joint", "shared", "separate")
    ]
    + [
        {"objective": "inpainting"},
        {"objective": "inpainting_released"},
        {"loss_on": "all"},
        {"audio": None, "fusion": "early"},
        {"prefix_tokens": 1},
        {"prefix_tokens": 2, "fusion": "early", "decoding": "joint"},
    ],
    ids=str,
)
def test_counts_what_is_multiplied(fields: dict[str, Any]) -> None:
    config: ModelConfig = tiny_config(**fields)
    model, batch = AudiovisualMAE(config).double(), tiny_batch(config, batch=BATCH)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        model(**batch)
    assert 3 * counter.get_total_flops() == BATCH * clip_flops(config)


def test_unknown_devices_have_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu")) is None
    names = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H100 PCIe": 756.0e12, "Quadro": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak
