"""Golden cases about the whole model: one forward and backward pass, and three training steps."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from golden_cases import (
    FLOAT32_ULP,
    Case,
    Comparison,
    batch,
    by_modality,
    compare,
    model_config,
    target_limit,
)
from golden_parts import LR_LIMIT, schedule

from avmae_fast.config import ModelConfig
from avmae_fast.interop.scenic import SCENIC_MODALITY, from_scenic, stack_names, to_scenic
from avmae_fast.reference import ReferenceMAE, ReferenceOutput, masked_count
from avmae_fast.reference.model import take_tokens
from avmae_fast.train.optim import ReleasedAdamW, learning_rate, parameter_groups

# Rounding in float64 adds up to some 1e-15; nothing else separates the two programs.
FLOAT64_LIMIT = 1e-12
# Stored in float32 from a float64 run: rounding is half of this share of a value.
STORED_LIMIT = FLOAT32_ULP
GRADIENT_LIMIT = 1e-6
# Float32 rounding is 5e-7; erf instead of tanh GELU is 6e-5, epsilon 1e-5 instead of 1e-6 is 6e-6.
FLOAT32_PREDICTION_LIMIT = 3e-6
# A sum of thousands of squares in float32, as a share of itself.
FLOAT32_LOSS_LIMIT = 2e-6
# What a pretraining case gives to the model.
_GIVEN = {"input", "param", "masked_idx", "unmasked_idx", "perm", "batch_mask"}


def build(
    case: Case, config: ModelConfig, dtype: torch.dtype, params: str = "param"
) -> ReferenceMAE:
    """The reference with the case's parameters."""
    model = ReferenceMAE(config)
    model.load_state_dict(from_scenic(case.group(params), config))
    return model.to(dtype)


def check_pretrain(case: Case) -> Iterator[Comparison]:
    """Everything a pretraining case holds; an array that nothing looks at is an error too."""
    compared = set()
    for comparison in _compare_everything(case):
        compared.add(comparison.name.split("/")[0])
        yield comparison
    unread = sorted({name.split("/")[0] for name in case.arrays} - compared - _GIVEN)
    yield Comparison(f"arrays that nothing compares {unread}", len(unread), 0)


def _compare_everything(case: Case) -> Iterator[Comparison]:
    config = model_config(case)
    model = build(case, config, torch.float64)
    arguments = batch(case, torch.float64)
    inner: dict[str, torch.Tensor] = {}
    hooks = _record_first_blocks(model, config, inner)
    out = model(**arguments)
    for hook in hooks:
        hook.remove()
    yield from compare_outputs(case, out)
    yield from _compare_masks(case, config, arguments)
    yield from _compare_weights(case, config, arguments)
    yield from _compare_intermediates(case, model, out, arguments)
    for name, expected in case.group("block").items():
        yield compare(f"block/{name}", inner[name], expected, STORED_LIMIT, relative=True)
    out.loss.backward()
    yield from _compare_gradients(case, model, config)
    yield from check_float32(case, build(case, config, torch.float32))
    if "n_params" in case.meta:
        count = sum(p.numel() for p in model.parameters())
        yield compare("n_params", count, np.array(case.meta["n_params"]), 0)


def compare_outputs(case: Case, out: ReferenceOutput) -> Iterator[Comparison]:
    """Predictions and losses of a float64 run."""
    for m, expected in by_modality(case, "pred64").items():
        yield compare(f"pred64/{m}", out.predictions[m], expected, FLOAT64_LIMIT)
    for m, expected in by_modality(case, "loss_mod64").items():
        yield compare(f"loss_mod64/{m}", out.losses[m], expected, FLOAT64_LIMIT)
    yield compare("loss64", out.loss, case.arrays["loss64"], FLOAT64_LIMIT)


def check_float32(case: Case, model: ReferenceMAE) -> Iterator[Comparison]:
    """Predictions and losses of a float32 run, which is what users see."""
    with torch.no_grad():
        out = model(**batch(case, torch.float32))
    for m, expected in by_modality(case, "pred").items():
        yield compare(f"pred/{m}", out.predictions[m], expected, FLOAT32_PREDICTION_LIMIT)
    for m, expected in by_modality(case, "loss_mod").items():
        yield compare(f"loss_mod/{m}", out.losses[m], expected, FLOAT32_LOSS_LIMIT, relative=True)
    yield compare("loss", out.loss, case.arrays["loss"], FLOAT32_LOSS_LIMIT, relative=True)


def _compare_masks(
    case: Case, config: ModelConfig, arguments: dict[str, Any]
) -> Iterator[Comparison]:
    for m, drawn in by_modality(case, "draw_mask").items():
        mask = arguments["masks"][m]
        expected = torch.zeros(drawn.shape).scatter(1, mask.masked, 1.0)
        yield compare(f"draw_mask/{m}", expected, drawn, 0)
        count = masked_count(config.input(m).tokens, config.input(m).mask_ratio)
        yield compare(f"masked count/{m}", count, np.array(mask.masked.shape[1]), 0)


def _compare_intermediates(
    case: Case, model: ReferenceMAE, out: ReferenceOutput, arguments: dict[str, Any]
) -> Iterator[Comparison]:
    masks = arguments["masks"]
    unshuffled = {k: v for k, v in arguments.items() if k != "shuffle"}
    with torch.no_grad():
        every = model.encode(arguments.get("video"), arguments.get("audio"))
        before = model(**unshuffled).decoder_input
    stages = {
        "tokens": out.tokens,
        "visible": {m: take_tokens(x, masks[m].visible) for m, x in out.tokens.items()},
        "enc": out.encoded,
        "enc_all": every,
        "proj": out.projected,
        "dec_in_preshuffle": before,
        "dec_in": out.decoder_input,
        "dec_out": out.decoder_output,
    }
    for name, stage in stages.items():
        for m, expected in by_modality(case, name).items():
            yield compare(f"{name}/{m}", stage[m], expected, STORED_LIMIT, relative=True)
    for m, scenic in SCENIC_MODALITY.items():
        if f"target/{scenic}" in case.arrays:
            source, expected = case.arrays[f"input/{scenic}"], case.arrays[f"target/{scenic}"]
            limit = target_limit(source, model.config.target_norm)
            yield compare(f"target/{m}", out.targets[m], expected, limit)
    for m, expected in by_modality(case, "target64").items():
        yield compare(f"target64/{m}", out.targets[m], expected, FLOAT64_LIMIT)


def _compare_weights(
    case: Case, config: ModelConfig, arguments: dict[str, Any]
) -> Iterator[Comparison]:
    # The file holds the decoder's own mask, which neither loss_on="all" nor `valid` touches.
    masked_only = dataclasses.replace(config, loss_on="masked")
    with torch.no_grad():
        plain = {name: x for name, x in arguments.items() if name != "valid"}
        weights = build(case, masked_only, torch.float64)(**plain).weights
    for m, expected in by_modality(case, "token_mask").items():
        yield compare(f"token_mask/{m}", weights[m], expected, 0)


def _compare_gradients(
    case: Case, model: ReferenceMAE, config: ModelConfig
) -> Iterator[Comparison]:
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    leaves = to_scenic(gradients, config)
    for group, limit in (("grad", GRADIENT_LIMIT), ("grad64", FLOAT64_LIMIT)):
        expected = case.group(group)
        if group == "grad" or expected:
            missing = sorted(leaves.keys() ^ expected.keys())
            yield Comparison(f"{group} leaves {missing}", len(missing), 0)
        for leaf, array in expected.items():
            # Softmax does not see a shift of all keys: this gradient is 0 up to rounding.
            is_zero = leaf.endswith("key/bias") or not array.any()
            limit_here = FLOAT64_LIMIT if is_zero else limit
            yield compare(f"{group}/{leaf}", leaves[leaf], array, limit_here, relative=not is_zero)


def _record_first_blocks(
    model: ReferenceMAE, config: ModelConfig, into: dict[str, torch.Tensor]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that keep what happens inside block 0 of every stack when it is first called."""
    parts = {
        "norm1": "LayerNorm_0",
        "attn": "MultiHeadDotProductAttention_0",
        "norm2": "LayerNorm_1",
        "mlp.fc1": "MlpBlock_0/Dense_0",
        "mlp.act": "MlpBlock_0/mlp1",
        "mlp": "MlpBlock_0",
    }
    hooks = []

    def keep(block: torch.nn.Module, path: str, name: str) -> None:
        def hook(module: torch.nn.Module, args: object, out: torch.Tensor) -> None:
            into.setdefault(name, out.detach())

        hooks.append(block.get_submodule(path).register_forward_hook(hook))

    def keep_qkv(block: Any, name: str) -> None:
        def hook(module: torch.nn.Module, args: object, out: torch.Tensor) -> None:
            qkv = out.detach().unflatten(-1, (3, block.attn.heads, -1)).unbind(2)
            for part, x in zip(("query", "key", "value"), qkv, strict=True):
                into.setdefault(f"{name}/{part}", x)

        hooks.append(block.attn.qkv.register_forward_hook(hook))

    for prefix, (scenic, _) in stack_names(config).items():
        block = model.get_submodule(f"{prefix}.blocks.0")
        name = f"{scenic}/encoderblock_0"
        keep(block, "", name)
        for path, part in parts.items():
            keep(block, path, f"{name}/{part}")
        keep_qkv(block, f"{name}/MultiHeadDotProductAttention_0")
    return hooks


def check_e2e_pretrain(case: Case) -> Iterator[Comparison]:
    """The authors' training step, as often as the case has losses, with our optimiser."""
    config = model_config(case, inputs="input0")
    settings = case.meta["config"]
    model = build(case, config, torch.float32, params="param0")
    optimizer = ReleasedAdamW(
        parameter_groups(model),
        betas=(settings["optimizer_configs"]["beta1"], settings["optimizer_configs"]["beta2"]),
        weight_decay=settings.get("explicit_weight_decay") or 0.0,
    )
    arguments = schedule(settings["lr_configs"])
    lr_limit = LR_LIMIT * arguments["base_lr"]
    # An element's gradient is known to 1e-3 of itself or better; Adam turns that into its step.
    limit = 1e-3 * float(case.arrays["lr"].max())
    for step, expected_loss in enumerate(case.arrays["loss"]):
        lr = learning_rate(step, **arguments)
        yield compare(f"lr[{step}]", lr, case.arrays["lr"][step], lr_limit)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        out = model(**batch(case, torch.float32, inputs=f"input{step}"))
        yield compare(f"loss[{step}]", out.loss, expected_loss, FLOAT32_LOSS_LIMIT, relative=True)
        out.loss.backward()
        optimizer.step()
        leaves = to_scenic(model.state_dict(), config)
        for leaf, expected in case.group(f"param{step + 1}").items():
            # Adam blows the rounding noise of these gradients up to whole steps.
            if not leaf.endswith("key/bias"):
                yield compare(f"param{step + 1}/{leaf}", leaves[leaf], expected, limit)
