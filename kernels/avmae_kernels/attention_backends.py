"""Who computes attention: our kernels, or a library that is asked for by name.

Shape letters: Q, T query and key tokens, S sequences, H heads, d head_dim.

`resolve` turns `impl` into a name. "auto" is our operation on a CPU; on a GPU it is what
`tuning/attention.json` names for the architecture, the class of length, head_dim and the direction
(`forward`: no gradient is wanted; `training`: one is), and our kernels where the table says
nothing. The same arguments always get the same choice. Where our kernels cannot run, or failed
`attention_check.self_check`, it is "sdpa", with a warning. "triton-hopper" are our kernels of
attention_hopper, for some heads on sm_90: taken by "auto" only where the table says so, and never
where they cannot run or failed.

The library back ends want every row to belong to a sequence. They read varying lengths on the host,
which waits for the GPU and cannot be captured in a CUDA graph.
"""

import functools
import importlib
import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from avmae_kernels._triton import HAVE_TRITON, INTERPRET, kernels_usable
from avmae_kernels.attention_hopper import why_misplaced, why_unsupported
from avmae_kernels.attention_layout import MAX_HEAD_DIM, SHORT
from avmae_kernels.attention_meaning import packed_attention_reference

log = logging.getLogger(__name__)

Fixed = tuple[int, int] | None
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Fixed], Tensor]
OWN, HOPPER = KERNELS = ("triton", "triton-hopper")
TABLE = Path(__file__).parent / "tuning" / "attention.json"
DIRECTIONS = ("forward", "training")


class BackendUnavailable(RuntimeError):
    """An attention back end was asked for by name and cannot be had; the text says why."""


def _sdpa(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor, fixed: Fixed) -> Tensor:
    return packed_attention_reference(q, k, v, cu_q, cu_kv, fixed)


def _sdpa_flash(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor, fixed: Fixed
) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return packed_attention_reference(q, k, v, cu_q, cu_kv, fixed)


def _sdpa_cudnn(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor, fixed: Fixed
) -> Tensor:
    if fixed is None:
        # cuDNN makes a plan for each new shape, half a second each time.
        raise BackendUnavailable("impl='sdpa-cudnn' wants a fixed length; these vary")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return packed_attention_reference(q, k, v, cu_q, cu_kv, fixed)


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor, fixed: Fixed
) -> Tensor:
    varlen = importlib.import_module("torch.nn.attention.varlen")
    return varlen.varlen_attn(q, k, v, cu_q, cu_kv, *_longest(cu_q, cu_kv, fixed))


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor, fixed: Fixed
) -> Tensor:
    longest_q, longest_kv = _longest(cu_q, cu_kv, fixed)
    result = _flash_attn_function()(
        q,
        k,
        v,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_kv,
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_kv,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    # Some versions return the log-sum-exp as well.
    return result[0] if isinstance(result, tuple) else result


def _xformers(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor, fixed: Fixed) -> Tensor:
    ops = importlib.import_module("xformers.ops")
    lengths = (cu.diff().tolist() for cu in (cu_q, cu_kv))
    mask = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(*lengths)
    batched = (x[None] for x in (q, k, v))
    return ops.memory_efficient_attention(*batched, attn_bias=mask)[0]


_LIBRARIES: dict[str, Attention] = {
    "sdpa": _sdpa,
    "sdpa-flash": _sdpa_flash,
    "sdpa-cudnn": _sdpa_cudnn,
    "torch-varlen": _torch_varlen,
    "flash-attn": _flash_attn,
    "xformers": _xformers,
}
BACKENDS = (*KERNELS, *_LIBRARIES)
# FlashAttention 3, 4 and 2, in the order in which they are looked for.
_FLASH_ATTN_MODULES = ("flash_attn_interface", "flash_attn.cute", "flash_attn")


def _longest(cu_q: Tensor, cu_kv: Tensor, fixed: Fixed) -> tuple[int, int]:
    return fixed or (int(cu_q.diff().max()), int(cu_kv.diff().max()))


def _flash_attn_function() -> Callable[..., Any]:
    name = next(name for name in _FLASH_ATTN_MODULES if _importable(name))
    return importlib.import_module(name).flash_attn_varlen_func


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


_MODULES = {
    "torch-varlen": ("torch.nn.attention.varlen",),
    "flash-attn": _FLASH_ATTN_MODULES,
    "xformers": ("xformers.ops",),
}


@torch.compiler.assume_constant_result
def why_unavailable(name: str, device: torch.device) -> str | None:
    """What keeps back end `name` from computing on `device`, or None if nothing is known to."""
    modules = _MODULES.get(name, ())
    if modules and not any(_importable(module) for module in modules):
        wanted = "torch of 2.10 or later" if name == "torch-varlen" else name
        return f"{' nor '.join(modules)} cannot be imported: install {wanted}"
    if name in KERNELS and not HAVE_TRITON:
        return "Triton is not installed: pip install triton (Linux)"
    if name == "sdpa" or (name in KERNELS and INTERPRET):
        return None
    if device.type != "cuda":
        return f"it wants tensors on a CUDA device, these are on {device}"
    if name == HOPPER:
        major, minor = torch.cuda.get_device_capability(device)
        if major != 9:
            return f"it wants compute capability 9.x (Hopper), this is {major}.{minor}"
    return None


def resolve(impl: str, q: Tensor, k: Tensor, v: Tensor, fixed: Fixed) -> str:
    """The back end that computes attention of q [Q, H, d], k and v [T, H, d], a name of BACKENDS.

    Raises:
        ValueError: `impl` is no name of a back end.
        BackendUnavailable: a back end is asked for by name and cannot run.
    """
    if impl == "auto":
        if not q.is_cuda:
            return OWN
        training = torch.is_grad_enabled() and q.requires_grad
        named = choose(q.device, q.dtype, q.shape[-1], fixed and fixed[1], training)
        reason = why_misplaced(q=q, k=k, v=v) if named == HOPPER else None
        return named if reason is None else _not_hopper(reason)
    if impl not in BACKENDS:
        raise ValueError(f"impl = {impl!r} is not valid: it must be auto, {', '.join(BACKENDS)}")
    reason = why_unavailable(impl, q.device)
    if reason is None and impl == HOPPER:
        reason = why_unsupported(q.dtype, q.shape[-1]) or why_misplaced(q=q, k=k, v=v)
    if reason is not None:
        raise BackendUnavailable(f"impl = {impl!r} cannot run: {reason}")
    return impl


@torch.compiler.assume_constant_result
def _not_hopper(reason: str) -> str:
    _warn_once(f"attention: the measured choice {HOPPER} cannot run: {reason}")
    return OWN


def attend(
    impl: str, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor, fixed: Fixed
) -> Tensor:
    """Attention [Q, H, d] by a library back end, differentiable by the library's own rules."""
    return _LIBRARIES[impl](q, k, v, cu_q, cu_kv, fixed)


@torch.compiler.assume_constant_result
def choose(
    device: torch.device, dtype: torch.dtype, head_dim: int, fixed_keys: int | None, training: bool
) -> str:
    """The back end that "auto" means on a GPU. A compiled model keeps the choice it was made with.

    Args:
        fixed_keys: keys of every sequence, None where they vary.
        training: whether a gradient is wanted.
    """
    return explain(device, dtype, head_dim, fixed_keys, training)[0]


def explain(
    device: torch.device, dtype: torch.dtype, head_dim: int, fixed_keys: int | None, training: bool
) -> tuple[str, str]:
    """`choose`, and the reason for it."""
    if dtype == torch.float64:
        return OWN, "float64 runs the operation's meaning, in plain PyTorch"
    obstacle = None if kernels_usable() else "Triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        obstacle = f"the kernels want compute capability 8.0, this is {capability}"
    if head_dim > MAX_HEAD_DIM:
        obstacle = f"the kernels want head_dim up to {MAX_HEAD_DIM}, this is {head_dim}"
    if (OWN, device.index, dtype, head_dim) in _REJECTED:
        obstacle = "the kernels failed their self-check here"
    if obstacle is not None:
        _warn_once(f"attention on {device} runs as torch's SDPA: {obstacle}")
        return "sdpa", obstacle
    arch = 10 * capability[0] + capability[1]
    length = length_class(fixed_keys)
    key = (arch, length, head_dim, "training" if training else "forward")
    named = measured_choices().get(key)
    if named is None:
        return OWN, f"nothing measured for sm_{arch}, {length} sequences, head_dim {head_dim}"
    reason = why_unavailable(named, device)
    if reason is None and named == HOPPER:
        reason = why_unsupported(dtype, head_dim)
    if (named, device.index, dtype, head_dim) in _REJECTED:
        reason = "it failed its self-check here"
    if reason is not None:
        _warn_once(f"attention: the measured choice {named} for {key} cannot run: {reason}")
        return OWN, f"{named} was measured to be faster, but cannot run: {reason}"
    return named, f"measured on {table()['measured_on']}"


# (name, device number, dtype, head_dim) of our kernels that gave a wrong result in this process.
_REJECTED: set[tuple[str, int | None, torch.dtype, int]] = set()


def reject(impl: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Keep "auto" from using `impl`, kernels of ours, for such heads in this process."""
    _REJECTED.add((impl, device.index, dtype, head_dim))


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def may_choose_hopper(device: torch.device, head_dim: int) -> bool:
    """Whether "auto" takes the kernels for Hopper for some attention of such heads on `device`."""
    if device.type != "cuda":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return any(
        (arch, heads, impl) == (10 * major + minor, head_dim, HOPPER)
        for (arch, _, heads, _), impl in measured_choices().items()
    )


def length_class(fixed_keys: int | None) -> str:
    """`short`, `long`, or `varying`: how the table groups lengths."""
    if fixed_keys is None:
        return "varying"
    return "short" if fixed_keys <= SHORT else "long"


@functools.cache
def table() -> dict[str, Any]:
    """The measurements that "auto" chooses by, as shipped.

    `choices`: one entry for each (arch, length, head_dim, direction), naming an `impl`. `proven`:
    devices and compiler versions on which every shipped kernel passed the numeric GPU tests.
    """
    found = json.loads(TABLE.read_text())
    for entry in found["choices"]:
        ok = entry["impl"] in BACKENDS and entry["direction"] in DIRECTIONS
        if not ok or entry["length"] not in ("short", "long", "varying"):
            raise ValueError(f"{TABLE.name}: not a choice: {entry}")
    return found


@functools.cache
def measured_choices() -> dict[tuple[int, str, int, str], str]:
    """The table's choices by what they are chosen for."""
    keys = ("arch", "length", "head_dim", "direction")
    return {tuple(entry[key] for key in keys): entry["impl"] for entry in table()["choices"]}


def describe(device: torch.device, head_dims: tuple[int, ...] = (32, 64, 80, 128)) -> list[str]:
    """Lines for a report: which back ends can run on `device`, what "auto" takes and why."""
    lines = []
    for name in BACKENDS:
        reason = why_unavailable(name, device)
        lines.append(f"attention back end {name}: {'ready' if reason is None else reason}")
    if device.type != "cuda":
        return [*lines, "attention auto: plain PyTorch with a gradient of its own (no GPU)"]
    for head_dim in head_dims:
        for fixed_keys in (SHORT, SHORT + 1, None):
            for direction in DIRECTIONS:
                training = direction == "training"
                name, why = explain(device, torch.bfloat16, head_dim, fixed_keys, training)
                case = f"{length_class(fixed_keys)} sequences, head_dim {head_dim}, {direction}"
                lines.append(f"attention auto, {case}: {name} ({why})")
    proven = ", ".join(str(entry) for entry in table()["proven"]) or "none yet"
    return [*lines, f"attention kernels proven on hardware: {proven}"]
