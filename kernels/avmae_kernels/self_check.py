"""Does this GPU, with this compiler, compute rightly? Asked once at the start of a run.

Each operation runs on small inputs, forward and backward, by its kernels and by its meaning. One
whose kernels miss runs its meaning from then on in this process, after a warning: slower, and
right. Attention has a check of its own kind and libraries to fall back on (`attention_check`).
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avmae_kernels import attention_check
from avmae_kernels._library import meanings, reject
from avmae_kernels.assemble import assemble_decoder
from avmae_kernels.gelu import Approximation, bias_gelu
from avmae_kernels.norm import add_layer_norm
from avmae_kernels.patch_embed import patch_embed_visible
from avmae_kernels.reconstruction_loss import reconstruction_loss
from avmae_kernels.reconstruction_loss_kernels import TargetNorm

log = logging.getLogger(__name__)

# Sums of up to some hundred terms, in fp32 and in another order: sqrt(256) roundings apart. Wrong
# code is wrong by whole values.
_ROUNDINGS = 16
_TOKENS = 67


@dataclass(frozen=True)
class Use:
    """What a model asks of the operations: only these kernels are compiled and tried.

    Attributes:
        dtype: dtype of the products; parameters and the residual stream are float32.
        widths: channels of the residual streams.
        hidden: channels between the two layers of an MLP.
        head_dims: channels of an attention head.
        video_patch, audio_patch: sizes of a patch, None without that modality.
        planes: whether video comes as planes.
    """

    dtype: torch.dtype
    widths: Sequence[int]
    hidden: Sequence[int]
    head_dims: Sequence[int]
    video_patch: tuple[int, int, int] | None
    audio_patch: tuple[int, int] | None
    gelu: Approximation = "tanh"
    target_norm: TargetNorm = "none"
    planes: bool = False


@dataclass(frozen=True)
class Verdict:
    """How one operation did: its worst error as a share of what is allowed; above 1 is wrong."""

    operation: str
    case: str
    share: float

    @property
    def passed(self) -> bool:
        # A NaN does not.
        return self.share <= 1


@dataclass(frozen=True)
class _Case:
    operation: str
    name: str
    run: Callable[..., Any]
    inputs: Mapping[str, Any]
    differentiable: Sequence[str]


def self_check(device: torch.device, use: Use) -> list[Verdict]:
    """Try every kernel a model will use; reject those that are wrong. Milliseconds, once compiled.

    Call it before torch.compile or a CUDA graph fixes what is launched.
    """
    verdicts = [_try(case, device, use.dtype) for case in _cases(use)]
    for verdict in verdicts:
        if not verdict.passed:
            reject(verdict.operation)
            log.warning(
                "the kernels of %s FAILED their self-check on %s for %s (error %.3g times what is "
                "allowed): plain PyTorch is used instead. A newer ptxas (CUDA 13.1), named by "
                "TRITON_PTXAS_PATH, may help.",
                verdict.operation, device, verdict.case, verdict.share,
            )  # fmt: skip
    shares = attention_check.self_check(device, use.head_dims, [use.dtype])
    return verdicts + [
        Verdict("packed_attention", f"head_dim {head_dim} {dtype}", share)
        for (dtype, head_dim), share in shares.items()
    ]


def _cases(use: Use) -> Iterator[_Case]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    def narrow(*shape: int) -> Tensor:
        return normal(*shape).to(use.dtype)

    for D in use.widths:
        name = f"{D} channels {use.dtype}"
        stream = {"x": normal(_TOKENS, D), "update": narrow(_TOKENS, D), "eps": 1e-6}
        affine = {"weight": normal(D), "bias": normal(D), "update_bias": normal(D)}
        yield _Case(
            "add_layer_norm", name, add_layer_norm, stream | affine,
            ["x", "update", "weight", "bias", "update_bias"],
        )  # fmt: skip
        index = torch.randperm(2 * _TOKENS, generator=draw).view(2, 1, _TOKENS)
        sequence = {"tokens": narrow(1, _TOKENS, D), "token_index": index[0]}
        masked = {"mask_token": normal(D), "mask_index": index[1]}
        tables = {"token_pos": normal(2 * _TOKENS, D), "mask_pos": normal(2 * _TOKENS, D)}
        yield _Case(
            "assemble_decoder", name, assemble_decoder, sequence | masked | tables,
            ["tokens", "token_pos", "mask_token", "mask_pos"],
        )  # fmt: skip
    for M in use.hidden:
        inputs = {"z": narrow(_TOKENS, M), "bias": normal(M), "approximate": use.gelu}
        yield _Case("bias_gelu", f"{M} channels {use.dtype}", bias_gelu, inputs, ["z", "bias"])
    for source, patch in _sources(use, draw):
        T, *sides = source.shape[1:]
        if source.ndim == 4:
            sides[0] = sides[0] // 3 * 2
        tokens = math.prod(n // p for n, p in zip((T, *sides), patch, strict=False))
        scored = torch.arange(tokens)[None, ::2].contiguous()
        P, D = math.prod(patch) * (1 if source.ndim == 3 else 3), use.widths[0]
        name = f"patch {patch} {use.dtype}"
        layout = "I420" if source.ndim == 4 else "THWC"
        seen = {"source": source, "patch": patch, "layout": layout}
        embedding = {"weight": normal(D, P), "bias": normal(D), "pos": normal(tokens, D)}
        yield _Case(
            "patch_embed_visible", name, patch_embed_visible,
            seen | embedding | {"visible": scored}, ["weight", "bias", "pos"],
        )  # fmt: skip
        predicted = {"pred": narrow(1, scored.shape[1], P), "norm": use.target_norm}
        yield _Case(
            "reconstruction_loss", name, reconstruction_loss,
            seen | predicted | {"scored": scored}, ["pred"],
        )  # fmt: skip


def _sources(use: Use, draw: torch.Generator) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """A clip of some patches for each modality."""
    if use.video_patch is not None:
        t, h, w = use.video_patch
        shape = (1, 2 * t, 6 * h, 4 * w) if use.planes else (1, 2 * t, 3 * h, 3 * w, 3)
        yield torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw), use.video_patch
    if use.audio_patch is not None:
        rows, bins = use.audio_patch
        yield torch.randn(1, 4 * rows, 4 * bins, generator=draw), use.audio_patch


def _try(case: _Case, device: torch.device, dtype: torch.dtype) -> Verdict:
    """Kernels and meaning in the model's dtypes, both held against the meaning in float64."""
    inputs = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in case.inputs.items()}
    exact_inputs = {
        n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for n, x in inputs.items()
    }
    with torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        ours = _results(case, inputs)
        with meanings():
            plain = _results(case, inputs)
    exact = _results(case, exact_inputs)
    return Verdict(case.operation, case.name, _worst(map(_share, ours, plain, exact)))


def _results(case: _Case, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Outputs, and the gradients for a gradient that differs from place to place."""
    leaves = {n: inputs[n].clone().requires_grad_() for n in case.differentiable}
    outputs = case.run(**{**inputs, **leaves})
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    grads = [
        (torch.arange(y.numel(), device=y.device) % 7 - 3).view(y.shape).to(y.dtype)
        for y in outputs
    ]
    return [y.detach() for y in outputs] + list(
        torch.autograd.grad(outputs, list(leaves.values()), grads)
    )


def _share(got: Tensor, plain: Tensor, exact: Tensor) -> float:
    scale = exact.abs().max()
    allowed = 2 * (plain - exact).abs().max() + _ROUNDINGS * torch.finfo(got.dtype).eps * scale
    return ((got - exact).abs().max() / allowed).item()


def _worst(shares: Iterable[float]) -> float:
    found = list(shares)
    return math.nan if any(map(math.isnan, found)) else max(found)
