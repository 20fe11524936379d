"""Golden cases about single parts: optimiser, schedule, positions, targets, counts, data steps."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from golden_cases import FLOAT32_ULP, Case, Comparison, compare, target_limit

from avmae_fast.positions import sincos1d
from avmae_fast.reference import masked_count, preprocess
from avmae_fast.reference.targets import patchify, reconstruction_target
from avmae_fast.train.optim import ReleasedAdamW, learning_rate
from avmae_kernels.masking import MaskSpec

# The authors' rate is float32: a few roundings of the cosine's argument and value.
LR_LIMIT = 4 * FLOAT32_ULP


def schedule(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `learning_rate` from the authors' settings; others are a ValueError."""
    factors = settings.get("factors", "constant*linear_warmup*cosine_decay")
    names = {name.strip() for name in factors.split("*")}
    if names != {"constant", "linear_warmup", "cosine_decay"} or settings.get("alpha"):
        raise ValueError(f"schedule {factors} with alpha {settings.get('alpha')} is not covered")
    base = settings["base_learning_rate"] if "base_learning_rate" in settings else settings["base"]
    return {
        "base_lr": base,
        "total_steps": settings["steps_per_cycle"],
        "warmup_steps": settings["warmup_steps"],
    }


def check_lr(case: Case) -> Iterator[Comparison]:
    for name, settings in case.meta["schedules"].items():
        arguments = schedule(settings)
        rates = [learning_rate(int(s), **arguments) for s in case.arrays[f"{name}/steps"]]
        limit = LR_LIMIT * arguments["base_lr"]
        yield compare(name, np.array(rates), case.arrays[f"{name}/lr"], limit)


def check_adam(case: Case) -> Iterator[Comparison]:
    """Our optimiser on the case's leaves, with its gradients."""
    meta, steps = case.meta, int(case.meta["steps"])
    leaves = {
        name: torch.nn.Parameter(torch.from_numpy(x)) for name, x in case.group("param0").items()
    }
    kernels = {name for name in leaves if "kernel" in name}
    decay = meta.get("explicit_weight_decay") or 0.0
    if decay:
        wrong = sorted(kernels ^ set(meta["decayed_leaves"]))
        yield Comparison(f"decayed leaves {wrong}", len(wrong), 0)
    groups = [
        {"params": [leaves[name] for name in leaves if name in kernels]},
        {
            "params": [leaves[name] for name in leaves if name not in kernels],
            "explicit_weight_decay": 0.0,
        },
    ]
    betas = (meta["beta1"], meta["beta2"])
    optimizer = ReleasedAdamW(groups, betas=betas, eps=meta["eps"], weight_decay=decay)
    arguments = schedule(meta["lr_configs"])
    lr_limit = LR_LIMIT * arguments["base_lr"]
    for step in range(steps):
        lr = learning_rate(step, **arguments)
        yield compare(f"lr[{step}]", lr, case.arrays["lr"][step], lr_limit)
        for group in optimizer.param_groups:
            group["lr"] = lr
        gradients = case.group(f"grad{step}")
        for name, leaf in leaves.items():
            leaf.grad = torch.from_numpy(gradients[name])
        optimizer.step()
        yield from _compare_adam(case, step + 1, leaves, optimizer)


def _compare_adam(
    case: Case, step: int, leaves: Mapping[str, torch.nn.Parameter], optimizer: ReleasedAdamW
) -> Iterator[Comparison]:
    # Both sides are float32: some four roundings a step, of values up to the leaf's largest.
    limit = 4 * step * FLOAT32_ULP
    for name, leaf in leaves.items():
        state = optimizer.state[leaf]
        for group, got in (("param", leaf), ("m", state["exp_avg"]), ("v", state["exp_avg_sq"])):
            expected = case.arrays[f"{group}{step}/{name}"]
            yield compare(f"{group}{step}/{name}", got, expected, limit, relative=True)


def check_posemb(case: Case) -> Iterator[Comparison]:
    for name, stored in case.meta["tables"].items():
        n, width = map(int, name.split("x"))
        table = sincos1d(n, width)
        # sin and cos of two math libraries may round a value to neighbouring float32 numbers.
        rows, values = case.arrays[f"rows/{name}"], case.arrays[f"values/{name}"]
        yield compare(f"values/{name}", table[rows], values, FLOAT32_ULP / 2)
        wide = table.astype(np.float64)
        for statistic, got in (("sum", wide.sum()), ("sumsq", np.square(wide).sum())):
            yield compare(f"{statistic}/{name}", got, np.array(stored[statistic]), 1e-5)


def check_targets(case: Case) -> Iterator[Comparison]:
    h, w, t = case.meta["patches_size_ph_pw_pt"]
    video = torch.from_numpy(case.arrays["video"]).double()
    audio = torch.from_numpy(case.arrays["spectrogram"]).double().squeeze(-1)
    inputs = {"rgb": (video, (t, h, w)), "spectrogram": (audio, tuple(case.meta["spec_patch"]))}
    norms = {"target": "none", "target_standardise": "patch", "target64_standardise": "patch"}
    norms |= {f"{name}_channels": "patch_channel" for name in list(norms)[1:]}
    for group, norm in norms.items():
        for name, expected in case.group(group).items():
            got = reconstruction_target(*inputs[name], norm)
            if "64" in group:
                yield compare(f"{group}/{name}", got, expected, 1e-12)
            else:
                source = case.arrays["video" if name == "rgb" else name]
                yield compare(f"{group}/{name}", got, expected, target_limit(source, norm))
    for name, expected in case.group("target_central_frame").items():
        central = patchify(inputs[name][0][:, t // 2 :: t], (1, h, w))
        yield compare(f"target_central_frame/{name}", central, expected, 0)
    for name, kernel in case.group("embed_kernel").items():
        weight = torch.from_numpy(kernel).double().flatten(0, -2)
        bias = torch.from_numpy(case.arrays["embed_bias"]).double()
        tokens = patchify(*inputs[name]) @ weight + bias
        expected = case.arrays[f"embed_tokens/{name}"]
        # A float32 sum over the patch: half a unit for each term at most.
        limit = FLOAT32_ULP / 2 * len(weight)
        yield compare(f"embed_tokens/{name}", tokens, expected, limit, relative=True)


def check_mask_counts(case: Case) -> Iterator[Comparison]:
    columns = (case.arrays[name] for name in ("n_tokens", "ratio", "n_masked", "n_visible"))
    for tokens, ratio, masked, visible in zip(*columns, strict=True):
        name = f"{tokens} tokens at {ratio}"
        yield compare(name, masked_count(int(tokens), float(ratio)), masked, 0)
        spec = MaskSpec("random", (int(tokens),), float(ratio))
        yield compare(f"{name}, engine", spec.n_masked, masked, 0)
        yield compare(f"{name}, visible", spec.n_tokens - spec.n_masked, visible, 0)


def check_dataset(case: Case) -> Iterator[Comparison]:
    """Frame and row indices, resizing, cropping, flipping and normalisation, all exact."""
    for key, expected in case.arrays.items():
        group, _, rest = key.partition("/")
        if group in ("resize", "crop", "flip", "spec", "norm"):
            continue
        numbers = [int(number) for number in rest.split("_")]
        yield compare(key, _indices(group, numbers), expected, 0)
    pixels = torch.from_numpy(case.arrays["norm/uint8"])
    for name, zero_centred in (("zero_centered", True), ("unit", False)):
        got = preprocess.normalise_frames(pixels, torch.float32, zero_centred)
        yield compare(f"norm/{name}", got, case.arrays[f"norm/{name}"], 0)
    yield from _compare_frames(case)
    yield from _compare_spectrograms(case)


def _indices(group: str, numbers: list[int]) -> object:
    clips = re.fullmatch(r"linspace(\d+)", group)
    if clips:
        offsets = preprocess.eval_offsets(*numbers, clips=int(clips[1]))
        return np.concatenate([preprocess.window(*numbers, offset) for offset in offsets])
    if group == "sync":
        length, _, _, other, rows, offset = numbers
        start = preprocess.synchronised_offset(offset, length, other)
        return preprocess.window(other, rows, 1, start)
    readers: dict[str, Callable[..., object]] = {
        "middle": lambda *n: preprocess.window(*n, preprocess.eval_offsets(*n)[0]),
        "random_max_offset_exclusive": preprocess.train_offsets,
        "indices_at_offset": preprocess.window,
        "segment_eval": lambda length, count, _: preprocess.segment_indices(length, count),
    }
    return readers[group](*numbers)


def _compare_frames(case: Case) -> Iterator[Comparison]:
    for key, expected in case.arrays.items():
        group, _, rest = key.partition("/")
        if group not in ("resize", "crop", "flip") or not rest.endswith("/out"):
            continue
        number = rest.removesuffix("/out")
        frames = torch.from_numpy(case.arrays[f"resize/{number}/in"])
        if group == "resize":
            size = int(case.arrays[f"resize/{number}/min_resize"])
            got = preprocess.resize_short_side(frames, size)
        elif group == "crop":
            got = preprocess.crop(frames, expected.shape[1])
        else:
            got = preprocess.flip(frames)
        yield compare(key, got, expected, 0)


def _compare_spectrograms(case: Case) -> Iterator[Comparison]:
    log_mel = torch.from_numpy(case.arrays["spec/in"])
    # The file does not say which mean and deviation were used: they follow from what came out.
    standardised = case.arrays["spec/decode_mean_std"][..., 0].astype(np.float64)
    slope, offset = np.polyfit(case.arrays["spec/in"].ravel(), standardised.ravel(), 1)
    statistics = {"mean": -offset / slope, "std": 1 / slope}
    variants: dict[str, dict[str, Any]] = {
        "decode_default": {},
        "decode_inflate": {},
        "decode_mean_std": statistics,
        "decode_not_zero_centered": {**statistics, "zero_centred": False},
    }
    for name, options in variants.items():
        expected = case.arrays[f"spec/{name}"]
        got = preprocess.standardise_spectrogram(log_mel, **options)
        channels = got[..., None].expand(expected.shape)
        limit = 2 * FLOAT32_ULP if options else 0.0
        yield compare(f"spec/{name}", channels, expected, limit, relative=True)
