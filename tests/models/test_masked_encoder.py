"""Clips of any length in one batch: each gets what it would get alone."""

import dataclasses
from typing import Any

import pytest
import torch
from tiny import AUDIO, VIDEO, randomise, tiny_batch, tiny_config
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import avmae_fast
from avmae_fast.config import Modality, ModelConfig, StackConfig
from avmae_fast.models import (
    AudiovisualMAE,
    Encoder,
    MaskedEncoder,
    PackedTokens,
    TokenMask,
    masked_encoder,
)

FUSIONS = ("early", "mid", "separate", "shared")
# Frames of each clip, rows of its spectrogram, and how many tokens of each are visible.
FRAMES, SIZES, ROWS = (4, 2, 6), ((16, 8), (8, 8), (12, 4)), (26, 9, 16)
VISIBLE = {"video": (5, 3, 1), "audio": (4, 0, 16)}


def make(config: ModelConfig) -> MaskedEncoder:
    torch.manual_seed(0)
    model = MaskedEncoder(config).double()
    randomise(model)
    return model


def varied(modalities: tuple[Modality, ...] = ("video", "audio")) -> dict[str, Any]:
    """Three clips of different sizes and numbers of visible tokens: arguments of the model."""
    draw = torch.Generator().manual_seed(2)
    clips = {
        "video": [
            torch.randint(0, 256, (t, *size, 3), dtype=torch.uint8, generator=draw)
            for t, size in zip(FRAMES, SIZES, strict=True)
        ],
        "audio": [torch.randn(rows, 16, dtype=torch.float64, generator=draw) for rows in ROWS],
    }
    tokens = {
        "video": [t // 2 * (h // 4) * (w // 4) for t, (h, w) in zip(FRAMES, SIZES, strict=True)],
        "audio": [rows // 4 * 4 for rows in ROWS],
    }
    keep = {
        m: [
            torch.randperm(n, generator=draw)[:v]
            for n, v in zip(tokens[m], VISIBLE[m], strict=True)
        ]
        for m in modalities
    }
    inputs = {"video_uint8": clips["video"], "audio": clips["audio"]}
    names = {"video": "video_uint8", "audio": "audio"}
    return {**{names[m]: inputs[names[m]] for m in modalities}, "keep": keep}


def alone(inputs: dict[str, Any], b: int) -> dict[str, Any]:
    """The arguments for clip b only."""
    names = [name for name in ("video_uint8", "audio") if name in inputs]
    keep = {m: [indices[b]] for m, indices in inputs["keep"].items()}
    return {**{name: [inputs[name][b]] for name in names}, "keep": keep}


def gradients(model: MaskedEncoder, *outputs: Tensor) -> list[Tensor]:
    """Of a weighted sum of all features."""
    tokens = torch.cat(outputs)
    weight = torch.arange(tokens.numel(), dtype=torch.float64).view(tokens.shape) % 7 - 3
    found = torch.autograd.grad(
        (tokens * weight).sum(), list(model.parameters()), allow_unused=True
    )
    return [torch.zeros(1) if grad is None else grad for grad in found]


def assert_near(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("positions", ["sincos1d", "sincos_grid", "learned"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_equals_the_encoder_on_clips_of_one_length(fusion: str, positions: str) -> None:
    model = make(tiny_config(fusion=fusion, positions=positions, modality_tokens=True))
    batch = tiny_batch(model.config)
    wanted = Encoder.forward(model, **batch)
    inputs = {"video_uint8": batch["video"], "audio": batch["audio"]}
    index = {m: mask.visible for m, mask in batch["masks"].items()}
    lists = {name: list(clips) for name, clips in inputs.items()}
    masks = {}
    for m, mask in batch["masks"].items():
        masks[m] = torch.zeros(3, model.config.input(m).tokens, dtype=torch.bool)
        masks[m].scatter_(1, mask.visible, True)
    for got in (model(**inputs, keep=index), model(**lists, keep=index)):
        assert got.layout.cu_seqlens.tolist() == [0, 16, 32, 48]
        for m, features in wanted.items():
            assert_near(torch.stack(got.clips(m)), features)
            assert_near(got.pad(m)[0], features)
            assert got.pad(m)[1].all()
    got = model(**inputs, keep=masks)
    for m, mask in batch["masks"].items():
        order = mask.visible.argsort(1)
        assert torch.equal(torch.stack(got.index[m]), mask.visible.gather(1, order))
        rows = order[..., None].expand_as(wanted[m])
        assert_near(torch.stack(got.clips(m)), wanted[m].gather(1, rows))
    everything, all_tokens = model(**inputs), Encoder.forward(model, batch["video"], batch["audio"])
    assert_near(everything.pad("audio")[0], all_tokens["audio"])


@pytest.mark.parametrize("positions", ["sincos_grid", "learned"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_prefix_tokens_come_first(fusion: str, positions: str) -> None:
    model = make(tiny_config(fusion=fusion, positions=positions, prefix_tokens=2))
    batch = tiny_batch(model.config)
    wanted = Encoder.forward(model, **batch)
    index = {m: mask.visible for m, mask in batch["masks"].items()}
    got = model(batch["video"], list(batch["audio"]), keep=index)
    for m, features in wanted.items():
        assert_near(torch.stack(got.clips(m)), features)
        assert got.index[m][0].tolist() == [-1, -2, *index[m][0].tolist()]
    if positions == "learned":
        return
    inputs = varied()
    got = model(**inputs)
    assert got.lengths("audio") == [6, 2, 18]
    for b in range(3):
        single = model(**alone(inputs, b))
        assert_near(got.clips()[b], single.tokens)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_each_clip_as_if_alone(fusion: str) -> None:
    """Features, and gradients as the sum over clips."""
    model = make(tiny_config(fusion=fusion, positions="sincos_grid"))
    inputs = varied()
    got = model(**inputs)
    singles = [model(**alone(inputs, b)) for b in range(3)]
    assert got.lengths() == [9, 3, 17] and got.tokens.shape == (29, 24)
    for b, single in enumerate(singles):
        for m in ("video", "audio"):
            assert_near(got.clips(m)[b], single.clips(m)[0])
    together = gradients(model, got.tokens)
    apart = gradients(model, *(single.tokens for single in singles))
    for a, b in zip(together, apart, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("positions", ["sincos1d", "sincos_grid"])
@pytest.mark.parametrize("fusion", ["early", "mid"])
def test_other_grids_as_an_encoder_made_for_them(fusion: str, positions: str) -> None:
    model = make(tiny_config(fusion=fusion, positions=positions))
    inputs = varied()
    got = model(**inputs)
    for b in (0, 2):
        (height, width), rows = SIZES[b], ROWS[b]
        video = dataclasses.replace(VIDEO, frames=FRAMES[b], height=height, width=width)
        audio = dataclasses.replace(AUDIO, frames=rows)
        config = dataclasses.replace(model.config, video=video, audio=audio)
        encoder = Encoder(config).double()
        encoder.load_state_dict(model.state_dict())
        clips = inputs["video_uint8"][b][None], inputs["audio"][b][None]
        masks = {m: TokenMask(i[b][None], i[b][None, :0]) for m, i in inputs["keep"].items()}
        for m, features in encoder(*clips, masks).items():
            assert_near(got.clips(m)[b], features[0])
        assert got.grids["video"][b] == video.grid and got.grids["audio"][b] == audio.grid


def test_positions_made_for_inference_serve_training_too() -> None:
    model = make(tiny_config(modality_tokens=True))
    inputs = varied()
    masked_encoder._kept_table.cache_clear()
    with torch.inference_mode():
        want = model(**inputs).tokens
    got = model(**inputs).tokens
    got.sum().backward()
    assert torch.equal(got, want)


def test_gradients_are_those_of_finite_differences() -> None:
    model = make(tiny_config(fusion="mid", modality_tokens=True))
    inputs = varied()
    names = ["patch_embed.video.weight", "patch_embed.audio.bias", "modality_token.audio"]
    names += ["encoder.both.blocks.0.attn.qkv.weight", "encoder.video.blocks.1.mlp.fc1.bias"]
    chosen = [model.get_parameter(name) for name in names]

    def features(*values: Tensor) -> Tensor:
        own = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, own, kwargs=inputs).tokens

    assert torch.autograd.gradcheck(features, chosen, fast_mode=True)


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_one_modality_of_two(modality: Modality) -> None:
    model = make(tiny_config(fusion="mid"))
    both, one = varied(), varied((modality,))
    got = model(**one)
    bare = model(**{**one, "keep": one["keep"][modality]})
    assert torch.equal(got.tokens, bare.tokens)
    assert list(got.index) == [modality]
    single = model(**alone(one, 2))
    assert_near(got.clips()[2], single.tokens)
    # Its joint layers attended to it alone.
    assert not torch.allclose(got.clips(modality)[2], model(**both).clips(modality)[2])


def test_padding() -> None:
    got = make(tiny_config(fusion="early"))(**varied())
    dense, real = got.pad()
    assert dense.shape == (3, 17, 24) and real.sum(1).tolist() == [9, 3, 17]
    assert torch.equal(dense[real], got.tokens)
    assert not dense[~real].any()
    audio, real = got.pad("audio")
    assert audio.shape == (3, 16, 24) and real.sum(1).tolist() == [4, 0, 16]
    assert torch.equal(got.clips("video")[1], got.clips()[1])


def test_shares_weights_with_an_encoder() -> None:
    autoencoder = AudiovisualMAE(tiny_config(modality_tokens=True))
    shared = MaskedEncoder.from_encoder(autoencoder)
    own = dict(shared.named_parameters())
    theirs = dict(autoencoder.named_parameters())
    assert own and all(theirs[name] is parameter for name, parameter in own.items())
    assert set(own) == set(dict(Encoder(autoencoder.config).named_parameters()))
    batch = tiny_batch(autoencoder.config)
    index = {m: mask.visible for m, mask in batch["masks"].items()}
    got = shared(batch["video"], batch["audio"].float(), index)
    wanted = Encoder.forward(autoencoder, batch["video"], batch["audio"].float(), batch["masks"])
    torch.testing.assert_close(got.pad("video")[0], wanted["video"])
    MaskedEncoder(shared.config).load_state_dict(Encoder(shared.config).state_dict())
    assert avmae_fast.MaskedEncoder is MaskedEncoder


def test_compiled_with_dynamic_shapes() -> None:
    """Other numbers of tokens, in one batch or from step to step, are not compiled anew."""
    torch._dynamo.reset()
    # One layer: what changes with the shapes lies before and after it.
    stack = StackConfig(width=24, layers=1, heads=3, mlp=40)
    model = make(tiny_config(encoder=stack, fusion="shared"))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    inputs = varied()
    audio = inputs["keep"]["audio"][2]
    seen = []
    # Sizes that occur nowhere else: the compiler takes equal ones to be one.
    for tokens in (13, 11, 10):
        inputs["keep"]["audio"][2] = audio[:tokens]
        got, want = compiled(**inputs), model(**inputs)
        assert isinstance(got, PackedTokens)
        assert_near(got.tokens, want.tokens)
        for a, b in zip(gradients(model, got.tokens), gradients(model, want.tokens), strict=True):
            assert_near(a, b)
        seen.append(counter.frame_count)
    assert seen == seen[:1] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_uint8": None, "audio": None, "keep": None}, "got neither"),
        ({"audio": [torch.zeros(26, 16)], "keep": None}, "differ in their number of clips"),
        ({"keep": [torch.arange(3)] * 3}, "keep of two modalities is a mapping"),
        ({"keep": {"video": [torch.arange(3)] * 3}}, "keep is for .'video'., the clips are"),
        ({"audio": [torch.zeros(2, 16)] * 3}, r"audio\[0\]: frames = 2 must be at least 4"),
        ({"audio": [torch.zeros(26, 16, 3)] * 3}, r"audio\[0\]: a clip is \[frames, mel_bins\]"),
        ({"video_uint8": [torch.zeros(4, 9, 8, 3)] * 3}, "height = 9 must be a multiple of 4"),
        ({"video_uint8": torch.zeros(4)}, "a batch of clips was expected"),
        ({"keep": {"video": [torch.arange(3)] * 2, "audio": None}}, "2 entries for 3 clips"),
        ({"keep": {"video": torch.zeros(3, 4), "audio": None}}, r"int64 \[V\], or bool \[16\]"),
        ({"keep": {"video": [torch.tensor([16])] * 3, "audio": None}}, "token 16 of 0 .. 15"),
        ({"keep": {"video": [torch.tensor([-1])] * 3, "audio": None}}, "token -1 of 0 .. 15"),
    ],
)
def test_bad_inputs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tiny_config())(**{**varied(), **change})


def test_what_a_model_was_not_made_for() -> None:
    with pytest.raises(ValueError, match=r"video: a clip has the grid \(1, 2, 2\), positions were"):
        make(tiny_config(positions="learned"))(**varied())
    with pytest.raises(ValueError, match="configured without audio"):
        make(tiny_config(audio=None, fusion="early"))(**varied())
    with pytest.raises(ValueError, match="an empty batch"):
        make(tiny_config())(torch.zeros(0, 4, 16, 8, 3))
