"""Ring 3: the engine's model equals the dense reference in loss, predictions and gradients.

Both run in float64, where packed and dense arithmetic differ by rounding alone: about 1e-15 an
operation. 1e-9 is far above what summation order can do and far below any mistake.
"""

import dataclasses
import itertools

import pytest
import torch
from tiny import randomise, tiny_batch, tiny_config

from avmae_fast.config import ModelConfig
from avmae_fast.models import AudiovisualMAE, TokenMask
from avmae_fast.reference import ReferenceMAE

FUSIONS = ("early", "mid", "separate", "shared")
DECODINGS = ("joint", "shared", "separate")
OBJECTIVES = ("reconstruction", "inpainting_released", "inpainting")
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def _pair(config: ModelConfig) -> tuple[AudiovisualMAE, ReferenceMAE]:
    engine, reference = AudiovisualMAE(config).double(), ReferenceMAE(config).double()
    randomise(engine)
    reference.load_state_dict(engine.state_dict())
    return engine, reference


def _assert_equal(config: ModelConfig, batch: dict) -> None:
    engine, reference = _pair(config)
    got, expected = engine(**batch), reference(**batch)
    torch.testing.assert_close(got.loss, expected.loss, **TOLERANCE)
    for m in config.modalities:
        torch.testing.assert_close(got.losses[m], expected.losses[m], **TOLERANCE)
        index = got.scored[m][..., None].expand_as(got.predictions[m])
        dense = expected.predictions[m].gather(1, index)
        torch.testing.assert_close(got.predictions[m], dense, **TOLERANCE)
    got.loss.backward()
    expected.loss.backward()
    gradients = dict(reference.named_parameters())
    for name, parameter in engine.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        torch.testing.assert_close(
            parameter.grad,
            gradients[name].grad,
            **TOLERANCE,
            msg=lambda text, n=name: f"{n}: {text}",
        )


@pytest.mark.parametrize(
    ("fusion", "decoding", "objective"), list(itertools.product(FUSIONS, DECODINGS, OBJECTIVES))
)
def test_loss_and_gradients(fusion: str, decoding: str, objective: str) -> None:
    config = tiny_config(fusion=fusion, decoding=decoding, objective=objective)
    _assert_equal(config, tiny_batch(config))


@pytest.mark.parametrize("objective", OBJECTIVES[:2])
@pytest.mark.parametrize("decoding", DECODINGS)
def test_loss_on_all_tokens(objective: str, decoding: str) -> None:
    config = tiny_config(objective=objective, decoding=decoding, loss_on="all")
    _assert_equal(config, tiny_batch(config))


@pytest.mark.parametrize(
    "options",
    [
        {"modality_tokens": True},
        {"positions": "learned"},
        {"positions": "sincos_grid"},
        {"decoder_positions": "learned"},
        {"middle_norm": False},
        {"prefix_tokens": 2},
        {"prefix_tokens": 1, "positions": "learned", "decoder_positions": "learned"},
        {"prefix_tokens": 1, "modality_tokens": True, "fusion": "early", "decoding": "joint"},
        {"prefix_tokens": 1, "audio": None, "fusion": "separate", "decoding": "separate"},
        {"prefix_tokens": 1, "loss_on": "all"},
        {"encoder_norm": False, "projection_bias": False},
        {"gelu": "erf", "layer_norm_eps": 1e-5},
        {"target_norm": "patch"},
        {"target_norm": "patch_channel"},
        {"loss_mean_over_patch": False},
        {"video": None},
        {"audio": None, "fusion": "mid"},
        {"audio": None, "fusion": "early"},
        {"modality_tokens": True, "objective": "inpainting", "decoding": "joint"},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_options(options: dict) -> None:
    config = tiny_config(**options)
    _assert_equal(config, tiny_batch(config))


def test_invalid_clips_are_left_out() -> None:
    config = tiny_config()
    batch = tiny_batch(config, batch=4)
    _assert_equal(config, {**batch, "valid": torch.tensor([1.0, 0.0, 1.0, 1.0])})


def test_order_of_visible_tokens_does_not_matter() -> None:
    """The encoder sees a set: any order of the index lists gives the same loss."""
    config = tiny_config(fusion="mid")
    engine, _ = _pair(config)
    batch = tiny_batch(config)
    shuffled = {
        m: TokenMask(mask.visible.flip(1), mask.masked.roll(3, dims=1))
        for m, mask in batch["masks"].items()
    }
    loss = engine(**batch).loss
    other = engine(**{**batch, "masks": shuffled}).loss
    torch.testing.assert_close(loss, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_features_of_all_tokens(fusion: str, prefix: int) -> None:
    config = tiny_config(fusion=fusion, prefix_tokens=prefix)
    engine, reference = _pair(config)
    batch = tiny_batch(config)
    inputs = {"video": batch["video"], "audio": batch["audio"]}
    got, expected = engine.encode(inputs, None), reference.encode(**inputs)
    for m in config.modalities:
        torch.testing.assert_close(got[m], expected[m], **TOLERANCE)


def test_nothing_masked_is_an_honest_zero() -> None:
    """With every token visible there is no target: loss 0 and no NaN anywhere."""
    video = dataclasses.replace(tiny_config().video, mask_ratio=0.0)
    config = tiny_config(video=video, audio=None)
    engine, _ = _pair(config)
    out = engine(**tiny_batch(config))
    assert out.loss.item() == 0.0
    out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in engine.parameters())
