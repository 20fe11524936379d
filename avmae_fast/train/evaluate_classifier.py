"""A classifier on the clips of a manifest: logits averaged over views, scores, what was missing.

Clips that cannot be read, and clips without a label, are counted, listed and left out; a clip that
lacks one of the model's modalities is judged by the other.
"""

import csv
import io
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avmae_fast.config import DataConfig, Modality, TrainConfig
from avmae_fast.data.manifest import Manifest, ManifestError
from avmae_fast.data.samples import SampleSpec
from avmae_fast.data.views import ClipViews, read_views
from avmae_fast.train.classifier_folder import FinetunedModel
from avmae_fast.train.model_inputs import NotFiniteOutput, tensors_of
from avmae_fast.train.recipe import Autocast, choose_autocast
from avmae_fast.train.score import ActionScores, HeadScores, score_heads
from avmae_fast.train.targets import Targets, head_spans

logger = logging.getLogger(__name__)

SUMMARY, PER_CLASS = "summary.json", "per_class.csv"
_LISTED = 20


@dataclass(frozen=True)
class Views:
    """How many cuts of each clip are averaged over."""

    temporal: int
    spatial: int

    @property
    def count(self) -> int:
        return self.temporal * self.spatial

    def read(
        self, manifest: Manifest, spec: SampleSpec, workers: int, timeout_s: float
    ) -> Iterator[ClipViews]:
        """These cuts of every clip of a manifest, see `read_views`."""
        counts = (self.temporal, self.spatial)
        return read_views(manifest, spec, *counts, workers=workers, timeout_s=timeout_s)


@dataclass(frozen=True)
class ClassifierReport:
    """What came out.

    scores: of each head, and of "action" where there are several.
    clips: rows of the manifest. scored: those that count.
    unlabelled: rows without a label. unreadable: path and reason of each.
    without: clips that were judged without this modality.
    """

    source: Path
    views: Views
    classes: tuple[str, ...]
    heads: dict[str, int]
    scores: dict[str, HeadScores | ActionScores]
    clips: int
    scored: int
    unlabelled: int
    unreadable: list[tuple[str, str]]
    without: dict[Modality, int]

    def __str__(self) -> str:
        lines = [f"{self.scored} of {self.clips} clips, {self.views.count} views each"]
        for head, scores in self.scores.items():
            parts = [f"{name} {value:.4f}" for name, value in scores.summary().items()]
            lines.append(f"{head}: {', '.join(parts)}")
        for m, count in self.without.items():
            if count:
                lines.append(f"{count} clips have no {m} and were judged without it")
        if self.unlabelled:
            lines.append(f"{self.unlabelled} clips have no label and do not count")
        if self.unreadable:
            path, reason = self.unreadable[0]
            lines.append(
                f"{len(self.unreadable)} clips cannot be read and do not count, such as {path} "
                f"({reason})"
            )
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """All but the scores of single classes, as JSON can hold it."""
        return {
            "manifest": str(self.source),
            "temporal_views": self.views.temporal,
            "spatial_views": self.views.spatial,
            "clips": self.clips,
            "scored": self.scored,
            "unlabelled": self.unlabelled,
            "unreadable": len(self.unreadable),
            "unreadable_files": [list(item) for item in self.unreadable[:_LISTED]],
            "without": self.without,
            "scores": {head: scores.summary() for head, scores in self.scores.items()},
        }

    def per_class(self) -> str:
        """CSV: a row for each class; what a class has none of is left empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("head", "class", "clips", "recall", "AP", "AUC"))
        for head, span in head_spans(self.heads).items():
            scores = self.scores[head]
            assert isinstance(scores, HeadScores)
            for row, c in enumerate(span):
                numbers = (scores.recall[row], scores.ap[row], scores.auc[row])
                cells = ["" if np.isnan(x) else f"{x:.6f}" for x in numbers]
                writer.writerow((head, self.classes[c], scores.positives[row], *cells))
        return text.getvalue()

    def write(self, folder: Path) -> Path:
        """Write summary.json and per_class.csv into a folder; returns the summary."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PER_CLASS).write_text(self.per_class())
        (folder / SUMMARY).write_text(json.dumps(self.summary(), indent=1) + "\n")
        return folder / SUMMARY


def evaluate_classifier(
    tuned: FinetunedModel,
    manifest: Manifest,
    views: Views,
    data: DataConfig,
    train: TrainConfig,
    clips: Iterable[ClipViews] | None = None,
) -> ClassifierReport:
    """Score a classifier on every clip of a manifest.

    Args:
        manifest: read with the classifier's class names.
        data: how clips are read: `workers`, `timeout_s`, `reader`.
        train: `batch` clips at a time, each with its views, and the precision.
        clips: what `read_views` gives, where that has been read already.

    Raises:
        ManifestError: no clip can be scored, or labels do not fit the heads.
        NotFiniteOutput: logits are not finite.
    """
    config = tuned.config
    targets = Targets(manifest, config.model.heads, config.finetune.loss, required=False)
    known = [targets.labelled(record) for record in range(len(manifest))]
    if not any(known):
        raise ManifestError(
            f"{manifest.source} labels none of its {len(manifest)} clips: evaluation needs a "
            "column label or labels"
        )
    device = next(tuned.model.parameters()).device
    judged = _Judged(tuned, choose_autocast(train, device), device)
    if clips is None:
        spec = SampleSpec.of(config)
        clips = views.read(manifest, spec, data.workers, data.timeout_s)
    for batch in batches(clips, train.batch):
        judged.add([clip for clip in batch if known[clip.record] or clip.problem])
    unreadable = [(str(manifest[i].path), reason) for i, reason in judged.unreadable.items()]
    if not judged.logits:
        path, reason = unreadable[0]
        raise ManifestError(
            f"{manifest.source}: no clip can be scored, {len(unreadable)} cannot be read, such as "
            f"{path} ({reason})"
        )
    logits, records = torch.cat(judged.logits).numpy(), torch.tensor(judged.records)
    return ClassifierReport(
        source=manifest.source,
        views=views,
        classes=tuned.classes,
        heads=config.model.heads,
        scores=score_heads(
            logits, targets(records).numpy(), config.model.heads, config.finetune.loss
        ),
        clips=len(manifest),
        scored=len(records),
        unlabelled=known.count(False),
        unreadable=unreadable,
        without=judged.without,
    )


class _Judged:
    """The logits of the clips so far, each a mean over its views."""

    def __init__(self, tuned: FinetunedModel, autocast: Autocast, device: torch.device) -> None:
        self._tuned, self._autocast, self._device = tuned, autocast, device
        self.records: list[int] = []
        self.logits: list[Tensor] = []
        self.unreadable: dict[int, str] = {}
        self.without: dict[Modality, int] = dict.fromkeys(tuned.config.model.modalities, 0)

    def add(self, clips: list[ClipViews]) -> None:
        self.unreadable |= {clip.record: clip.problem for clip in clips if clip.problem}
        readable = [clip for clip in clips if not clip.problem]
        # Clips of one kind share a batch: what a model is given has all rows or none.
        for kind in sorted({_kind(clip) for clip in readable}):
            self._judge([clip for clip in readable if _kind(clip) == kind])

    @torch.no_grad()
    def _judge(self, clips: list[ClipViews]) -> None:
        inputs = tensors_of(clips, self._tuned.config.model.audio, self._device)
        partial = len(inputs) < len(self._tuned.config.model.modalities)
        with self._autocast():
            logits = self._tuned.model(**inputs, partial=partial).logits
        mean = logits.float().unflatten(0, (len(clips), -1)).mean(1).cpu()
        if not mean.isfinite().all():
            rows = (~mean.isfinite().all(1)).nonzero()[:, 0].tolist()
            raise NotFiniteOutput.of([clips[row].record for row in rows], "logits")
        self.records += [clip.record for clip in clips]
        self.logits.append(mean)
        for m in self.without.keys() - inputs.keys():
            self.without[m] += len(clips)


def _kind(clip: ClipViews) -> tuple[bool, bool]:
    return clip.video is not None, clip.waveform is not None


def batches(clips: Iterable[ClipViews], size: int) -> Iterator[list[ClipViews]]:
    """Clips by `size` at a time."""
    batch: list[ClipViews] = []
    for clip in clips:
        batch.append(clip)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
