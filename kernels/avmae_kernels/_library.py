"""How an operation is registered: one schema, its meaning on a CPU, its kernels on a GPU.

`torch.library`'s define and impl are used rather than custom_op: half the time a call.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from avmae_kernels._triton import INTERPRET, kernels_usable

LIBRARY = torch.library.Library("avmae", "FRAGMENT")

# Operations whose kernels gave a wrong result in this process.
_REJECTED: set[str] = set()
_only_meanings = False


def define(
    schema: str,
    *,
    meaning: Callable[..., Any],
    kernels: Callable[..., Any],
    fake: Callable[..., Any],
) -> Any:
    """Register `avmae::<schema>` and return the callable operation.

    Args:
        schema: name, arguments and returns in torch's schema language, without the namespace. A
            name that ends in `_backward` gets a gradient that refuses: it is itself one.
        meaning: plain PyTorch; what CPU tensors run, and float64 tensors of any device. Its
            results must alias neither its inputs nor each other.
        kernels: what CUDA tensors run, with their device current, and CPU tensors under
            TRITON_INTERPRET=1.
        fake: shapes and dtypes of the outputs, for torch.compile and fake tensors.
    """
    LIBRARY.define(schema)
    name = schema.split("(", 1)[0]

    def by_kernels(*args: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if any(tensor.dtype == torch.float64 for tensor in tensors) or not kernels_usable():
            return meaning(*args)
        if name in _REJECTED or _only_meanings:
            return meaning(*args)
        if INTERPRET:
            _refuse_bfloat16(name, tensors)
            return kernels(*args)
        # Triton launches on the current device, which need not be the tensors' own.
        with torch.cuda.device_of(tensors[0]):
            return kernels(*args)

    LIBRARY.impl(name, by_kernels if INTERPRET else meaning, "CPU")
    LIBRARY.impl(name, by_kernels, "CUDA")
    torch.library.register_fake(f"avmae::{name}", fake, lib=LIBRARY)
    if name.endswith("_backward"):
        _refuse_double_backward(name)
    return getattr(torch.ops.avmae, name).default


def register_backward(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Give `avmae::<name>` its gradient; `backward` calls operations only, so it can be traced."""
    torch.library.register_autograd(
        f"avmae::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )


def reject(name: str) -> None:
    """Run `avmae::<name>` and its gradient by their meaning from now on."""
    _REJECTED.update((name, f"{name}_backward"))


@contextmanager
def meanings() -> Iterator[None]:
    """Inside, every operation runs its meaning, whatever the device."""
    global _only_meanings
    before, _only_meanings = _only_meanings, True
    try:
        yield
    finally:
        _only_meanings = before


def eager_float32_on_cpu(*tensors: Tensor | None) -> bool:
    """Whether a small operation does best to run its meaning under PyTorch's own autograd.

    Passing through an operation takes a tenth of a millisecond forward and one backward, on small
    models on a CPU as long as a LayerNorm itself. Other dtypes go through the operation there too,
    as every GPU tensor does: float64 tests of a model see the gradients that train on a GPU.
    """
    return not (INTERPRET or torch.compiler.is_compiling()) and all(
        tensor is None
        # Neither fake nor any other kind that stands for something.
        or type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        for tensor in tensors
    )


def _refuse_double_backward(name: str) -> None:
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        forward = name.removesuffix("_backward")
        raise NotImplementedError(f"avmae::{forward} has no second derivative (double backward)")

    torch.library.register_autograd(f"avmae::{name}", backward, lib=LIBRARY)


def _refuse_bfloat16(name: str, tensors: list[Tensor]) -> None:
    if any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        raise NotImplementedError(
            f"avmae::{name}: Triton's interpreter computes bfloat16 wrongly, without a word; "
            "with TRITON_INTERPRET=1 use float32 or float16"
        )
