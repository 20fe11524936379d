"""What users meet: shapes, errors, sizes, autocast, parameter names."""

import dataclasses

import pytest
import torch
from tiny import randomise, tiny_batch, tiny_config

from avmae_fast.config import AudioConfig, ConfigError, ModelConfig
from avmae_fast.models import AudiovisualMAE, Encoder, TokenMask
from avmae_kernels.yuv import i420_to_rgb


def test_encoder_shapes_at_full_size() -> None:
    """AudioSet shapes, ViT-B: 157 of 1568 video tokens and 149 of 496 audio tokens (paper 4.1)."""
    with torch.device("meta"):
        model = AudiovisualMAE(ModelConfig.of_size("B"))
        video = torch.empty(2, 16, 224, 224, 3, dtype=torch.uint8)
        audio = torch.empty(2, 1000, 128)
        masks = {
            "video": TokenMask(torch.empty(2, 157).long(), torch.empty(2, 1411).long()),
            "audio": TokenMask(torch.empty(2, 149).long(), torch.empty(2, 347).long()),
        }
    tokens = {m: model._embed(m, x, masks[m]) for m, x in (("video", video), ("audio", audio))}
    assert tokens["video"].shape == (2, 157, 768)
    assert tokens["audio"].shape == (2, 149, 768)


def test_encoder_weights_are_a_subset_of_the_autoencoder() -> None:
    config = tiny_config(modality_tokens=True)
    encoder, model = Encoder(config), AudiovisualMAE(config)
    own = set(encoder.state_dict())
    assert own < set(model.state_dict())
    encoder.load_state_dict({k: v for k, v in model.state_dict().items() if k in own})


def test_prefix_tokens_come_first_and_are_never_masked() -> None:
    config = tiny_config(prefix_tokens=2)
    model = AudiovisualMAE(config).double()
    batch = tiny_batch(config)
    inputs = {"video": batch["video"], "audio": batch["audio"]}
    for m, x in model.encode(inputs, batch["masks"]).items():
        assert x.shape[1] == 2 + batch["masks"][m].visible.shape[1]
    with pytest.raises(ConfigError, match="model.prefix_tokens = -1"):
        tiny_config(prefix_tokens=-1)
    with pytest.raises(ConfigError, match="model.objective = 'inpainting'.*prefix_tokens"):
        tiny_config(prefix_tokens=1, objective="inpainting")


def test_first_prediction_is_zero_as_released() -> None:
    config = tiny_config()
    out = AudiovisualMAE(config).double()(**tiny_batch(config))
    assert all(p.abs().max() == 0 for p in out.predictions.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": None}, "video: this model was configured with video, got none"),
        ({"video": torch.zeros(3, 4, 16, 16, 3)}, r"video has shape \[3, 4, 16, 16, 3\], this"),
        ({"audio": torch.zeros(2, 26, 16)}, "differ in their number of clips"),
        ({"audio": torch.zeros(3, 26, 15)}, r"audio has shape \[3, 26, 15\], this model wants"),
    ],
)
def test_wrong_inputs_are_named(change: dict, message: str) -> None:
    config = tiny_config()
    with pytest.raises(ValueError, match=message):
        AudiovisualMAE(config)(**{**tiny_batch(config), **change})


def test_planes_are_seen_as_the_pixels_they_stand_for() -> None:
    """Loss and gradients of a batch of planes against those of its RGB, bit for bit."""
    config = tiny_config(target_norm="patch")
    model, batch = AudiovisualMAE(config).double(), tiny_batch(config)
    randomise(model)
    _, frames, height, width, _ = batch["video"].shape
    planes = torch.randint(0, 256, (3, frames, height * 3 // 2, width), dtype=torch.uint8)
    results = []
    for video in (planes, i420_to_rgb(planes)):
        model.zero_grad()
        out = model(**{**batch, "video": video})
        out.loss.backward()
        results.append([out.loss, *(p.grad.clone() for p in model.parameters())])
    assert all(map(torch.equal, *results))


def test_superfluous_input_is_named() -> None:
    config = tiny_config(audio=None)
    batch = {**tiny_batch(config), "audio": torch.zeros(3, 26, 16)}
    with pytest.raises(ValueError, match="audio: this model was configured without audio"):
        AudiovisualMAE(config)(**batch)


def test_released_inpainting_needs_room_for_mask_tokens() -> None:
    audio = AudioConfig(frames=4, mel_bins=16, patch=(4, 4), mask_ratio=0.5)
    config = tiny_config(objective="inpainting_released", audio=audio)
    config = dataclasses.replace(config, video=dataclasses.replace(config.video, mask_ratio=0.1))
    with pytest.raises(ValueError, match=r"none is left to predict; raise video.mask_ratio"):
        AudiovisualMAE(config).double()(**tiny_batch(config))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"fusion": "late"},
            "model.fusion = 'late' is not valid: it must be one of 'early', 'mid'",
        ),
        ({"fusion_layers": 3}, r"model.fusion_layers = 3 is not valid: it must be in 1..2"),
        ({"video": None, "audio": None}, "model.video and model.audio"),
        ({"video": None, "objective": "inpainting"}, "model.objective"),
    ],
)
def test_wrong_configurations_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(**fields)


def test_unknown_size_is_named() -> None:
    with pytest.raises(ConfigError, match="model.size = 'XL' is not valid: it must be one of Ti"):
        ModelConfig.of_size("XL")


def test_autocast_keeps_the_residual_stream_and_the_loss_in_fp32() -> None:
    config = tiny_config()
    model = AudiovisualMAE(config)
    randomise(model)
    batch = tiny_batch(config)
    batch["audio"] = batch["audio"].float()
    exact = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**batch)
    assert rough.loss.dtype == torch.float32
    # bf16 keeps 8 bits; some hundred roundings in a chain of five blocks stay within 3 %.
    torch.testing.assert_close(rough.loss, exact.loss, rtol=0.03, atol=0.0)
    rough.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_floating_video_is_taken_as_normalised() -> None:
    config = tiny_config()
    model = AudiovisualMAE(config).double()
    randomise(model)
    batch = tiny_batch(config)
    floating = {**batch, "video": batch["video"].double() * (2 / 255) - 1}
    torch.testing.assert_close(model(**batch).loss, model(**floating).loss, rtol=1e-12, atol=0)


def test_same_seed_same_weights() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(7)
        weights.append(AudiovisualMAE(tiny_config()).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
