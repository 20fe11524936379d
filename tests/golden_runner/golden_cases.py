"""Golden files: what is in one, which model it is about, and how two arrays are compared.

A file is an .npz whose `meta` is JSON with the `kind` of the case and, for models, the authors'
whole configuration. Nothing here looks at a file's name.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avmae_fast.config import AudioConfig, Modality, ModelConfig, StackConfig, VideoConfig
from avmae_fast.interop.scenic import SCENIC_MODALITY
from avmae_fast.reference import Mask

FLOAT32_ULP = 2.0**-23
REPOSITORY_FOLDER = Path(__file__).parents[1] / "golden"

FUSION = {
    "concat_and_encode": "early",
    "separate_encoders_and_concat": "mid",
    "separate_encoders": "separate",
    "same_encoder": "shared",
}
_DECODING = {
    "concat_and_decode": "joint",
    "same_decoder": "shared",
    "separate_decoders": "separate",
}
_POSITIONS = {"sinusoidal_1d": "sincos1d", "learned_1d": "learned"}
# What the released pretraining leaves off and ModelConfig has no field for.
_OFF = {
    "dropout_rate": (0, None),
    "attention_dropout_rate": (0, None),
    "stochastic_depth": (0, None),
    "stochastic_droplayer_rate": (0, None),
    "representation_size": (None,),
    "select_central_frame": (False, None),
    "l2_decay_factor": (0, None),
    "classifier": ("none", None),
}


@dataclass(frozen=True)
class Case:
    """One golden file."""

    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]

    @property
    def kind(self) -> str:
        return self.meta["kind"]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays whose name starts with `prefix/`, by the rest of their name."""
        start = f"{prefix}/"
        return {k.removeprefix(start): v for k, v in self.arrays.items() if k.startswith(start)}


@dataclass(frozen=True)
class Comparison:
    """The largest difference between two arrays and how large it may be."""

    name: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.3g}, allowed {self.limit:.3g}"


def folder() -> Path:
    """Where the golden files are: AVMAE_GOLDEN, else the ones that come with the tests."""
    return Path(os.environ.get("AVMAE_GOLDEN", REPOSITORY_FOLDER))


def load(path: Path) -> Case:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return Case(arrays, json.loads(str(arrays.pop("meta"))))


def compare(
    name: str, got: object, expected: np.ndarray, limit: float, relative: bool = False
) -> Comparison:
    """Largest absolute difference, or its share of the largest expected value if `relative`.

    Other shapes and NaNs are an infinite error.
    """
    a = np.asarray(got.detach() if isinstance(got, torch.Tensor) else got, dtype=np.float64)
    b = np.asarray(expected, dtype=np.float64)
    if a.shape != b.shape:
        return Comparison(f"{name} {a.shape} instead of {b.shape}", float("inf"), limit)
    error = float(np.abs(a - b).max(initial=0.0))
    largest = float(np.abs(b).max(initial=0.0))
    if relative and largest > 0:
        error /= largest
    return Comparison(name, error if np.isfinite(error) else float("inf"), limit)


def target_limit(source: np.ndarray, norm: str) -> float:
    """How far the authors' float32 targets may be from exact ones, given what they are made of.

    Raw patches are copies. Normalised ones divide by a variance that float32 gets as
    E[x^2] - E[x]^2, a difference of numbers up to the largest square.
    """
    if norm == "none":
        return 0.0
    return 16 * FLOAT32_ULP * max(1.0, float(np.square(source.astype(np.float64)).max()))


def model_config(case: Case, inputs: str = "input") -> ModelConfig:
    """The model of a pretraining case; a setting we have no equivalent for is a ValueError."""
    config = case.meta["config"]
    model, loss = config["model"], config["masked_feature_loss"]
    decoder = model["decoder_config"]
    for section in (config, model, decoder, loss):
        for name, allowed in _OFF.items():
            if section.get(name) not in allowed:
                raise ValueError(f"{name} = {section[name]!r} is not covered")
    if model["positional_embedding_decoder"] != "sinusoidal_1d":
        raise ValueError("learned decoder positions are not covered")
    return ModelConfig(
        encoder=_stack(model),
        decoder=_stack(decoder),
        video=_video(case, inputs),
        audio=_audio(case, inputs),
        fusion=FUSION[model["encoder_strategy"]],
        fusion_layers=model.get("fusion_layers") or 1,
        decoding=_DECODING[model["decoder_strategy"]],
        objective="inpainting_released" if model.get("use_inpainting") else "reconstruction",
        positions=_POSITIONS[model["positional_embedding"]],
        modality_tokens=model.get("use_modality_tokens", False),
        encoder_norm=model.get("normalise_encoder_output", True),
        projection_bias=decoder.get("use_projection_bias", True),
        target_norm=_target_norm(loss),
        loss_on="all" if loss.get("loss_unmasked_tokens") else "masked",
        loss_mean_over_patch=loss.get("normalise_by_output_dimension", False),
    )


def _stack(section: Mapping[str, int]) -> StackConfig:
    return StackConfig(
        width=section["hidden_size"],
        layers=section["num_layers"],
        heads=section["num_heads"],
        mlp=section["mlp_dim"],
    )


def _video(case: Case, inputs: str) -> VideoConfig | None:
    if f"{inputs}/rgb" not in case.arrays:
        return None
    loss = case.meta["config"]["masked_feature_loss"]
    h, w, t = case.meta["config"]["model"]["patches"]["size"]
    frames, height, width = case.arrays[f"{inputs}/rgb"].shape[1:4]
    return VideoConfig(
        frames=frames,
        height=height,
        width=width,
        tubelet=(t, h, w),
        mask_ratio=loss["token_mask_probability_dict"]["rgb"],
        loss_weight=loss["modality_weight"]["rgb"],
    )


def _audio(case: Case, inputs: str) -> AudioConfig | None:
    if f"{inputs}/spectrogram" not in case.arrays:
        return None
    loss = case.meta["config"]["masked_feature_loss"]
    frames, mel_bins = case.arrays[f"{inputs}/spectrogram"].shape[1:3]
    return AudioConfig(
        frames=frames,
        mel_bins=mel_bins,
        patch=tuple(case.meta["config"]["model"]["patches"]["size"][:2]),
        mask_ratio=loss["token_mask_probability_dict"]["spectrogram"],
        loss_weight=loss["modality_weight"]["spectrogram"],
    )


def _target_norm(loss: Mapping[str, Any]) -> str:
    if loss.get("standardise_per_patch"):
        return "patch"
    return "patch_channel" if loss.get("standardise_per_patch_channels") else "none"


def batch(case: Case, dtype: torch.dtype, inputs: str = "input") -> dict[str, Any]:
    """Arguments of `ReferenceMAE.forward`: inputs in `dtype`, masks, and what else the case has."""
    arrays: dict[str, Any] = {"masks": {}}
    for m, scenic in SCENIC_MODALITY.items():
        if f"{inputs}/{scenic}" not in case.arrays:
            continue
        x = torch.from_numpy(case.arrays[f"{inputs}/{scenic}"]).to(dtype)
        arrays[m] = x.squeeze(-1) if m == "audio" else x
        arrays["masks"][m] = Mask(
            _index(case.arrays[f"unmasked_idx/{scenic}"]),
            _index(case.arrays[f"masked_idx/{scenic}"]),
        )
        if f"perm/{scenic}" in case.arrays:
            arrays.setdefault("shuffle", {})[m] = _index(case.arrays[f"perm/{scenic}"])
    if "batch_mask" in case.arrays:
        arrays["valid"] = torch.from_numpy(case.arrays["batch_mask"])
    return arrays


def by_modality(case: Case, prefix: str) -> dict[Modality, np.ndarray]:
    """The arrays `prefix/rgb` and `prefix/spectrogram` under our names, where they exist."""
    found = case.group(prefix)
    return {m: found[scenic] for m, scenic in SCENIC_MODALITY.items() if scenic in found}


def _index(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).long()
