"""Add an update to the residual stream and normalise the sum: the seam between two sub-layers.

Shape letters: T tokens, D channels.
Source: pre-norm ViT blocks (arXiv:2010.11929, section 3.1); LayerNorm, arXiv:1607.06450;
stochastic depth, arXiv:1603.09382, is the scale of a row's update.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from avmae_kernels import norm_kernels
from avmae_kernels._check import wanted
from avmae_kernels._library import define, eager_float32_on_cpu, register_backward

MAX_WIDTH = 2048
_Forward = tuple[Tensor, Tensor, Tensor, Tensor]
_Backward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def add_layer_norm_reference(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    update_bias: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `add_layer_norm` must return, in plain PyTorch; it defines the operation."""
    total = x if update is None else _add(x, update, update_bias, row_scale)
    return total, F.layer_norm(total, (total.shape[-1],), weight, bias, eps)


def _add(x: Tensor, update: Tensor, update_bias: Tensor | None, row_scale: Tensor | None) -> Tensor:
    dtype = torch.promote_types(x.dtype, update.dtype)
    if update_bias is not None:
        update = update + update_bias
    if row_scale is not None:
        update = update * row_scale[..., None]
    return (x + update).to(dtype)


def _forward(
    x: Tensor,
    update: Tensor | None,
    update_bias: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> _Forward:
    """The sum (empty where it is x itself), its LayerNorm, and the mean and rstd of each row."""
    total = x if update is None else _add(x, update, update_bias, row_scale)
    wide = _statistics_dtype(total.dtype)
    y, mean, rstd = torch.native_layer_norm(
        total.to(wide), total.shape[-1:], weight.to(wide), bias.to(wide), eps
    )
    written = x.new_empty(0) if update is None else total
    return written, y.to(dtype), mean[..., 0], rstd[..., 0]


def _empty_forward(x: Tensor, update: Tensor | None, *rest: Any) -> _Forward:
    """Outputs of `_forward` for the same arguments, not yet written."""
    total = x.new_empty(0)
    if update is not None:
        total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, update.dtype))
    mean = x.new_empty(x.shape[:-1], dtype=_statistics_dtype(total.dtype))
    return total, torch.empty_like(x, dtype=rest[-1]), mean, torch.empty_like(mean)


def _by_kernel(*args: Any) -> _Forward:
    outs = _empty_forward(*args)
    norm_kernels.launch_forward(outs, *args[:-1])
    return outs


def _statistics_dtype(total: torch.dtype) -> torch.dtype:
    return torch.promote_types(total, torch.float32)


def _backward(
    grad_total: Tensor | None,
    grad_y: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    x_dtype: torch.dtype,
    update_dtype: torch.dtype | None,
    sums_update: bool,
) -> _Backward:
    """Gradients of x, of the update, of weight, bias and the update's bias, the last three wide.

    That of the update is empty where `update_dtype` is None: it equals that of x. That of its
    bias is empty unless asked for.
    """
    wide = mean.dtype
    grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_y.to(wide),
        total.to(wide),
        total.shape[-1:],
        mean[..., None],
        rstd[..., None],
        weight.to(wide),
        weight.to(wide),
        [True, True, True],
    )
    if grad_total is not None:
        grad += grad_total
    grad_update = grad if row_scale is None else grad * row_scale[..., None]
    grad_update_bias = mean.new_empty(0)
    if sums_update:
        grad_update_bias = grad_update.flatten(0, -2).sum(0)
    if update_dtype is None:
        grad_update = mean.new_empty(0)
    else:
        grad_update = grad_update.to(update_dtype, copy=grad_update is grad)
    return grad.to(x_dtype), grad_update, grad_weight, grad_bias, grad_update_bias


def _empty_backward(
    grad_total: Tensor | None,
    grad_y: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    row_scale: Tensor | None,
    x_dtype: torch.dtype,
    update_dtype: torch.dtype | None,
    sums_update: bool,
) -> _Backward:
    """Outputs of `_backward` for the same arguments, not yet written."""
    grad_update = mean.new_empty(0)
    if update_dtype is not None:
        grad_update = torch.empty_like(total, dtype=update_dtype)
    return (
        torch.empty_like(total, dtype=x_dtype),
        grad_update,
        mean.new_empty(weight.shape),
        mean.new_empty(weight.shape),
        mean.new_empty(weight.shape if sums_update else 0),
    )


def _backward_by_kernel(*args: Any) -> _Backward:
    outs = _empty_backward(*args)
    norm_kernels.launch_backward(outs, *args[:7])
    return outs


_add_layer_norm = define(
    "add_layer_norm(Tensor x, Tensor? update, Tensor? update_bias, Tensor? row_scale, "
    "Tensor weight, Tensor bias, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    meaning=_forward,
    kernels=_by_kernel,
    fake=_empty_forward,
)
_add_layer_norm_backward = define(
    "add_layer_norm_backward(Tensor? grad_total, Tensor grad_y, Tensor total, Tensor mean, "
    "Tensor rstd, Tensor weight, Tensor? row_scale, ScalarType x_dtype, "
    "ScalarType? update_dtype, bool sums_update) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    meaning=_backward,
    kernels=_backward_by_kernel,
    fake=_empty_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, update, update_bias, row_scale, weight, bias, _, _ = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(x if update is None else total, mean, rstd, weight, row_scale)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if t is None else t.dtype for t in (x, update, update_bias, bias)]


def _differentiate(
    ctx: Any, grad_total: Tensor | None, grad_y: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    total, mean, rstd, weight, row_scale = ctx.saved_tensors
    x, update, update_bias, bias = ctx.dtypes
    if grad_y is None:
        grad_y = torch.zeros_like(total)
    # Without a scale of its own the update has the gradient of x, if the dtypes agree as well.
    is_own = update is not None and (update != x or row_scale is not None)
    sums_update = update_bias is not None and ctx.needs_input_grad[2]
    grad_x, grad_update, grad_weight, grad_bias, grad_update_bias = _add_layer_norm_backward(
        None if update is None else grad_total,
        grad_y,
        total,
        mean,
        rstd,
        weight,
        row_scale,
        x,
        update if is_own else None,
        sums_update,
    )
    return (
        grad_x,
        None if update is None else grad_update if is_own else grad_x,
        grad_update_bias.to(update_bias) if sums_update else None,
        None,
        grad_weight.to(weight.dtype),
        grad_bias.to(bias),
        None,
        None,
    )


register_backward("add_layer_norm", _differentiate, _setup_context)


def add_layer_norm(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    update_bias: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(s, LayerNorm(s))` with `s = x + row_scale * (update + update_bias)`.

    Without an update `s` is x itself. The sum is taken in fp32 and rounded once; mean and
    variance are those of the rounded sum, in fp32.

    Args:
        x: residual stream, [T, D] (or more leading axes), fp32, bf16, fp16 or fp64, contiguous,
            D at most 2048. Differentiable.
        update: output of the preceding sub-layer, shape of x, contiguous, or None. Differentiable.
        weight, bias: scale and shift of the LayerNorm, [D]. Differentiable.
        eps: added to the biased variance (1e-6 in the released models).
        update_bias: bias of the product that made `update`, [D]; added here, it and its gradient
            cost no pass of their own. Differentiable.
        row_scale: factor of each row's update, [T] fp32, a constant: 0 or 1 / (1 - rate) for
            stochastic depth.

    Returns:
        The sum in the wider dtype of `x` and `update`, and its LayerNorm in the same dtype, or
        under autocast in autocast's: a float32 stream feeds bfloat16 products without a cast.

    Raises:
        ValueError: the shapes, dtypes or memory layouts are not as above.
    """
    op = "add_layer_norm"
    D = weight.shape[-1] if weight.ndim else 0
    if not 1 <= D <= MAX_WIDTH:
        raise wanted(op, f"weight [D] with D from 1 to {MAX_WIDTH}", weight=weight)
    if x.ndim < 2 or not weight.shape == bias.shape == x.shape[-1:]:
        want = "x [T, D], weight and bias of x's last axis"
        raise wanted(op, want, x=x, weight=weight, bias=bias)
    if not (x.is_floating_point() and x.is_contiguous()):
        raise wanted(op, "x of a float dtype, contiguous", x=x)
    if update is not None and not (update.shape == x.shape and update.is_contiguous()):
        raise wanted(op, "x and update of one shape, contiguous", x=x, update=update)
    _check_extras(x, update, update_bias, row_scale)
    dtype = x.dtype if update is None else torch.promote_types(x.dtype, update.dtype)
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    if eager_float32_on_cpu(x, update, update_bias, row_scale, weight, bias):
        total, y = add_layer_norm_reference(
            x, update, weight, bias, eps, update_bias=update_bias, row_scale=row_scale
        )
        return total, y.to(dtype)
    total, y, _, _ = _add_layer_norm(x, update, update_bias, row_scale, weight, bias, eps, dtype)
    return (x if update is None else total), y


def _check_extras(
    x: Tensor, update: Tensor | None, update_bias: Tensor | None, row_scale: Tensor | None
) -> None:
    extras = {"update_bias": update_bias, "row_scale": row_scale}
    given = {name: extra for name, extra in extras.items() if extra is not None}
    if update is None and given:
        raise wanted("add_layer_norm", f"an update where there is a {' and a '.join(given)}", x=x)
    if update_bias is not None and update_bias.shape != x.shape[-1:]:
        want = "update_bias of x's last axis"
        raise wanted("add_layer_norm", want, x=x, update_bias=update_bias)
    if row_scale is not None and (
        row_scale.shape != x.shape[:-1]
        or row_scale.dtype not in (torch.float32, torch.float64)
        or row_scale.requires_grad
        or not row_scale.is_contiguous()
    ):
        want = "row_scale a float32 constant for each row of x"
        raise wanted("add_layer_norm", want, x=x, row_scale=row_scale)
