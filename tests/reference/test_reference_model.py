"""The dense reference against the numbers and properties the paper's description fixes."""

import dataclasses

import pytest
import torch

from avmae_fast.config import AudioConfig, ModelConfig, StackConfig, VideoConfig
from avmae_fast.reference import Mask, ReferenceMAE, draw_mask, masked_count

VIDEO = VideoConfig(frames=4, height=12, width=8, tubelet=(2, 4, 4), mask_ratio=0.5)
AUDIO = AudioConfig(frames=19, mel_bins=8, patch=(4, 4), mask_ratio=0.4)
STACK = StackConfig(width=24, layers=3, heads=2, mlp=32)
DECODER = StackConfig(width=16, layers=1, heads=2, mlp=24)


def _config(**fields: object) -> ModelConfig:
    base = {"encoder": STACK, "decoder": DECODER, "video": VIDEO, "audio": AUDIO}
    return ModelConfig(**{"fusion_layers": 1, **base, **fields})  # type: ignore[arg-type]


def _model(config: ModelConfig) -> ReferenceMAE:
    """Random weights everywhere, so that no zero initialisation hides a mistake."""
    torch.manual_seed(0)
    model = ReferenceMAE(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _batch(config: ModelConfig, size: int = 2) -> dict:
    generator = torch.Generator().manual_seed(1)
    arguments: dict = {"masks": {}}
    if config.video is not None:
        v = config.video
        shape = (size, v.frames, v.height, v.width, 3)
        arguments["video"] = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    if config.audio is not None:
        shape = (size, config.audio.frames, config.audio.mel_bins)
        arguments["audio"] = torch.randn(shape, dtype=torch.float64, generator=generator)
    for m in config.modalities:
        spec = config.input(m)
        arguments["masks"][m] = draw_mask(size, spec.tokens, spec.mask_ratio, generator)
    return arguments


def _millions(model: ReferenceMAE, prefixes: tuple[str, ...] = ("",)) -> float:
    names = dict(model.named_parameters())
    count = sum(p.numel() for name, p in names.items() if name.startswith(prefixes))
    return round(count / 1e6, 1)


# Encoder, whole model with one decoder, whole model with separate decoders; AudioSet geometry.
COUNTS = [
    ("S", "early", 22.0, 30.1, 37.2),
    ("S", "separate", 43.3, 51.4, 58.5),
    ("S", "mid", 39.7, 47.8, 54.9),
    ("B", "shared", 86.4, 94.8, 101.9),
    ("B", "separate", 171.5, 179.9, 187.0),
    ("B", "mid", 157.3, 165.7, 172.8),
    ("L", "early", 304.1, 318.7, 331.3),
    ("L", "separate", 606.5, 621.0, 633.7),
    ("L", "mid", 581.3, 595.8, 608.5),
]


@pytest.mark.parametrize(("size", "fusion", "encoder", "shared", "separate"), COUNTS)
def test_parameter_counts(
    size: str, fusion: str, encoder: float, shared: float, separate: float
) -> None:
    with torch.device("meta"):
        model = ReferenceMAE(ModelConfig.of_size(size, fusion=fusion))
        apart = ReferenceMAE(ModelConfig.of_size(size, fusion=fusion, decoding="separate"))
    assert _millions(model, ("encoder.", "patch_embed.")) == encoder
    assert _millions(model) == shared
    assert _millions(apart) == separate


@pytest.mark.parametrize("size", ["Ti", "H"])
def test_other_sizes_have_their_depth_and_width(size: str) -> None:
    config = ModelConfig.of_size(size)
    with torch.device("meta"):
        model = ReferenceMAE(config)
    depth = {"Ti": 12, "H": 32}[size]
    assert len(model.encoder["video"].blocks) + len(model.encoder["both"].blocks) == depth
    assert model.patch_embed["video"].weight.shape == ({"Ti": 192, "H": 1280}[size], 1536)


@pytest.mark.parametrize(
    ("frames", "ratio", "audio_visible", "encoder_tokens", "inpainted"),
    [(1000, 0.7, 149, 306, (1419, 339)), (800, 0.5, 200, 357, (1368, 243))],
    ids=["audioset", "vggsound"],
)
def test_released_token_counts(
    frames: int, ratio: float, audio_visible: int, encoder_tokens: int, inpainted: tuple[int, int]
) -> None:
    audio = AudioConfig(frames=frames, mask_ratio=ratio)
    tiny = StackConfig(width=4, layers=1, heads=1, mlp=4)
    config = ModelConfig(
        encoder=tiny, decoder=tiny, audio=audio, fusion="early", objective="inpainting_released"
    )
    assert config.video is not None
    visible = {
        m: config.input(m).tokens - masked_count(config.input(m).tokens, config.input(m).mask_ratio)
        for m in config.modalities
    }
    assert visible == {"video": 157, "audio": audio_visible}
    assert sum(visible.values()) == encoder_tokens
    with torch.no_grad():
        weights = ReferenceMAE(config).double()(**_batch(config, size=1)).weights
    assert (int(weights["video"].sum()), int(weights["audio"].sum())) == inpainted


def test_masked_tokens_do_not_reach_the_encoder() -> None:
    config = _config(fusion="early")
    model, batch = _model(config), _batch(config)
    before = model(**batch)
    masked = int(batch["masks"]["audio"].masked[0, 0])
    t, f = divmod(masked, config.input("audio").grid[1])
    batch["audio"] = batch["audio"].clone()
    batch["audio"][0, 4 * t : 4 * t + 4, 4 * f : 4 * f + 4] += 1.0
    after = model(**batch)
    torch.testing.assert_close(after.encoded, before.encoded, rtol=0, atol=0)
    assert after.losses["audio"] != before.losses["audio"]


@pytest.mark.parametrize("fusion", ["early", "mid", "separate", "shared"])
def test_where_the_modalities_meet(fusion: str) -> None:
    """A change of the sound reaches the encoded video in early and mid fusion, and only there."""
    config = _config(fusion=fusion)
    model, batch = _model(config), _batch(config)
    before = model.encode(batch["video"], batch["audio"])["video"]
    after = model.encode(batch["video"], batch["audio"] + 1.0)["video"]
    assert torch.equal(before, after) == (fusion in ("separate", "shared"))


@pytest.mark.parametrize("objective", ["reconstruction", "inpainting"])
@pytest.mark.parametrize("decoding", ["joint", "shared", "separate"])
def test_the_order_of_visible_tokens_does_not_matter(objective: str, decoding: str) -> None:
    config = _config(objective=objective, decoding=decoding, modality_tokens=True)
    model, batch = _model(config), _batch(config)
    shuffled = {
        m: Mask(mask.visible.flip(1), mask.masked.roll(1, dims=1))
        for m, mask in batch["masks"].items()
    }
    before, after = model(**batch), model(**{**batch, "masks": shuffled})
    for m in config.modalities:
        torch.testing.assert_close(after.predictions[m], before.predictions[m])
    torch.testing.assert_close(after.loss, before.loss)


def test_corrected_inpainting_shows_only_the_other_modality() -> None:
    """The decoder of the video sees visible sound at its own places, then video mask tokens."""
    config = _config(objective="inpainting", decoding="separate", modality_tokens=True)
    model, batch = _model(config), _batch(config)
    out = model(**batch)
    visible = batch["masks"]["audio"].visible
    count, width = visible.shape[1], config.decoder.width
    sequence = out.decoder_input["video"]
    assert sequence.shape == (2, count + VIDEO.tokens, width)
    table, token = model.get_buffer("decoder_pos_audio"), model.decoder_modality_token["audio"]
    shown = out.projected["audio"] + table[visible] + token
    torch.testing.assert_close(sequence[:, :count], shown, rtol=0, atol=1e-14)
    table, token = model.get_buffer("decoder_pos_video"), model.decoder_modality_token["video"]
    asked = model.mask_token["video"] + table + token
    torch.testing.assert_close(sequence[:, count:], asked.expand(2, -1, -1), rtol=0, atol=1e-14)
    assert out.weights["video"].min() == 1.0


def test_joint_inpainting_is_one_sequence_of_both_questions() -> None:
    """With one joint decoder the video's answers depend on the video shown to the sound."""
    config = _config(objective="inpainting", decoding="joint", fusion="separate")
    model, batch = _model(config), _batch(config)
    before = model(**batch).predictions["video"]
    batch["video"] = 255 - batch["video"]
    assert not torch.allclose(model(**batch).predictions["video"], before)
    apart = _config(objective="inpainting", decoding="separate", fusion="separate")
    model, batch = _model(apart), _batch(apart)
    before = model(**batch).predictions["video"]
    batch["video"] = 255 - batch["video"]
    torch.testing.assert_close(model(**batch).predictions["video"], before, rtol=0, atol=0)


def test_loss_by_hand() -> None:
    config = _config(audio=None, fusion="separate")
    config = dataclasses.replace(config, video=dataclasses.replace(VIDEO, loss_weight=0.25))
    model, batch = _model(config), _batch(config)
    valid = torch.tensor([0.0, 1.0])
    out = model(**batch, valid=valid)
    masked = batch["masks"]["video"].masked[1]
    error = (out.predictions["video"] - out.targets["video"])[1, masked]
    torch.testing.assert_close(out.losses["video"], error.square().mean(), rtol=1e-8, atol=0)
    torch.testing.assert_close(out.loss, 0.25 * out.losses["video"])


def test_one_modality_keeps_the_stacks_of_mid_fusion() -> None:
    """As released: with one modality the LayerNorm between the two stages stays."""
    config = _config(video=None, fusion="mid", fusion_layers=2)
    model = _model(config)
    assert {name: len(stack.blocks) for name, stack in model.encoder.items()} == {
        "audio": 1,
        "both": 2,
    }
    assert model(**_batch(config)).loss.isfinite()


def test_uint8_video_is_normalised() -> None:
    config = _config()
    model, batch = _model(config), _batch(config)
    pixels = batch["video"].double() * (2 / 255) - 1
    loss = model(**{**batch, "video": pixels}).loss
    torch.testing.assert_close(model(**batch).loss, loss)


def test_bad_inputs() -> None:
    config = _config()
    model, batch = _model(config), _batch(config)
    with pytest.raises(ValueError, match="audio is missing"):
        model(**{**batch, "audio": None})
    with pytest.raises(ValueError, match=r"video has shape \[2, 3, 12, 8, 3\], want"):
        model(**{**batch, "video": batch["video"][:, :3]})
    with pytest.raises(ValueError, match="masks must be given for"):
        model(**{**batch, "masks": {"video": batch["masks"]["video"]}})
    with pytest.raises(ValueError, match="shuffle belongs to objective"):
        model(**batch, shuffle={"video": None, "audio": None})
    model = _model(_config(objective="inpainting_released"))
    every = torch.arange(VIDEO.tokens).expand(2, -1)
    batch["masks"]["video"] = Mask(every, every[:, :0])
    with pytest.raises(ValueError, match="mask more of video"):
        model(**batch)
