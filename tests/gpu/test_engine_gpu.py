"""The whole engine on a GPU: near to float64, the same bits every time, and it learns alike."""

import copy

import pytest
import torch
from nearness import allowed, distance, loss_and_gradient, make_pair
from tiny import tiny_batch, tiny_config

from avmae_fast.config import AudioConfig, ModelConfig, StackConfig, VideoConfig
from avmae_fast.models import AudiovisualMAE
from avmae_fast.models.layout import TokenMask
from avmae_fast.reference import ReferenceMAE
from avmae_fast.train.optim import ReleasedAdamW, learning_rate, parameter_groups

SIZES = {
    "encoder": StackConfig(width=128, layers=3, heads=2, mlp=256),
    "decoder": StackConfig(width=96, layers=2, heads=3, mlp=192),
    "fusion_layers": 1,
}


def _to_cuda(batch: dict) -> dict:
    moved = {name: x.cuda() for name, x in batch.items() if name != "masks"}
    moved["audio"] = moved["audio"].float()
    moved["masks"] = {
        m: TokenMask(mask.visible.cuda(), mask.masked.cuda()) for m, mask in batch["masks"].items()
    }
    return moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decoding", ["joint", "shared", "separate"])
@pytest.mark.parametrize("fusion", ["early", "mid", "separate", "shared"])
def test_near_the_reference(fusion: str, decoding: str, dtype: torch.dtype) -> None:
    """At most twice as far from float64 as the dense model in the same precision."""
    config = tiny_config(**SIZES, fusion=fusion, decoding=decoding)
    engine, reference = make_pair(config, "cuda")
    batch = tiny_batch(config, batch=4)
    exact_loss, exact = loss_and_gradient(reference, batch)
    plain_model = copy.deepcopy(reference).float().cuda()
    batch = _to_cuda(batch)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        plain_loss, plain = loss_and_gradient(plain_model, batch)
        loss, gradient = loss_and_gradient(engine, batch)
    layers = config.encoder.layers + config.decoder.layers
    assert distance(gradient, exact) <= allowed(distance(plain, exact), layers, dtype)
    ulp = torch.finfo(dtype).eps
    assert abs(loss - exact_loss) <= 2 * abs(plain_loss - exact_loss) + 4 * ulp * abs(exact_loss)


def test_same_bits_every_time() -> None:
    config = tiny_config(**SIZES)
    engine, _ = make_pair(config, "cuda")
    batch = _to_cuda(tiny_batch(config, batch=8))
    with torch.autocast("cuda", torch.bfloat16):
        runs = [loss_and_gradient(engine, batch) for _ in range(20)]
    for loss, gradient in runs[1:]:
        assert torch.equal(loss, runs[0][0]) and torch.equal(gradient, runs[0][1])


def test_compiles_whole() -> None:
    config = tiny_config(**SIZES)
    engine, _ = make_pair(config, "cuda")
    batch = _to_cuda(tiny_batch(config, batch=4))
    loss, gradient = loss_and_gradient(engine, batch)
    compiled = torch.compile(engine, fullgraph=True)
    out = compiled(**batch)
    engine.zero_grad()
    out.loss.backward()
    flat = [p.grad.double().cpu().flatten() for _, p in sorted(engine.named_parameters())]
    assert distance(torch.cat(flat), gradient) <= 1e-5
    torch.testing.assert_close(out.loss.double().cpu(), loss, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_learns_as_the_reference_does() -> None:
    """200 steps of a ViT-S in bf16 end where the dense model does, within its own scatter.

    The scatter is the spread of the reference over three orders of the same batches.
    """
    config = ModelConfig.of_size(
        "S",
        video=VideoConfig(frames=8, height=64, width=64, tubelet=(2, 8, 8), mask_ratio=0.75),
        audio=AudioConfig(frames=128, mask_ratio=0.7),
    )
    ends = [_train(ReferenceMAE(config), config, order) for order in range(3)]
    engine = _train(AudiovisualMAE(config), config, 0)
    scatter = max(ends) - min(ends)
    assert abs(engine - ends[0]) <= max(scatter, 0.02 * ends[0]), (engine, ends)


def _train(model: torch.nn.Module, config: ModelConfig, order: int) -> float:
    """The mean loss of the last 20 of 200 steps on low-rank random clips that can be learned."""
    torch.manual_seed(0)
    fresh = AudiovisualMAE(config).state_dict()
    model.load_state_dict(fresh)
    model.cuda()
    optimizer = ReleasedAdamW(parameter_groups(model))
    losses = []
    for step, seed in enumerate(torch.randperm(200, generator=_seeded(order)).tolist()):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 1e-3, 200, 20)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**_to_cuda(_smooth_batch(config, seed))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return float(torch.stack(losses[-20:]).mean())


def _smooth_batch(config: ModelConfig, seed: int) -> dict:
    """Random masks, and inputs that are one colour and one pitch a clip."""
    batch = tiny_batch(config, batch=16, seed=seed)
    colour = torch.randint(0, 256, (16, 1, 1, 1, 3), dtype=torch.uint8, generator=_seeded(seed))
    level = torch.randn(16, 1, config.input("audio").mel_bins, generator=_seeded(seed))
    batch["video"] = colour.expand_as(batch["video"]).contiguous()
    batch["audio"] = level.double().expand_as(batch["audio"]).contiguous()
    return batch


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
