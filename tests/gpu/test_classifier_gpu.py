"""The classifier on a GPU: near to float64, and the same bits every time."""

import copy

import pytest
import torch
from nearness import allowed, distance
from tiny_classifier import (
    clips,
    dropped_of,
    engine_loss,
    make_classifiers,
    reference_loss,
    tiny_classifier_config,
)

from avmae_fast.config import StackConfig
from avmae_fast.finetune_config import ClassifierConfig
from avmae_fast.models import Classifier, DropPath

STACK = StackConfig(width=128, layers=4, heads=2, mlp=256)
CASES = [{"fusion": f} for f in ("bottleneck", "cross", "early", "late")] + [
    {"fusion": "bottleneck", "drop_path": 0.5},
    {"fusion": "early", "drop_path": 0.5, "drop_path_scaled": True},
    {"head": "attentive_probe"},
]


def _on_cuda(config: ClassifierConfig) -> tuple[dict, DropPath | None, dict | None]:
    batch = {m: x.cuda() for m, x in clips(config).items()}
    batch["audio"] = batch["audio"].float()
    dropped = dropped_of(config)
    if dropped is None:
        return batch, None, None
    moved = {name: mask.cuda() for name, mask in dropped.items()}
    return batch, DropPath.of(config, dropped, "cuda"), moved


def _loss_and_gradient(model: torch.nn.Module, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
    model.zero_grad()
    loss.backward()
    trained = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
    flat = [p.grad.double().cpu().flatten() for p in trained]
    return loss.detach().double().cpu(), torch.cat(flat)


def _engine_step(
    engine: Classifier, batch: dict, drop: DropPath | None
) -> tuple[torch.Tensor, ...]:
    # Labels are on the CPU, and so is the loss: what is compared is the model.
    out = engine(**batch, drop=drop)
    by_modality = {m: x.cpu() for m, x in out.by_modality.items()}
    on_cpu = type(out)(out.logits.cpu(), by_modality, out.features)
    return _loss_and_gradient(engine, engine_loss(on_cpu, engine.config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", CASES, ids=lambda f: "-".join(map(str, f.values())))
def test_near_the_reference(fields: dict, dtype: torch.dtype) -> None:
    """At most twice as far from float64 as the dense model in the same precision."""
    config = tiny_classifier_config(encoder=STACK, **fields)
    engine, reference = make_classifiers(config)
    for name, parameter in engine.named_parameters():
        # A frozen encoder is frozen in the reference only by detaching what comes out of it.
        reference.get_parameter(name).requires_grad_(parameter.requires_grad)
    engine, plain = engine.float().cuda(), copy.deepcopy(reference).float().cuda()
    out = reference(**clips(config), dropped=dropped_of(config))
    exact_loss, exact = _loss_and_gradient(reference, reference_loss(out, config))
    batch, drop, dropped = _on_cuda(config)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        out = plain(**batch, dropped=dropped)
        out = type(out)(out.logits.cpu(), {m: x.cpu() for m, x in out.by_modality.items()}, {}, {})
        plain_loss, rough = _loss_and_gradient(plain, reference_loss(out, config))
        loss, got = _engine_step(engine, batch, drop)
    assert distance(got, exact) <= allowed(distance(rough, exact), STACK.layers, dtype)
    ulp = torch.finfo(dtype).eps
    assert abs(loss - exact_loss) <= 2 * abs(plain_loss - exact_loss) + 4 * ulp * abs(exact_loss)


def test_same_bits_every_time() -> None:
    config = tiny_classifier_config(encoder=STACK, drop_path=0.5)
    engine, _ = make_classifiers(config)
    engine = engine.float().cuda()
    batch, drop, _ = _on_cuda(config)
    with torch.autocast("cuda", torch.bfloat16):
        runs = [_engine_step(engine, batch, drop) for _ in range(20)]
    for loss, gradient in runs[1:]:
        assert torch.equal(loss, runs[0][0]) and torch.equal(gradient, runs[0][1])
