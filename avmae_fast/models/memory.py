"""What a training step keeps for its backward pass, and what it computes a second time instead.

none       keeps every activation.
selective  keeps the residual stream and the products; LayerNorm and GELU are computed again, which
           costs a pass over memory each and saves six widths a token and block. The default.
full       keeps the input of each block and computes the block again.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

Checkpoint = Literal["none", "selective", "full"]


def product(
    x: Tensor, linear: nn.Linear, again: Callable[[], Tensor] | None, with_bias: bool = True
) -> Tensor:
    """`linear(x)`; where `again` is given, that is kept for the backward pass in place of `x`.

    Args:
        x: [T, D]. Differentiable.
        again: returns the values of `x` once more. It must hold no tensor that needs `x` itself,
            or nothing is saved. Under torch.compile the compiler decides, and it is not used.
    """
    bias = linear.bias if with_bias else None
    if again is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, linear.weight, bias)
    kept = _Again(again)
    # The graph holds on to `pack`, so it must not hold on to `x`.
    identity = (x.data_ptr(), x.numel(), x.dtype)

    def pack(tensor: Tensor) -> Any:
        is_x = (tensor.data_ptr(), tensor.numel(), tensor.dtype) == identity
        return (kept, tensor.shape) if is_x else tensor

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        recipe, shape = packed
        return recipe().view(shape)

    with saved_tensors_hooks(pack, unpack):
        return F.linear(x, linear.weight, bias)


class _Again:
    """Computes a value once more, outside the graph and in the autocast state of the first time."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._autocast = {
            device: torch.get_autocast_dtype(device)
            for device in ("cpu", "cuda")
            if torch.is_autocast_enabled(device)
        }

    @torch.no_grad()
    def __call__(self) -> Tensor:
        for device, dtype in self._autocast.items():
            with torch.autocast(device, dtype):
                return self._compute()
        return self._compute()
