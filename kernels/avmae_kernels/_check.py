"""Errors of every operation in one voice: the operation, what it wants, what it got."""

from torch import Tensor


def describe(tensor: Tensor) -> str:
    """`float32 [2, 8, 32] on cpu`: what an error message says about a tensor."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {list(tensor.shape)} on {tensor.device}"


def wanted(op: str, want: str, **got: Tensor) -> ValueError:
    """The error to raise when the arguments of `op` do not fit together."""
    listed = ", ".join(f"{name} {describe(tensor)}" for name, tensor in got.items())
    return ValueError(f"{op} wants {want}; got {listed}")
