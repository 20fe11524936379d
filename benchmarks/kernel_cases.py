"""The operations that mostly move memory, each beside its eager meaning, its compilation and the
best library, at the shapes of ViT-B and ViT-L at a batch of 128."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avmae_fast.config import ModelConfig
from avmae_fast.models.encoder import input_shape, patch_of
from avmae_kernels.assemble import assemble_decoder, assemble_decoder_reference
from avmae_kernels.gelu import bias_gelu, bias_gelu_reference
from avmae_kernels.masking import MaskSpec, sample_masks
from avmae_kernels.norm import add_layer_norm, add_layer_norm_reference
from avmae_kernels.patch_embed import patch_embed_visible, patch_embed_visible_reference
from avmae_kernels.reconstruction_loss import (
    reconstruction_loss,
    reconstruction_loss_reference,
)
from benchmarks.harness import BenchmarkError
from benchmarks.roofline_ops import tokens_of
from benchmarks.workload import model_config

Inputs = tuple[Tensor, ...]
Call = Callable[..., Tensor | tuple[Tensor, ...]]
_EPS = 1e-6


class Unavailable(BenchmarkError):
    """A library that a row needs is not installed, or does not do this."""


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    make: random inputs; those that require a gradient are differentiated.
    calls: candidates by name. exact: the meaning, for inputs of higher precision.
    part: the rows of an output or gradient that are compared, where all would be too many.
    flops, bytes: useful arithmetic and least traffic, of the forward pass and of both passes.
    """

    op: str
    shape: str
    make: Callable[[], Inputs]
    calls: dict[str, Call]
    exact: Call
    flops: tuple[float, float]
    bytes: tuple[float, float]
    details: dict[str, Any] = field(default_factory=dict)
    part: Callable[[Tensor], Tensor] | None = None


def unavailable_call(why: str) -> Call:
    """A candidate that cannot be had."""

    def call(*_: Tensor) -> Tensor:
        raise Unavailable(why)

    return call


def library(module: str, make: Callable[[Any], Call]) -> Call:
    """A candidate out of an optional package, found when it is first called."""
    found: list[Call] = []

    def call(*args: Tensor) -> Tensor | tuple[Tensor, ...]:
        if not found:
            try:
                found.append(make(importlib.import_module(module)))
            except ImportError as error:
                package = module.partition(".")[0]
                raise Unavailable(f"{package} is not installed ({error})") from error
        return found[0](*args)

    return call


def memory_cases(device: torch.device, tiny: bool = False) -> list[Case]:
    """Every operation but attention."""
    found = []
    for size in ("B",) if tiny else ("B", "L"):
        model, batch = model_config(size, "audioset", tiny), 2 if tiny else 128
        counts = [tokens_of(model, m) for m in model.modalities]
        seen, total = sum(t.visible for t in counts), sum(t.total for t in counts)
        for stack, tokens in ((model.encoder, seen), (model.decoder, total)):
            found.append(_norm(device, batch * tokens, stack.width))
            found.append(_gelu(device, batch * tokens, stack.mlp))
        found.append(_embed(device, model, batch))
        found.append(_assemble(device, model, batch))
        found.append(_loss(device, model, batch))
    return found


def _low(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _candidates(ours: Call, meaning: Call, **libraries: Call) -> dict[str, Call]:
    compiled = torch.compile(meaning, dynamic=False)
    return {"ours": ours, "eager": meaning, "compiled": compiled, **libraries}


def _norm(device: torch.device, n: int, D: int) -> Case:
    low = _low(device)

    def make() -> Inputs:
        x, update = (torch.randn(n, D, device=device) for _ in range(2))
        weight, bias = (torch.randn(D, device=device) for _ in range(2))
        return tuple(t.requires_grad_() for t in (x, update.to(low), weight, bias))

    def liger(module: Any) -> Call:
        def call(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            total = x + update
            return total, module.LigerLayerNormFunction.apply(total, weight, bias, _EPS)

        return call

    wide, narrow = 4.0, float(low.itemsize)
    forward = (2 * wide + 2 * narrow) * n * D
    backward = (3 * wide + 2 * narrow) * n * D
    return Case(
        op="add_layer_norm",
        shape=f"[{n}, {D}]",
        make=make,
        calls=_candidates(
            partial(add_layer_norm, eps=_EPS),
            partial(add_layer_norm_reference, eps=_EPS),
            liger=library("liger_kernel.ops.layer_norm", liger),
        ),
        exact=partial(add_layer_norm_reference, eps=_EPS),
        flops=(0.0, 0.0),
        bytes=(forward, forward + backward),
    )


def _gelu(device: torch.device, n: int, M: int) -> Case:
    low = _low(device)

    def make() -> Inputs:
        z = torch.randn(n, M, device=device, dtype=low)
        return z.requires_grad_(), torch.randn(M, device=device).requires_grad_()

    meaning = partial(bias_gelu_reference, approximate="tanh")
    return Case(
        op="bias_gelu",
        shape=f"[{n}, {M}]",
        make=make,
        calls=_candidates(partial(bias_gelu, approximate="tanh"), meaning),
        exact=meaning,
        flops=(0.0, 0.0),
        bytes=(2.0 * low.itemsize * n * M, 5.0 * low.itemsize * n * M),
    )


def _masks(model: ModelConfig, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Visible and masked tokens of the video of random clips."""
    video = model.input("video")
    masks = sample_masks(
        MaskSpec("random", video.grid, video.mask_ratio), np.arange(batch), seed=0, modality="video"
    )
    visible, masked = (torch.from_numpy(x).long().to(device) for x in (masks.visible, masks.masked))
    return visible, masked


def _frames(model: ModelConfig, batch: int, device: torch.device) -> Tensor:
    shape = (batch, *input_shape(model.input("video")))
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)


def _embed(device: torch.device, model: ModelConfig, batch: int) -> Case:
    visible, _ = _masks(model, batch, device)
    D, P = model.encoder.width, model.input("video").patch_dim
    patch, low = patch_of(model, "video"), _low(device)

    def make() -> Inputs:
        weight = torch.randn(D, P, device=device) * P**-0.5
        pos = torch.randn(model.input("video").tokens, D, device=device)
        bias = torch.randn(D, device=device)
        video = _frames(model, batch, device)
        return video, weight.requires_grad_(), bias.requires_grad_(), pos

    def order(call: Callable[..., Tensor]) -> Call:
        return lambda video, weight, bias, pos: call(video, visible, weight, bias, pos, patch)

    n = float(visible.numel())
    forward = n * P + n * D * (low.itemsize + 4)
    return Case(
        op="patch_embed_visible",
        shape=f"{batch} clips, {visible.shape[1]} of {model.input('video').tokens} tokens, {D}",
        make=make,
        calls=_candidates(order(patch_embed_visible), order(patch_embed_visible_reference)),
        exact=order(patch_embed_visible_reference),
        flops=(2 * n * D * P, 4 * n * D * P),
        bytes=(forward, 2 * forward),
    )


def _assemble(device: torch.device, model: ModelConfig, batch: int) -> Case:
    visible, masked = _masks(model, batch, device)
    E, low = model.decoder.width, _low(device)

    def make() -> Inputs:
        tokens = torch.randn(*visible.shape, E, device=device, dtype=low)
        mask_token = torch.randn(E, device=device)
        table = torch.randn(model.input("video").tokens, E, device=device)
        return tokens.requires_grad_(), mask_token.requires_grad_(), table

    def order(call: Callable[..., Tensor]) -> Call:
        return lambda tokens, mask_token, table: call(
            tokens, visible, table, mask_token, masked, table
        )

    seen, every = float(visible.numel()) * E, float(visible.numel() + masked.numel()) * E
    forward = low.itemsize * seen + 4 * every
    return Case(
        op="assemble_decoder",
        shape=f"{batch} clips, {visible.shape[1]} + {masked.shape[1]} tokens, {E}",
        make=make,
        calls=_candidates(order(assemble_decoder), order(assemble_decoder_reference)),
        exact=order(assemble_decoder_reference),
        flops=(0.0, 0.0),
        bytes=(forward, 2 * forward),
    )


def _loss(device: torch.device, model: ModelConfig, batch: int) -> Case:
    _, masked = _masks(model, batch, device)
    P, patch, low = model.input("video").patch_dim, patch_of(model, "video"), _low(device)

    def make() -> Inputs:
        pred = torch.randn(*masked.shape, P, device=device, dtype=low)
        return pred.requires_grad_(), _frames(model, batch, device)

    def order(call: Callable[..., Tensor]) -> Call:
        return lambda pred, video: call(pred, video, masked, patch, "none", None, True)

    values = float(masked.numel()) * P
    return Case(
        op="reconstruction_loss",
        shape=f"{batch} clips, {masked.shape[1]} tokens of {P} values",
        make=make,
        calls=_candidates(order(reconstruction_loss), order(reconstruction_loss_reference)),
        exact=order(reconstruction_loss_reference),
        flops=(0.0, 0.0),
        bytes=(values * (low.itemsize + 1), values * (2 * low.itemsize + 1)),
    )
