"""Which modules of a model are swapped: look at all of them first, then change their classes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from avmae_fast.acceleration import huggingface, timm_vit, torch_layer
from avmae_fast.acceleration.modules import Swapped, mixture, overrides, own_class
from avmae_fast.acceleration.operations import class_name
from avmae_fast.acceleration.report import ATTENTION, NORM, Finding, Report

# By the name of their class: a library that is not installed is not imported either.
MODULES = timm_vit.MODULES | huggingface.MODULES | torch_layer.MODULES
_ATTENTION_NAMES = ("attn", "attention", "self_attn", "self_attention")
_POSITION_BIAS = ("relative_position_bias_table", "rel_pos", "relative_position_bias")


class NothingToSwapError(ValueError):
    """A model has no layer that is known; the text names what was looked for."""


def accelerate(model: nn.Module) -> Report:
    """Swap what can be swapped in `model`, print what that was, and return it.

    Outputs and gradients stay equal up to rounding. Call it before or after the model is compiled,
    wrapped or sharded. A call with an attention mask, or in training with attention dropout, runs
    the module's own attention; the first mask of a kind is told in the log.

    Args:
        model: any module that holds layers of `MODULES`; changed in place. One that was
            accelerated before is looked at anew.

    Raises:
        NothingToSwapError: no operation of any layer can be swapped; the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate wants a torch.nn.Module, got {type(model).__name__}")
    findings: list[Finding] = []
    classes: list[tuple[nn.Module, type]] = []
    for name, module in model.named_modules():
        own = own_class(type(module))
        ours = _ours(own)
        if ours is None:
            findings += _unknown(name, module, own)
            continue
        if absent := [attribute for attribute in ours.reads if not hasattr(module, attribute)]:
            findings.append(Finding(name, own.__name__, f"its release has no {absent[0]}"))
            continue
        parts = list(ours.examine(module))
        findings += [
            Finding(_join(name, part.child), part.operation, part.reason, part.condition)
            for part in parts
        ]
        swapped = [part for part in parts if part.reason is None]
        if swapped:
            settings = tuple(setting for part in swapped for setting in part.settings)
            mixed: Any = ours
            classes.append((module, mixture(own, mixed, settings)))
    report = Report((*findings, *_other_norms(model, findings)))
    if not classes:
        raise NothingToSwapError(_nothing(model, report))
    for module, made in classes:
        module.__class__ = made
    if not _is_one_of_many():
        print(report)
    return report


def _is_one_of_many() -> bool:
    """Whether another process of a distributed run says it already."""
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return joined and torch.distributed.get_rank() != 0


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every module of `model` has the class it had before."""
    for module in model.modules():
        own = own_class(type(module))
        if own is not type(module):
            module.__class__ = own


def _ours(own: type) -> type[Swapped] | None:
    """What a module of class `own` is swapped for."""
    for base in own.__mro__:
        ours = MODULES.get(class_name(base))
        if ours is not None:
            return None if overrides(own, base, ours.methods) else ours
    return None


def _unknown(name: str, module: nn.Module, own: type) -> Iterator[Finding]:
    """Layers that look as if they attend, and why they are left alone."""
    known = next((b for b in own.__mro__ if class_name(b) in MODULES), None)
    if known is not None:
        yield Finding(name, own.__name__, f"it overrides {known.__name__}")
    elif any(_is_unknown(getattr(module, child, None)) for child in _ATTENTION_NAMES):
        bias = any(hasattr(part, n) for part in module.modules() for n in _POSITION_BIAS)
        reason = "relative position bias" if bias else f"{class_name(own)} is not known"
        yield Finding(name, ATTENTION, reason)


def _is_unknown(child: object) -> bool:
    """Whether a child that attends, by its name, is not swapped itself."""
    return isinstance(child, nn.Module) and _ours(own_class(type(child))) is None


def _other_norms(model: nn.Module, findings: list[Finding]) -> Iterator[Finding]:
    seen = {finding.name for finding in findings}
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and name not in seen:
            yield Finding(name, NORM, "no addition of the same layer comes just before it")


def _nothing(model: nn.Module, report: Report) -> str:
    known = ", ".join(sorted({name.rpartition(".")[2] for name in MODULES}))
    left = "; ".join(dict.fromkeys(str(f.reason) for f in report.left if f.operation != NORM))
    return (
        f"{type(model).__name__} has no layer that can be swapped: accelerate knows {known} of "
        f"timm, transformers and torch.nn{f'. Left alone: {left}' if left else ''}"
    )


def _join(name: str, child: str) -> str:
    return ".".join(part for part in (name, child) if part)
