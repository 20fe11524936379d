"""Golden cases about fine-tuning: a classifier's forward and backward pass, and training steps."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from golden_cases import FLOAT32_ULP, Case, Comparison, by_modality, compare
from golden_model import (
    FLOAT32_LOSS_LIMIT,
    FLOAT32_PREDICTION_LIMIT,
    FLOAT64_LIMIT,
    GRADIENT_LIMIT,
    STORED_LIMIT,
)
from golden_parts import LR_LIMIT, schedule
from torch import Tensor

from avmae_fast.config import AudioConfig, StackConfig, VideoConfig
from avmae_fast.finetune_config import ClassifierConfig
from avmae_fast.interop.scenic import SCENIC_MODALITY
from avmae_fast.interop.scenic_classifier import (
    Family,
    classifier_entries,
    classifier_from_scenic,
    classifier_to_scenic,
)
from avmae_fast.reference import ReferenceClassifier, ReferenceLogits
from avmae_fast.reference.classification import classification_loss, mean_loss, mix
from avmae_fast.train.optim import learning_rate, set_learning_rate
from avmae_fast.train.sgd import (
    ReleasedSGD,
    clip_to_norm,
    layer_id,
    layerwise_groups,
)

# What a fine-tuning case gives to the model.
_GIVEN = {"input", "param", "label", "label_eval", "drop", "batch_mask"}
_OURS = {scenic: m for m, scenic in SCENIC_MODALITY.items()}
_OFF = {
    "dropout_rate": (0, None),
    "attention_dropout_rate": (0, None),
    "attention_config": ({"type": "spacetime"}, None),
    "temporal_encoding_config": ({"method": "3d_conv"}, None),
}


def classifier_config(case: Case, inputs: str = "input") -> ClassifierConfig:
    """The model of a fine-tuning case; a setting we have no equivalent for is a ValueError."""
    model = case.meta["config"]["model"]
    for name, allowed in _OFF.items():
        if model.get(name) not in allowed:
            raise ValueError(f"{name} = {model[name]!r} is not covered")
    if model.get("positional_embedding", "sinusoidal_1d") != "sinusoidal_1d":
        raise ValueError("learned positions are not covered")
    family = _family(case)
    width, heads = model["hidden_size"], model["num_heads"]
    stack = StackConfig(width=width, layers=model["num_layers"], heads=heads, mlp=model["mlp_dim"])
    h, w, t = model["patches"]["size"]
    video = audio = None
    if f"{inputs}/rgb" in case.arrays:
        frames, height, columns = case.arrays[f"{inputs}/rgb"].shape[1:4]
        video = VideoConfig(frames=frames, height=height, width=columns, tubelet=(t, h, w))
    if f"{inputs}/spectrogram" in case.arrays:
        rows, bins = case.arrays[f"{inputs}/spectrogram"].shape[1:3]
        audio = AudioConfig(frames=rows, mel_bins=bins, patch=(h, w))
    by_token = model["classifier"] == "token"
    if not by_token and model["classifier"] != "gap":
        raise ValueError(f"classifier = {model['classifier']!r} is not covered")
    shared = model["share_encoder"]
    fusion = "bottleneck" if model["use_bottleneck"] else "early" if shared else "cross"
    return ClassifierConfig(
        encoder=stack,
        classes=case.meta["num_classes"],
        video=video,
        audio=audio,
        fusion=fusion,
        fusion_layer=model["fusion_layer"],
        # The authors add one for the class token.
        bottleneck_tokens=model["n_bottlenecks"] + by_token,
        share_blocks=shared,
        fuse_at_test=model["test_with_bottlenecks"],
        pool="mean" if not by_token else "cls" if family == "vivit" else "cls_positioned",
        norm="pooled" if family == "vivit" and not by_token else "tokens",
        representation=model["representation_size"],
        drop_path=model["stochastic_droplayer_rate"] or 0.0,
        modality_tokens=model["use_modality_tokens"],
    )


def _family(case: Case) -> Family:
    return "vivit" if case.meta["cls"] == "vivit" else "mbt"


def _kind(case: Case) -> str:
    return "sigmoid" if case.meta["cls"] == "sigmoid" else "softmax"


def build_classifier(
    case: Case, config: ClassifierConfig, dtype: torch.dtype, params: str = "param"
) -> ReferenceClassifier:
    """The reference with the case's parameters."""
    model = ReferenceClassifier(config)
    model.load_state_dict(classifier_from_scenic(case.group(params), config, _family(case)))
    return model.to(dtype)


def _inputs(case: Case, dtype: torch.dtype, inputs: str = "input") -> dict[str, Tensor]:
    arrays = {m: torch.from_numpy(x).to(dtype) for m, x in by_modality(case, inputs).items()}
    return {m: x.squeeze(-1) if m == "audio" else x for m, x in arrays.items()}


def _dropped(case: Case, config: ClassifierConfig) -> dict[str, Tensor] | None:
    """The branches left out, as the case drew them; the first layer never draws."""
    if not config.drop_path:
        return None
    batch = len(next(iter(case.group("input").values())))
    masks = {
        m: torch.zeros(config.encoder.layers, 2, batch, dtype=torch.bool) for m in SCENIC_MODALITY
    }
    seen: dict[str, int] = {}
    for number, owner in enumerate(case.meta["drop_paths"]):
        layer = int(owner.removesuffix("_spec").rsplit("_", 1)[1])
        m = "audio" if owner.endswith("_spec") else "video"
        branch = seen[owner] = seen.get(owner, -1) + 1
        drawn = torch.from_numpy(case.arrays[f"drop/{number:02d}"]).flatten()
        masks[m][layer, branch] = drawn.bool()
    return masks


def train_loss(case: Case, out: ReferenceLogits, dtype: torch.dtype) -> Tensor:
    """The loss of the training step, without the penalty on the weights."""
    labels = {m: torch.from_numpy(x).to(dtype) for m, x in by_modality(case, "label").items()}
    if not labels:
        alone = torch.from_numpy(case.arrays["label_eval"]).to(dtype)
        labels = dict.fromkeys(out.by_modality, alone)
    return mean_loss(out.by_modality, labels, _kind(case), _smoothing(case), _valid(case))


def _eval_loss(case: Case, out: ReferenceLogits) -> Tensor:
    labels = torch.from_numpy(case.arrays["label_eval"]).to(out.logits.dtype)
    return classification_loss(out.logits, labels, _kind(case), _smoothing(case), _valid(case))


def _smoothing(case: Case) -> float:
    return case.meta["config"].get("label_smoothing") or 0.0


def _valid(case: Case) -> Tensor | None:
    return torch.from_numpy(case.arrays["batch_mask"]) if "batch_mask" in case.arrays else None


def _penalty(case: Case, model: ReferenceClassifier) -> Tensor | float:
    """Half the sum of squares, times the factor, of the authors' leaves of two axes or more."""
    factor = case.meta["config"].get("l2_decay_factor")
    if not factor:
        return 0.0
    entries = classifier_entries(model.config, _family(case))
    counted = {e.name for e in entries if len(e.leaf_shape) > 1}
    squares = [p.square().sum() for n, p in model.named_parameters() if n in counted]
    return 0.5 * factor * torch.stack(squares).sum()


def check_finetune(case: Case) -> Iterator[Comparison]:
    """Everything a fine-tuning case holds; an array that nothing looks at is an error too."""
    compared = set()
    for comparison in compare_classifier(case, classifier_config(case)):
        compared.add(comparison.name.split("/")[0])
        yield comparison
    unread = sorted({name.split("/")[0] for name in case.arrays} - compared - _GIVEN)
    yield Comparison(f"arrays that nothing compares {unread}", len(unread), 0)


def compare_classifier(case: Case, config: ClassifierConfig) -> Iterator[Comparison]:
    dropped = _dropped(case, config)
    model = build_classifier(case, config, torch.float64)
    trained = model.train()(**_inputs(case, torch.float64), dropped=dropped)
    loss = train_loss(case, trained, torch.float64) + _penalty(case, model)
    yield from _compare_train(case, trained, loss, "64")
    loss.backward()
    yield from _compare_gradients(case, model)
    with torch.no_grad():
        tested = model.eval()(**_inputs(case, torch.float64))
        yield compare("logits64", tested.logits, case.arrays["logits64"], FLOAT64_LIMIT)
        got = _eval_loss(case, tested) + _penalty(case, model)
        yield compare("eval_loss64", got, case.arrays["eval_loss64"], FLOAT64_LIMIT)
        encoded = torch.cat(list(tested.encoded.values()), dim=1)
        yield compare("encoded", encoded, case.arrays["encoded"], STORED_LIMIT, relative=True)
        yield from _compare_float32(case, config, dropped)


def _compare_train(
    case: Case, out: ReferenceLogits, loss: Tensor, suffix: str
) -> Iterator[Comparison]:
    limit = FLOAT64_LIMIT if suffix else FLOAT32_PREDICTION_LIMIT
    for name, expected in case.group(f"train_logits{suffix}").items():
        # A ViViT has one modality and does not name it.
        m = _OURS.get(name, next(iter(out.by_modality)))
        yield compare(f"train_logits{suffix}/{name}", out.by_modality[m], expected, limit)
    limit = FLOAT64_LIMIT if suffix else FLOAT32_LOSS_LIMIT
    name = f"train_loss{suffix}"
    yield compare(name, loss, case.arrays[name], limit, relative=not suffix)


def _compare_float32(
    case: Case, config: ClassifierConfig, dropped: Mapping[str, Tensor] | None
) -> Iterator[Comparison]:
    model = build_classifier(case, config, torch.float32)
    trained = model.train()(**_inputs(case, torch.float32), dropped=dropped)
    loss = train_loss(case, trained, torch.float32) + _penalty(case, model)
    yield from _compare_train(case, trained, loss, "")
    tested = model.eval()(**_inputs(case, torch.float32))
    yield compare("logits", tested.logits, case.arrays["logits"], FLOAT32_PREDICTION_LIMIT)
    got = _eval_loss(case, tested) + _penalty(case, model)
    yield compare("eval_loss", got, case.arrays["eval_loss"], FLOAT32_LOSS_LIMIT, relative=True)


def _compare_gradients(case: Case, model: ReferenceClassifier) -> Iterator[Comparison]:
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    leaves = classifier_to_scenic(gradients, model.config, _family(case))
    expected = case.group("grad")
    # A model of one modality may own a bottleneck that nothing reads; its gradient is zero.
    idle = {n for n in case.meta["zero_grad_leaves"] if n not in leaves}
    leaves |= {name: np.zeros_like(expected[name]) for name in idle}
    missing = sorted(leaves.keys() ^ expected.keys())
    yield Comparison(f"grad leaves {missing}", len(missing), 0)
    for leaf, array in expected.items():
        # Softmax does not see a shift of all keys: this gradient is 0 up to rounding. With a
        # penalty it is that of the penalty.
        is_zero = not array.any() or float(np.abs(array).max()) < FLOAT64_LIMIT
        limit = FLOAT64_LIMIT if is_zero else GRADIENT_LIMIT
        yield compare(f"grad/{leaf}", leaves[leaf], array, limit, relative=not is_zero)


def check_e2e_finetune(case: Case) -> Iterator[Comparison]:
    """The authors' training step, mixup and clipping included, as often as the case says."""
    config, settings = classifier_config(case, "input0"), case.meta["config"]
    model = build_classifier(case, config, torch.float32, "param0").train()
    decay = settings["optimizer_configs"].get("layerwise_decay") or 1.0
    momentum = settings["optimizer_configs"]["momentum"]
    groups = layerwise_groups(model, config.encoder.layers, decay)
    optimizer = ReleasedSGD(groups, momentum)
    weights = dict(zip(config.modalities, case.arrays["mix_weights"].tolist(), strict=True))
    metrics = case.meta["metrics_per_step_value_normaliser"]
    for step, expected in enumerate(metrics):
        inputs = _inputs(case, torch.float32, f"input{step}")
        label = torch.from_numpy(case.arrays[f"label{step}"])
        inputs = {m: mix(x, weights[m]) for m, x in inputs.items()}
        labels = {m: mix(label, weights[m]) for m in inputs}
        if step == 0:
            yield from _compare_mixed(case, inputs, labels)
        optimizer.zero_grad()
        out = model(**inputs)
        loss = mean_loss(out.by_modality, labels, _kind(case), _smoothing(case))
        loss.backward()
        norm = clip_to_norm(model.parameters(), settings["max_grad_norm"])
        # What the authors log is the first modality's loss, without label smoothing.
        first = next(iter(labels))
        logged = classification_loss(out.by_modality[first], labels[first], _kind(case))
        for name, got in (("loss", logged), ("max_grad_norm_preclip_after_pmean", norm)):
            total, count = expected[name]
            wanted = np.array(total / count)
            # A norm's rounding is that of the gradients, 3e-5 of the largest in float32.
            limit = FLOAT32_LOSS_LIMIT if name == "loss" else 3e-5
            yield compare(f"{name}[{step}]", got, wanted, limit, relative=True)
        set_learning_rate(optimizer, learning_rate(step, **schedule(settings["lr_configs"])))
        optimizer.step()
        yield from _compare_weights(case, model, step + 1)


def _compare_mixed(
    case: Case, inputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]
) -> Iterator[Comparison]:
    limit = 2 * FLOAT32_ULP
    for m, expected in by_modality(case, "mixed_input0").items():
        got = inputs[m][..., None] if m == "audio" else inputs[m]
        yield compare(f"mixed_input0/{m}", got, expected, limit, relative=True)
    for m, expected in by_modality(case, "mixed_label0").items():
        yield compare(f"mixed_label0/{m}", labels[m], expected, limit)


def _compare_weights(case: Case, model: ReferenceClassifier, step: int) -> Iterator[Comparison]:
    leaves = classifier_to_scenic(model.state_dict(), model.config, _family(case))
    lr = case.meta["config"]["lr_configs"]["base_learning_rate"]
    # Clipped gradients have a norm of at most 1; in float32 they are good to 3e-5 of it.
    limit = 3e-5 * lr * case.meta["config"]["max_grad_norm"] * step + FLOAT32_ULP
    for leaf, expected in case.group(f"param{step}").items():
        yield compare(f"param{step}/{leaf}", leaves[leaf], expected, limit)


def check_sgd(case: Case) -> Iterator[Comparison]:
    """Our optimiser on the case's leaves, with its gradients; layer by layer where it says so."""
    meta = case.meta
    leaves = {n: torch.nn.Parameter(torch.from_numpy(x)) for n, x in case.group("param0").items()}
    layers, decay = meta.get("num_transformer_layers", 0), meta.get("layerwise_decay") or 1.0
    ids = _layer_ids(case) if decay != 1.0 else dict.fromkeys(leaves, layers + 1)
    for leaf, expected in case.group("layer_id").items():
        yield compare(f"layer_id/{leaf}", ids[leaf], expected, 0)
    scales = [decay ** (layers + 1 - i) for i in range(layers + 2)]
    if "lr_scale_per_layer_id" in case.arrays:
        expected = case.arrays["lr_scale_per_layer_id"]
        yield compare("lr_scale_per_layer_id", np.array(scales), expected, FLOAT64_LIMIT)
    groups: list[dict[str, Any]] = [
        {"params": [leaf], "lr_scale": scales[ids[name]]} for name, leaf in leaves.items()
    ]
    optimizer = ReleasedSGD(groups, meta["momentum"])
    arguments = schedule(meta["lr_configs"])
    for step, expected_lr in enumerate(case.arrays["base_lr"]):
        lr = learning_rate(step, **arguments)
        yield compare(f"base_lr[{step}]", lr, expected_lr, LR_LIMIT * arguments["base_lr"])
        gradients = case.group(f"grad{step}")
        for name, leaf in leaves.items():
            leaf.grad = torch.from_numpy(gradients[name].copy())
        if meta.get("max_grad_norm"):
            norm = clip_to_norm(leaves.values(), meta["max_grad_norm"])
            wanted = case.arrays["grad_norm_preclip"][step]
            # A float32 sum of some thousand squares.
            yield compare(f"grad_norm_preclip[{step}]", norm, wanted, 2e-6, relative=True)
        set_learning_rate(optimizer, lr)
        optimizer.step()
        for name, leaf in leaves.items():
            wanted = case.arrays[f"param{step + 1}/{name}"]
            # The norm's error, and some four roundings a step.
            limit = (2e-6 + 4 * FLOAT32_ULP) * (step + 1)
            yield compare(f"param{step + 1}/{name}", leaf, wanted, limit, relative=True)


def _layer_ids(case: Case) -> dict[str, int]:
    """The layer of each leaf, found through our name of it."""
    layers, order = case.meta["num_transformer_layers"], case.meta["modality_fusion"]
    names = case.group("param0")
    config = ClassifierConfig(
        encoder=StackConfig(width=4, layers=layers, heads=1, mlp=4),
        classes=1,
        video=VideoConfig() if "rgb" in order else None,
        audio=AudioConfig() if "spectrogram" in order else None,
        modality_tokens="Encoder_modality_token_rgb" in names,
    )
    entries = classifier_entries(config)
    return {leaf: layer_id(e.name, layers) for e in entries for leaf in e.leaves}
