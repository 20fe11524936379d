"""The whole engine on its kernels: as near to the float64 reference as plain fp32 PyTorch is."""

import copy

import pytest
import torch
from nearness import allowed, distance, loss_and_gradient, make_pair
from tiny import tiny_batch, tiny_config

from avmae_fast.config import StackConfig

# head_dim 16, the least the attention kernels take; the second decoder block asks for a tail.
SIZES = {
    "encoder": StackConfig(width=32, layers=2, heads=2, mlp=48),
    "decoder": StackConfig(width=32, layers=2, heads=2, mlp=40),
    "fusion_layers": 1,
}
FUSIONS = ("early", "mid", "separate", "shared")
DECODINGS = ("joint", "shared", "separate")
CASES = [{"fusion": f, "decoding": d} for f in FUSIONS for d in DECODINGS] + [
    {"fusion": "mid", "decoding": "shared", "modality_tokens": True},
    {"fusion": "separate", "decoding": "separate", "positions": "learned"},
    {"fusion": "early", "decoding": "joint", "prefix_tokens": 1, "decoder_positions": "learned"},
    {"fusion": "shared", "decoding": "shared", "target_norm": "patch"},
    {"fusion": "early", "decoding": "shared", "objective": "inpainting"},
    {"fusion": "mid", "decoding": "joint", "objective": "inpainting_released", "gelu": "erf"},
]


@pytest.mark.parametrize("fields", CASES, ids=lambda f: "-".join(map(str, f.values())))
def test_engine(fields: dict) -> None:
    config = tiny_config(**SIZES, **fields)
    engine, reference = make_pair(config, "cpu")
    batch = tiny_batch(config, batch=2)
    exact_loss, exact = loss_and_gradient(reference, batch)
    batch["audio"] = batch["audio"].float()
    plain_loss, plain = loss_and_gradient(copy.deepcopy(reference).float(), batch)
    loss, gradient = loss_and_gradient(engine, batch)
    layers = config.encoder.layers + config.decoder.layers
    limit = allowed(distance(plain, exact), layers, torch.float32)
    assert distance(gradient, exact) <= limit
    ulp = torch.finfo(torch.float32).eps
    assert abs(loss - exact_loss) <= 2 * abs(plain_loss - exact_loss) + 4 * ulp * abs(exact_loss)
