"""Features of clips: from a pretrained encoder, or from the stacks of a fine-tuned classifier.

`A` is what the model makes of the sound alone, `V` of the pictures alone, `AV` of both together:
pooled [D] (AV: video then audio, [2 D]), or of every token [N, D] (AV: video's, then audio's).
A clip's views are averaged. Rows of clips that lack what a feature is of, or that cannot be read,
are NaN, and `A_valid`, `V_valid`, `AV_valid` say so; a NaN that a model makes is an error.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avmae_fast.config import (
    AudioConfig,
    ConfigError,
    DataConfig,
    Modality,
    ModelConfig,
    TrainConfig,
)
from avmae_fast.data.manifest import Manifest
from avmae_fast.data.samples import SampleSpec
from avmae_fast.data.views import ClipViews
from avmae_fast.finetune_config import ClassifierConfig
from avmae_fast.models import Classifier, Encoder
from avmae_fast.models.pretrained import CONFIG
from avmae_fast.train.classifier_folder import load_classifier
from avmae_fast.train.evaluate_classifier import Views, batches
from avmae_fast.train.export import ENCODER
from avmae_fast.train.model_inputs import NotFiniteOutput, tensors_of
from avmae_fast.train.recipe import choose_autocast, choose_device
from avmae_fast.train.run_folder import CLASSIFIER, RUN, RunFolderError, read_any_run

Kind = Literal["A", "V", "AV"]
NEEDS: dict[Kind, tuple[Modality, ...]] = {
    "A": ("audio",),
    "V": ("video",),
    "AV": ("video", "audio"),
}
SUFFIXES = (".safetensors", ".npz", ".parquet")


@dataclass(frozen=True)
class _Cut:
    """What cutting clips needs of a run."""

    model: ModelConfig | ClassifierConfig
    data: DataConfig
    train: TrainConfig


@dataclass(frozen=True)
class Embedder:
    """A model that makes tokens, and how its clips are cut."""

    model: Encoder | Classifier
    data: DataConfig

    @property
    def audio(self) -> AudioConfig | None:
        return self.model.config.audio

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The features it can make."""
        has = self.model.config.modalities
        return tuple(kind for kind, needs in NEEDS.items() if set(needs) <= set(has))

    def tokens(self, inputs: Mapping[Modality, Tensor]) -> dict[Modality, Tensor]:
        """[B, N, D] of each input; a modality may be absent."""
        if isinstance(self.model, Classifier):
            return self.model.tokens(inputs)
        return self.model.encode(inputs, None)


@dataclass(frozen=True)
class ClipFeatures:
    """features: float32 of each kind, a row for each clip. valid: bool [n] of each kind.

    paths, labels: of the clips; a label of -1 stands for none or several.
    problems: path and reason of each clip that could not be read.
    """

    features: dict[Kind, NDArray[np.float32]]
    valid: dict[Kind, NDArray[np.bool_]]
    paths: list[str]
    labels: NDArray[np.int64]
    problems: list[tuple[str, str]]


def load_embedder(path: Path) -> Embedder:
    """The encoder of a pretraining run or of a folder, or the classifier of a fine-tuning run.

    Raises:
        RunFolderError: there is neither.
        PretrainedError: it is damaged.
    """
    if (path / RUN).is_file():
        folder = next((path / n for n in (CLASSIFIER, ENCODER) if (path / n).is_dir()), None)
        if folder is None:
            raise RunFolderError(f"{str(path)!r} holds a run that is not done: no model to use yet")
        config = read_any_run(path)
        if folder.name == ENCODER:
            return Embedder(Encoder.from_pretrained(folder), config.data)
        return Embedder(load_classifier(path).model, config.data)
    if not (path / CONFIG).is_file():
        raise RunFolderError(f"{str(path)!r} is neither the folder of a run nor of a model")
    record = json.loads((path / CONFIG).read_text())
    if record.get("architecture") == "Classifier":
        tuned = load_classifier(path)
        return Embedder(tuned.model, tuned.config.data)
    encoder = Encoder.from_pretrained(path)
    sides = encoder.config.video and (encoder.config.video.height, encoder.config.video.width)
    # Of a model from elsewhere only its geometry is known: its picture is the whole short side.
    data = {"short_side": max(sides or (1,)), **record.get("data", {})}
    return Embedder(encoder, DataConfig(manifest=path, **data))


@torch.no_grad()
def embed(
    embedder: Embedder,
    manifest: Manifest,
    kinds: Sequence[Kind],
    views: Views,
    train: TrainConfig,
    *,
    per_token: bool = False,
    workers: int = 0,
) -> ClipFeatures:
    """The features of every clip of a manifest.

    Args:
        kinds: which ones; `Embedder.kinds` are possible.
        train: `batch` clips at a time, device and precision.
        per_token: keep every token, not their mean.

    Raises:
        ConfigError: the model cannot make a feature that is asked for.
        NotFiniteOutput: a feature is not finite.
    """
    if wrong := [kind for kind in kinds if kind not in embedder.kinds]:
        possible = ", ".join(embedder.kinds)
        raise ConfigError(f"features {wrong} are not valid: this model makes {possible}")
    device, spec = choose_device(train), _spec(embedder, train)
    autocast = choose_autocast(train, device)
    embedder = replace(embedder, model=embedder.model.to(device).eval())
    found: dict[Kind, dict[int, NDArray[np.float32]]] = {kind: {} for kind in kinds}
    problems = []
    clips = views.read(manifest, spec, workers, embedder.data.timeout_s)
    for batch in batches(clips, train.batch):
        problems += [(str(manifest[c.record].path), c.problem) for c in batch if c.problem]
        for kind in kinds:
            with autocast():
                found[kind] |= _features(embedder, batch, kind, per_token, device)
    return ClipFeatures(
        features={kind: _filled(rows, len(manifest)) for kind, rows in found.items()},
        valid={kind: np.isin(np.arange(len(manifest)), list(rows)) for kind, rows in found.items()},
        paths=[str(record.path) for record in manifest],
        labels=np.array([record.label for record in manifest], np.int64),
        problems=problems,
    )


def _spec(embedder: Embedder, train: TrainConfig) -> SampleSpec:
    return SampleSpec.of(_Cut(embedder.model.config, embedder.data, train))


def _features(
    embedder: Embedder, clips: list[ClipViews], kind: Kind, per_token: bool, device: torch.device
) -> dict[int, NDArray[np.float32]]:
    """One kind of feature of the clips that have what it takes, by record."""
    needs = NEEDS[kind]
    chosen = [
        ClipViews(
            clip.record,
            clip.video if "video" in needs else None,
            clip.waveform if "audio" in needs else None,
        )
        for clip in clips
        if not ("video" in needs and clip.video is None)
        and not ("audio" in needs and clip.waveform is None)
    ]
    if not chosen:
        return {}
    tokens = embedder.tokens(tensors_of(chosen, embedder.audio, device))
    parts = [x.float().unflatten(0, (len(chosen), -1)).mean(1) for x in tokens.values()]
    made = torch.cat(parts, 1) if per_token else torch.cat([x.mean(1) for x in parts], 1)
    finite = made.flatten(1).isfinite().all(1)
    records = [clip.record for clip in chosen]
    if not finite.all():
        bad = [record for record, ok in zip(records, finite.tolist(), strict=True) if not ok]
        raise NotFiniteOutput.of(bad, f"features {kind}")
    return dict(zip(records, made.cpu().numpy(), strict=True))


def _filled(rows: dict[int, NDArray[np.float32]], count: int) -> NDArray[np.float32]:
    """[count, ...]; NaN where there is no row."""
    shape = next(iter(rows.values())).shape if rows else (0,)
    out = np.full((count, *shape), np.nan, np.float32)
    for record, row in rows.items():
        out[record] = row
    return out


def require_writable(path: Path, per_token: bool) -> None:
    """Before minutes of embedding: ConfigError unless features can be written to `path`.

    Raises:
        FileExistsError: it is there already.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"OUT = {str(path)!r} is not valid: its name must end in {SUFFIXES}")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ConfigError(
            f"OUT = {str(path)!r} is not valid without the package pyarrow: pip install pyarrow, "
            "or write .safetensors or .npz"
        )
    if path.suffix == ".parquet" and per_token:
        raise ConfigError("parquet holds pooled features: write tokens to .safetensors or .npz")
    if not path.parent.is_dir():
        raise ConfigError(f"OUT = {str(path)!r} is not valid: there is no folder {path.parent}")
    if path.exists():
        raise FileExistsError(f"{path} is there already: remove it, or choose another OUT")


def write_features(features: ClipFeatures, path: Path) -> None:
    """Write features whole or not at all, in the format that the name ends in."""
    partial = path.with_name(f".partial-{path.name}")
    arrays: dict[str, NDArray[Any]] = {"labels": features.labels}
    arrays |= {str(kind): x for kind, x in features.features.items()}
    arrays |= {f"{kind}_valid": x for kind, x in features.valid.items()}
    if path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(arrays, partial, metadata={"paths": json.dumps(features.paths)})
    elif path.suffix == ".npz":
        with partial.open("wb") as file:
            np.savez(file, paths=np.array(features.paths), **arrays)  # type: ignore[arg-type]
    else:
        _write_parquet(arrays, features.paths, partial)
    os.replace(partial, path)


def _write_parquet(arrays: Mapping[str, NDArray[Any]], paths: list[str], target: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {"path": pyarrow.array(paths)}
    for name, x in arrays.items():
        columns[name] = pyarrow.array(x if x.ndim == 1 else list(x))
    pyarrow.parquet.write_table(pyarrow.table(columns), target)


def read_features(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays that `write_features` wrote, as A, A_valid and labels, by name.

    Raises:
        ConfigError: it is no such file.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path) as file:
                return {name: file[name] for name in file.files}
        if path.suffix == ".parquet" and find_spec("pyarrow") is not None:
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path).to_pydict()
            return {name: np.array(column) for name, column in table.items()}
    except Exception as error:
        raise ConfigError(f"{path} cannot be read as a file of features: {error}") from error
    raise ConfigError(
        f"{path} is not a file of features: those end in {SUFFIXES}, and parquet needs pyarrow"
    )
