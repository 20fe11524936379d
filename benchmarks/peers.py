"""Training steps of other packages' models beside ours at equal shapes and dtype.

Video alone beside Hugging Face's VideoMAEForPreTraining, images beside ViTMAEForPreTraining, the
encoder alone beside timm's ViT. A step is forward, backward and fused AdamW on inputs that are on
the device; each package's model is timed as it comes and under torch.compile.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from avmae_fast.config import ENCODER_SIZES, ModelConfig, StackConfig, VideoConfig
from avmae_fast.models import AudiovisualMAE, Encoder, TokenMask
from avmae_kernels.masking import MaskSpec, sample_masks
from benchmarks import device as devices
from benchmarks import harness, results, timing
from benchmarks.kernel_cases import Unavailable
from benchmarks.roofline_ops import Tokens, tokens_of
from benchmarks.step_rows import autocast

_RATE = 1e-4

Loss = Callable[[], Tensor]
Built = tuple[nn.Module, Loss]


@dataclass(frozen=True)
class Contest:
    """One of our models and the package's that does the same.

    peer: builds the package's, raising `Unavailable` where it is not installed.
    """

    name: str
    config: ModelConfig
    masked: bool
    peer_name: str
    peer: Callable[["Contest", int, torch.device], Built]

    @property
    def video(self) -> VideoConfig:
        assert self.config.video is not None
        return self.config.video

    def masks(self, batch: int, device: torch.device) -> TokenMask:
        spec = MaskSpec("random", self.video.grid, self.video.mask_ratio)
        keys = np.arange(batch)
        return TokenMask.from_numpy(sample_masks(spec, keys, seed=0, modality="video"), device)


def contests(size: str, tiny: bool = False) -> list[Contest]:
    """Video, image and encoder alone, with the widths that the packages release."""
    encoder = ENCODER_SIZES[size]
    video = VideoConfig()
    image = VideoConfig(frames=1, tubelet=(1, 16, 16), mask_ratio=0.75)
    narrow = StackConfig(width=384, layers=4, heads=6, mlp=1536)
    wide = StackConfig(width=512, layers=8, heads=16, mlp=2048)
    if tiny:
        encoder = StackConfig(width=32, layers=2, heads=2, mlp=64)
        narrow = wide = StackConfig(width=16, layers=1, heads=2, mlp=32)
        video = VideoConfig(frames=4, height=32, width=32, tubelet=(2, 16, 16), mask_ratio=0.5)
        image = replace(image, height=32, width=32)

    def model(shape: VideoConfig, decoder: StackConfig) -> ModelConfig:
        return ModelConfig(
            encoder=encoder,
            decoder=decoder,
            video=shape,
            audio=None,
            fusion="shared",
            positions="sincos_grid",
        )

    return [
        Contest("video", model(video, narrow), True, "VideoMAEForPreTraining", _video_mae),
        Contest("image", model(image, wide), True, "ViTMAEForPreTraining", _vit_mae),
        Contest("encoder", model(image, wide), False, "timm VisionTransformer", _timm),
    ]


def _import(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # an installed package may break on import, too
        raise Unavailable(f"{module} is not installed or broken: {results.reason(error)}") from None


def _pixels(contest: Contest, batch: int, device: torch.device) -> Tensor:
    """Random clips in a package's layout, [B, T, 3, H, W] or [B, 3, H, W], normalised floats."""
    video = contest.video
    frames = (video.frames,) if video.frames > 1 else ()
    return torch.randn(batch, *frames, 3, video.height, video.width, device=device)


def _sizes(contest: Contest) -> dict[str, Any]:
    """The encoder's fields as Hugging Face calls them."""
    encoder, video = contest.config.encoder, contest.video
    return {
        "image_size": video.height,
        "patch_size": video.tubelet[1],
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.layers,
        "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.mlp,
        "decoder_num_attention_heads": contest.config.decoder.heads,
        "decoder_hidden_size": contest.config.decoder.width,
        "decoder_num_hidden_layers": contest.config.decoder.layers,
        "decoder_intermediate_size": contest.config.decoder.mlp,
        "norm_pix_loss": False,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "sdpa",
    }


def _video_mae(contest: Contest, batch: int, device: torch.device) -> Built:
    make, config = (
        _import("transformers", f"VideoMAE{name}") for name in ("ForPreTraining", "Config")
    )
    video = contest.video
    model = make(config(**_sizes(contest), num_frames=video.frames, tubelet_size=video.tubelet[0]))
    model.to(device)
    pixels = _pixels(contest, batch, device)
    masked = torch.zeros(batch, video.tokens, dtype=torch.bool, device=device)
    masked.scatter_(1, contest.masks(batch, device).masked, True)
    return model, lambda: model(pixel_values=pixels, bool_masked_pos=masked).loss


def _vit_mae(contest: Contest, batch: int, device: torch.device) -> Built:
    make, config = (
        _import("transformers", f"ViTMAE{name}") for name in ("ForPreTraining", "Config")
    )
    model = make(config(**_sizes(contest), mask_ratio=contest.video.mask_ratio)).to(device)
    pixels = _pixels(contest, batch, device)
    return model, lambda: model(pixel_values=pixels).loss


def _timm(contest: Contest, batch: int, device: torch.device) -> Built:
    make = _import("timm.models.vision_transformer", "VisionTransformer")
    encoder, video = contest.config.encoder, contest.video
    model = make(
        img_size=video.height,
        patch_size=video.tubelet[1],
        embed_dim=encoder.width,
        depth=encoder.layers,
        num_heads=encoder.heads,
        mlp_ratio=encoder.mlp / encoder.width,
        num_classes=0,
        global_pool="",
        class_token=False,
    ).to(device)
    pixels = _pixels(contest, batch, device)
    return model, lambda: model(pixels).float().square().mean()


def ours(contest: Contest, batch: int, device: torch.device) -> Built:
    """Our model on uint8 clips of the same shape."""
    video = contest.video
    shape = (batch, video.frames, video.height, video.width, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    if contest.masked:
        model = AudiovisualMAE(contest.config).to(device)
        mask = contest.masks(batch, device)
        return model, lambda: model(video=frames, masks={"video": mask}).loss
    encoder = Encoder(contest.config).to(device)
    return encoder, lambda: encoder(video=frames)["video"].float().square().mean()


def _compiled(build: Callable[..., Built], compiler: str) -> Callable[..., Built]:
    def built(contest: Contest, batch: int, device: torch.device) -> Built:
        model, loss = build(contest, batch, device)
        return model, torch.compile(loss, dynamic=False, backend=compiler)

    return built


def _stepper(built: Built, device: torch.device) -> timing.Call:
    """A training step; checked once for a finite loss and a gradient in every weight it uses."""
    model, loss = built
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, fused=True)

    def step(_: int) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device):
            value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    first = float(step(0))
    grads = [p.grad for p in parameters if p.grad is not None]
    if not first < float("inf") or not all(bool(g.isfinite().all()) for g in grads):
        raise AssertionError(f"loss {first} or a gradient is not finite")
    return step


def measure(args: argparse.Namespace, result: results.Result, deadline: results.Deadline) -> None:
    device = result.device
    result.extra["peer_versions"] = harness.versions("transformers", "timm")
    for contest in contests(args.model, args.tiny):
        batch = 2 if args.tiny else args.batch
        count: Tokens = tokens_of(contest.config, "video")
        shape = f"{contest.video.tokens} tokens" + f", {count.visible} visible" * contest.masked
        names = {"contest": contest.name, "model": args.model, "batch": batch, "shape": shape}
        candidates = {
            contest.peer_name: contest.peer,
            f"{contest.peer_name}, compiled": _compiled(contest.peer, args.compiler),
            "ours": ours,
        }
        calls: dict[str, timing.Call] = {}
        for name, build in candidates.items():
            try:
                if deadline.passed():
                    result.skip(results.OUT_OF_TIME, **names, candidate=name)
                    continue
                devices.reset_peak(device)
                calls[name] = _stepper(build(contest, batch, device), device)
            except Unavailable as error:
                result.skip(str(error), **names, candidate=name)
            except Exception as error:
                result.skip(error, **names, candidate=name)
        add_times(result, calls, batch, "candidate", names)
        calls.clear()
        devices.release(device)


def add_times(
    result: results.Result,
    calls: dict[str, timing.Call],
    batch: int,
    column: str,
    names: dict[str, Any],
) -> None:
    """Time training steps in turn, and add a row for each with its name in `column`."""
    device = result.device
    sample_s, warm_up_s = (0.5, 1.0) if device.type == "cuda" else (0.01, 0.0)
    times = timing.in_turn(calls, device, sets=1, rounds=4, sample_s=sample_s, warm_up_s=warm_up_s)
    for name, found in times.items():
        result.add(
            **names,
            **{column: name},
            ms=1e3 * found.median_s,
            ms_lower=1e3 * found.lower_quartile_s,
            ms_upper=1e3 * found.upper_quartile_s,
            clips_per_s=batch / found.median_s,
            peak_bytes=_peak(calls[name], device),
        )


def _peak(step: timing.Call, device: torch.device) -> int | None:
    """Bytes a step takes beyond what all candidates hold between steps."""
    if device.type != "cuda":
        return None
    devices.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    devices.reset_peak(device)
    step(0)
    devices.synchronize(device)
    peak = devices.peak_bytes(device)
    return None if peak is None else peak - before


def main(argv: list[str] | None = None) -> int:
    options = results.parser(__doc__ or "")
    options.add_argument("--model", choices=["B", "L"], default="B")
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--compiler", default="inductor", help="back end of torch.compile")
    return results.run("peers", options, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
