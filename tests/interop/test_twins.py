"""Audio-MAE, MAE-ST and CAV-MAE are no packages: what they compute is written down here instead.

The encoder of each is retyped from its description with PyTorch's own layers, under the names of
its checkpoints, and fed with the input in its own layout.
"""

from types import ModuleType

import torch
from small import SHAPE, config_for, state_for
from torch import Tensor
from torch.nn import functional as F

from avmae_fast.interop.detect import detect
from avmae_fast.interop.exchange import export_weights, import_weights
from avmae_fast.interop.vit import Shape
from avmae_fast.models import TokenMask

Tensors = dict[str, Tensor]


def _norm(x: Tensor, t: Tensors, name: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)


def _linear(x: Tensor, t: Tensors, name: str) -> Tensor:
    return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])


def _block(
    x: Tensor, t: Tensors, name: str, heads: int, eps: float, norms: tuple[str, str]
) -> Tensor:
    h = _norm(x, t, f"{name}.{norms[0]}", eps)
    if f"{name}.attn.q.weight" in t:
        q, k, v = (_linear(h, t, f"{name}.attn.{part}") for part in "qkv")
    else:
        q, k, v = _linear(h, t, f"{name}.attn.qkv").chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    x = x + _linear((weights @ v).transpose(1, 2).flatten(2), t, f"{name}.attn.proj")
    h = _linear(_norm(x, t, f"{name}.{norms[1]}", eps), t, f"{name}.mlp.fc1")
    return x + _linear(F.gelu(h), t, f"{name}.mlp.fc2")


def test_audio_mae(timm: ModuleType) -> None:
    """Its encoder is timm's on one channel, time down and frequency across."""
    torch.manual_seed(0)
    theirs = timm.create_model(
        "vit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=4, img_size=(64, 128), in_chans=1
    ).eval()
    state = theirs.state_dict()
    assert detect(state) == "audiomae"
    imported = import_weights(state, shape=Shape(heads=4))
    audio = imported.config.audio
    assert (audio.frames, audio.mean, audio.std) == (64, -4.2677393, 2 * 4.5689974)
    mel = torch.randn(2, 64, 128)
    with torch.no_grad():
        wanted = theirs.forward_features(mel[:, None])
        got = imported.model()(audio=mel)["audio"]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_mae_st() -> None:
    t, _ = export_weights(config_for("mae-st"), state_for("mae-st"), "mae-st")
    video = torch.randint(0, 256, (2, 4, 16, 16, 3), dtype=torch.uint8)
    pixels = ((video.float() / 255 - 0.45) / 0.225).permute(0, 4, 1, 2, 3)
    conv = F.conv3d(
        pixels, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=(2, 8, 8)
    )
    x = conv.flatten(2).transpose(1, 2)
    spatial, temporal = t["pos_embed_spatial"], t["pos_embed_temporal"]
    x = x + spatial.repeat(1, 2, 1) + temporal.repeat_interleave(4, dim=1)
    x = torch.cat([(t["cls_token"] + t["pos_embed_class"]).expand(2, -1, -1), x], dim=1)
    for i in range(2):
        x = _block(x, t, f"blocks.{i}", 3, 1e-6, ("norm1", "norm2"))
    wanted = _norm(x, t, "norm", 1e-6)
    imported = import_weights(t, shape=SHAPE)
    assert imported.source == {"format": "mae-st", "pixels": "kinetics"}
    assert imported.config.video.frames == 4
    got = imported.model().encode({"video": video}, None)["video"]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def _cav_patches(x: Tensor, size: int) -> Tensor:
    """[B, c, h, w] to [B, N, size size c], as their loss cuts it."""
    x = x.unflatten(2, (-1, size)).unflatten(4, (-1, size))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def _cav_loss(pred: Tensor, patches: Tensor, mask: Tensor) -> Tensor:
    mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    error = (pred - (patches - mean) / (var + 1e-6).sqrt()).square().mean(-1)
    return (error * mask).sum() / mask.sum()


def _cav_mae(t: Tensors, mel: Tensor, picture: Tensor, masks: dict[str, Tensor]) -> Tensor:
    """The reconstruction loss; tokens that are masked, [B, N], are 1. Sound is [B, 1, F, T]."""
    maps = {"a": mel[:, None].transpose(2, 3), "v": picture}
    kept, places, tables = {}, {}, {}
    for letter, source in maps.items():
        conv = f"patch_embed_{letter}.proj"
        x = F.conv2d(source, t[f"{conv}.weight"], t[f"{conv}.bias"], stride=8)
        x = x.flatten(2).transpose(1, 2) + t[f"pos_embed_{letter}"] + t[f"modality_{letter}"]
        count = int((masks[letter][0] == 0).sum())
        places[letter] = masks[letter].argsort(dim=1, stable=True)[:, :count]
        x = x.gather(1, places[letter][..., None].expand(-1, -1, x.shape[-1]))
        norms = (f"norm1_{letter}", f"norm2_{letter}")
        kept[letter] = _block(x, t, f"blocks_{letter}.0", 3, 1e-5, norms)
    x = torch.cat([kept["a"], kept["v"]], dim=1)
    x = _norm(_block(x, t, "blocks_u.0", 3, 1e-5, ("norm1", "norm2")), t, "norm", 1e-5)
    x = _linear(x, t, "decoder_embed")
    parts = dict(zip("av", x.split([kept["a"].shape[1], kept["v"].shape[1]], 1), strict=True))
    for letter, part in parts.items():
        full = t["mask_token"].expand(*masks[letter].shape, -1)
        index = places[letter][..., None].expand_as(part)
        added = t[f"decoder_pos_embed_{letter}"] + t[f"decoder_modality_{letter}"]
        tables[letter] = full.scatter(1, index, part) + added
    x = torch.cat([tables["a"], tables["v"]], dim=1)
    for i in range(2):
        x = _block(x, t, f"decoder_blocks.{i}", 2, 1e-5, ("norm1", "norm2"))
    x = _norm(x, t, "decoder_norm", 1e-5)
    of_a, of_v = x.split([tables["a"].shape[1], tables["v"].shape[1]], dim=1)
    loss = _cav_loss(_linear(of_a, t, "decoder_pred_a"), _cav_patches(maps["a"], 8), masks["a"])
    return loss + _cav_loss(
        _linear(of_v, t, "decoder_pred_v"), _cav_patches(maps["v"], 8), masks["v"]
    )


def test_cav_mae() -> None:
    """Loss and gradients, with sound that runs along time first and pictures of their pixels."""
    theirs, _ = export_weights(
        config_for("cav-mae"), state_for("cav-mae"), "cav-mae", pixels="signed"
    )
    imported = import_weights(theirs, shape=SHAPE, pixels="signed")
    generator = torch.Generator().manual_seed(1)
    mel = torch.randn(2, 24, 128, generator=generator)
    picture = torch.randn(2, 3, 16, 16, generator=generator)
    # 16 frequencies of 3 times, time first; ours are numbered (time, frequency).
    visible = {
        "v": torch.tensor([[0], [3]]),
        "a": torch.stack([torch.randperm(48, generator=generator)[:12] for _ in range(2)]),
    }
    masks = {
        letter: torch.ones(2, n).scatter(1, visible[letter], 0.0)
        for letter, n in (("v", 4), ("a", 48))
    }
    ours_visible = {"video": visible["v"], "audio": visible["a"] % 3 * 16 + visible["a"] // 3}
    token_masks = {}
    for m, n in (("video", 4), ("audio", 48)):
        hidden = torch.ones(2, n).scatter(1, ours_visible[m], 0.0).nonzero()[:, 1].reshape(2, -1)
        token_masks[m] = TokenMask(ours_visible[m], hidden)

    leaves = {n: x.clone().requires_grad_() for n, x in theirs.items()}
    wanted = _cav_mae(leaves, mel, picture, masks)
    model = imported.model()
    clip = picture.permute(0, 2, 3, 1)[:, None]
    got = model(clip, mel, masks=token_masks).loss
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    got.backward()
    wanted.backward()
    # The shared projection gets what both of ours get.
    projection = sum(model.decoder_embed[m].weight.grad for m in ("video", "audio"))
    grads = {
        "decoder_embed.weight": projection,
        "blocks_u.0.attn.qkv.weight": model.encoder["both"].blocks[0].attn.qkv.weight.grad,
        "blocks_a.0.norm1_a.weight": model.encoder["audio"].blocks[0].norm1.weight.grad,
        "modality_v": model.modality_token["video"].grad[None, None],
    }
    for name, grad in grads.items():
        distance = (grad - leaves[name].grad).norm() / leaves[name].grad.norm()
        assert float(distance) < 1e-5, name
