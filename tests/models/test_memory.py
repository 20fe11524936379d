"""Keeping less for the backward pass changes the memory, and no number."""

import pytest
import torch
from tiny import randomise, tiny_batch, tiny_config
from torch.multiprocessing.reductions import StorageWeakRef

from avmae_fast.models import AudiovisualMAE, blocks
from avmae_fast.models.blocks import set_checkpoint
from avmae_kernels.gelu import bias_gelu


def _forward(policy: str) -> tuple[AudiovisualMAE, torch.Tensor]:
    torch.manual_seed(0)
    config = tiny_config()
    model = AudiovisualMAE(config)
    randomise(model)
    set_checkpoint(model, policy)
    batch = tiny_batch(config)
    batch["audio"] = batch["audio"].float()
    return model, model(**batch).loss


def _step(policy: str, autocast: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model, loss = _forward(policy)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("policy", ["selective", "full"])
def test_gradients_are_the_same_to_the_bit(policy: str, autocast: bool) -> None:
    loss, gradients = _step("none", autocast)
    other_loss, other = _step(policy, autocast)
    assert torch.equal(loss, other_loss)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, other[name]), name


def test_unknown_policy_is_named() -> None:
    with pytest.raises(ValueError, match="checkpoint = 'some' must be 'none', 'selective' or"):
        set_checkpoint(AudiovisualMAE(tiny_config()), "some")


@pytest.mark.parametrize(("policy", "keeps"), [("none", True), ("selective", False)])
def test_activations_are_let_go(policy: str, keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between forward and backward no memory holds the output of a GELU."""
    seen = []

    def watched(*args: object) -> torch.Tensor:
        out = bias_gelu(*args)
        seen.append(StorageWeakRef(out.untyped_storage()))
        return out

    monkeypatch.setattr(blocks, "bias_gelu", watched)
    _, loss = _forward(policy)
    assert len(seen) == 3 + 3 + 2 - 1  # two stacks of two, a joint layer, two decoder layers
    assert loss.requires_grad
    assert all(ref.expired() != keeps for ref in seen)
