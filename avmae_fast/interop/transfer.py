"""Pretrained weights into a classifier: which tensor goes where, and a report of it.

As released: the stack of each modality is taken from its own encoder, or from the one that both
shared; the joint layers of mid fusion go into the stacks of both. A joint encoder's closing
LayerNorm closes the classifier too; the LayerNorms that closed separate encoders, or stood before
the joint layers, are left behind. The audio embedding is transferred, which the released code
forgets. Fixed positions are not weights: the classifier computes its own, longer table.
Source: arXiv:2212.05922, section 4, and the authors' conversion (Scenic, AV-MAE).
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from avmae_fast.config import MODALITIES, Modality, ModelConfig, VideoConfig
from avmae_fast.finetune_config import ClassifierConfig
from avmae_fast.interop.transfer_report import TransferReport
from avmae_fast.models import Classifier

Norms = Literal["released", "keep"]

_PRETRAINING_PARTS = (
    "decoder",
    "decoder_embed",
    "decoder_modality_token",
    "decoder_pos_embed",
    "mask_token",
    "head",
)
_NEW_PARTS = ("bottleneck", "cls", "pool", "pre_logits", "head")
_STACK = re.compile(r"encoder\.(\w+)\.blocks\.(\d+)\.(.+)")


class TransferError(ValueError):
    """Weights that do not fit, are missing or would be lost; the text names every one of them."""


@dataclass(frozen=True)
class TransferPlan:
    """Where each tensor of a classifier comes from, by names alone.

    sources: the source of each target that has one. fresh: why each other target has none.
    """

    sources: dict[str, str]
    fresh: dict[str, str]


def transfer(
    state: Mapping[str, Tensor],
    source: ModelConfig,
    model: Classifier,
    *,
    norms: Norms = "released",
    fresh: Collection[str] = (),
    leave: Collection[str] = (),
    interpolate_positions: bool = False,
) -> TransferReport:
    """Load pretrained weights into `model` and return what went where.

    Args:
        state: state dict of the pretrained model, or of its encoder alone.
        source: what was pretrained.
        model: what is to be fine-tuned; changed only if everything fits.
        norms: `released` leaves out the LayerNorms the released transfer leaves out; `keep` gives
            each a place, for which the classifier needs `separate_norms` (separate encoders) or
            `middle_norm_at` (mid fusion).
        fresh: targets that shall stay at their initialisation, by name or prefix ("norm").
        leave: sources that shall be left behind, by name or prefix.
        interpolate_positions: resize learned position tables to the classifier's grid.

    Raises:
        TransferError: geometries differ, a target would silently stay at its initialisation or a
            source be lost, or a name in `fresh` or `leave` fits nothing. Nothing was loaded.
    """
    target = model.config
    _check_geometry(source, target, fresh, leave)
    targets = dict(model.named_parameters())
    plan = plan_transfer(list(targets), source, target, norms=norms, fresh=fresh)
    left = _left_behind(state, plan, source, target, norms, fresh, leave)
    tensors, resized = _tensors(state, plan, targets, source, target, interpolate_positions)
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)
    return TransferReport(plan.sources, resized, left, plan.fresh)


def plan_transfer(
    names: Collection[str],
    source: ModelConfig,
    target: ClassifierConfig,
    *,
    norms: Norms = "released",
    fresh: Collection[str] = (),
) -> TransferPlan:
    """The source of every parameter of a classifier.

    Args:
        names: state-dict names of the classifier's parameters.

    Raises:
        TransferError: a parameter has no source and is not in `fresh`.
    """
    sources, stays, problems = {}, {}, []
    for name in names:
        if _named(name, fresh):
            stays[name] = "asked for"
            continue
        found, reason, is_expected = _source_of(name, source, target, norms)
        if found is not None:
            sources[name] = found
        elif is_expected:
            stays[name] = reason
        else:
            problems.append(f"{name}: {reason}")
    for pattern in fresh:
        if not any(_named(name, [pattern]) for name in names):
            problems.append(f"fresh: the classifier has no {pattern!r}")
    if problems:
        listed = "; ".join(problems)
        raise TransferError(f"nothing to load into {listed}. Name in `fresh` what may stay new")
    return TransferPlan(sources, stays)


def _source_of(
    name: str, source: ModelConfig, target: ClassifierConfig, norms: Norms
) -> tuple[str | None, str, bool]:
    """The source of a target; or why there is none, and whether that is as it should be."""
    part = name.split(".")[0]
    if part in _NEW_PARTS:
        return None, "new in the classifier", True
    if block := _STACK.fullmatch(name):
        found = _source_block(block[1], int(block[2]), source)
        if found is None:
            why = f"one stack for both cannot take the two of {source.fusion} fusion"
            return None, why, False
        return f"{found}.{block[3]}", "", True
    if part == "norm":
        return _source_norm(name, source, target, norms)
    if part == "middle_norm":
        return _source_middle_norm(name, source, target, norms)
    has = {"modality_token": source.modality_tokens, "pos_embed": source.positions == "learned"}
    return (name, "", True) if has.get(part, True) else (None, "pretraining had none", False)


def _source_block(stack: str, layer: int, source: ModelConfig) -> str | None:
    """Where block `layer` of a stack was pretrained."""
    if source.fusion in ("early", "shared"):
        return f"encoder.both.blocks.{layer}"
    own = source.encoder.layers - (source.fusion_layers if source.fusion == "mid" else 0)
    if layer >= own:
        return f"encoder.both.blocks.{layer - own}"
    return None if stack == "both" else f"encoder.{stack}.blocks.{layer}"


def _source_norm(
    name: str, source: ModelConfig, target: ClassifierConfig, norms: Norms
) -> tuple[str | None, str, bool]:
    _, of, leaf = name.split(".")
    if not source.encoder_norm:
        return None, "pretraining had none", False
    if source.fusion != "separate":
        return f"encoder.both.norm.{leaf}", "", True
    if norms == "released":
        return None, "LayerNorms of separate encoders are not transferred, as released", True
    if of == "both" and len(target.modalities) > 1:
        return None, "one LayerNorm cannot take those of both encoders: set separate_norms", False
    return f"encoder.{target.modalities[0] if of == 'both' else of}.norm.{leaf}", "", True


def _source_middle_norm(
    name: str, source: ModelConfig, target: ClassifierConfig, norms: Norms
) -> tuple[str | None, str, bool]:
    _, of, leaf = name.split(".")
    if source.fusion != "mid" or not source.encoder_norm:
        return None, "pretraining had none", False
    if norms == "released":
        return None, "the released transfer drops it: norms='keep' does not", False
    own = source.encoder.layers - source.fusion_layers
    if target.middle_norm_at != own:
        return None, f"pretraining had it in front of layer {own}: set middle_norm_at", False
    return f"encoder.{of}.norm.{leaf}", "", True


def _left_behind(
    state: Mapping[str, Tensor],
    plan: TransferPlan,
    source: ModelConfig,
    target: ClassifierConfig,
    norms: Norms,
    fresh: Collection[str],
    leave: Collection[str],
) -> dict[str, str]:
    """Why each tensor that goes nowhere is left, if that is as it should be."""
    used, problems, left = set(plan.sources.values()), [], {}
    if missing := sorted(used - state.keys()):
        problems.append(f"the pretrained weights lack {missing}")
    for name in state.keys() - used:
        reason = _reason_to_leave(name, source, target, norms)
        if reason is None and (_named(name, leave) or _named(name, fresh)):
            reason = "asked for"
        if reason is None:
            problems.append(f"{name} would be lost: name it in `leave` if it may be")
        else:
            left[name] = reason
    for pattern in leave:
        if not any(_named(name, [pattern]) for name in state.keys() - used):
            problems.append(f"leave: {pattern!r} is not among the tensors without a place")
    if problems:
        raise TransferError("; ".join(sorted(problems)))
    return dict(sorted(left.items()))


def _reason_to_leave(
    name: str, source: ModelConfig, target: ClassifierConfig, norms: Norms
) -> str | None:
    part, *rest = name.split(".")
    if part in _PRETRAINING_PARTS:
        return "only pretraining has it"
    absent = set(MODALITIES) - set(target.modalities)
    if rest and rest[0] in absent and rest[0] in source.modalities:
        return f"the classifier has no {rest[0]}"
    is_norm = part == "encoder" and len(rest) == 3 and rest[1] == "norm" and rest[0] != "both"
    if is_norm and norms == "released":
        return "LayerNorms of a single modality are not transferred, as released"
    return None


def _tensors(
    state: Mapping[str, Tensor],
    plan: TransferPlan,
    targets: Mapping[str, Tensor],
    source: ModelConfig,
    target: ClassifierConfig,
    interpolate_positions: bool,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What to load, and how the position tables among it were resized."""
    tensors, resized, problems = {}, {}, []
    for name, origin in plan.sources.items():
        tensor = state[origin]
        part, m = name.split(".")[0], name.split(".")[-1]
        if part == "pos_embed" and m in MODALITIES:
            old, new = source.input(m).grid, target.input(m).grid
            if old != new and not interpolate_positions:
                problems.append(
                    f"{name} is for a grid of {list(old)}, the classifier's is {list(new)}: "
                    "set interpolate_positions to resize it"
                )
                continue
            if old != new:
                tensor = interpolate_table(tensor, old, new)
                resized[name] = f"grid {list(old)} to {list(new)}"
        if tensor.shape != targets[name].shape:
            got, want = list(tensor.shape), list(targets[name].shape)
            problems.append(f"{origin} has shape {got}, {name} wants {want}")
        tensors[name] = tensor
    if problems:
        raise TransferError("; ".join(problems))
    return tensors, resized


def interpolate_table(table: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """A position table [N, D] on the grid `old` resized linearly to `new`, rows row-major.

    Raises:
        ValueError: the table does not have a row for each place of its grid.
    """
    if len(table) != math.prod(old) or len(old) != len(new):
        raise ValueError(f"a table of {len(table)} rows does not fill a grid of {list(old)}")
    mode = "trilinear" if len(old) == 3 else "bilinear"
    on_grid = table.T.reshape(1, -1, *old)
    return F.interpolate(on_grid, size=new, mode=mode, align_corners=False)[0].flatten(1).T


def _check_geometry(
    source: ModelConfig, target: ClassifierConfig, fresh: Collection[str], leave: Collection[str]
) -> None:
    problems = []
    for name in ("encoder", "gelu", "layer_norm_eps"):
        got, want = getattr(source, name), getattr(target, name)
        if got != want:
            problems.append(f"{name} was {got} in pretraining, the classifier has {want}")
    is_left = source.positions == "learned" and _named("pos_embed.", leave)
    if source.positions != target.positions and not is_left:
        got, want = source.positions, target.positions
        problems.append(f"positions were {got!r} in pretraining, the classifier has {want!r}")
    for m in target.modalities:
        if _named(f"patch_embed.{m}.weight", fresh):
            continue
        if m not in source.modalities:
            problems.append(f"pretraining had no {m}, the classifier has: name patch_embed.{m}")
        elif (got := _patch(source, m)) != (want := _patch(target, m)):
            problems.append(f"patches of {m} were {got} in pretraining, the classifier has {want}")
    if problems:
        raise TransferError("; ".join(problems))


def _patch(config: ModelConfig | ClassifierConfig, m: Modality) -> tuple[int, ...]:
    spec = config.input(m)
    return spec.tubelet if isinstance(spec, VideoConfig) else spec.patch


def _named(name: str, patterns: Collection[str]) -> bool:
    """Whether a name is in a list of names and prefixes, which end where a part of it ends."""
    return any(name == p or name.startswith(f"{p}.") for p in patterns)
