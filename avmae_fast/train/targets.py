"""The labels of a manifest as targets of a classifier's heads.

A classifier of one head has the manifest's classes in their order. One of several heads, as verbs
and nouns, has those named `verb/...` for its head `verb`; heads stand in the order of the classes.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from avmae_fast.data.manifest import Manifest, ManifestError, classes_file
from avmae_fast.data.shard_index import is_index
from avmae_fast.finetune_config import Loss

_SHOWN = 5


class Targets:
    """Many-hot targets of the records of a manifest.

    Args:
        heads: number of classes of each head, in order.
        loss: with `softmax` every record needs one class of each head, with `sigmoid` one at least.
        required: whether a record without labels is an error, as in training.

    Raises:
        ManifestError: classes and heads do not fit, or a record has too few labels or too many.
    """

    def __init__(
        self, manifest: Manifest, heads: Mapping[str, int], loss: Loss, required: bool = True
    ) -> None:
        self._manifest = manifest
        self._classes = sum(heads.values())
        check_classes(manifest, heads)
        spans = head_spans(heads)
        if required or loss == "softmax":
            _check_labels(manifest, spans, loss, required)

    def __call__(self, records: Tensor) -> Tensor:
        """The targets [B, C], float32 0 or 1, of records by their numbers [B]."""
        targets = torch.zeros(len(records), self._classes)
        for row, record in zip(targets, records.tolist(), strict=True):
            row[list(self._manifest.labels(record))] = 1.0
        return targets

    def labelled(self, record: int) -> bool:
        """Whether a record has a label at all."""
        return bool(self._manifest.labels(record))


def head_spans(heads: Mapping[str, int]) -> dict[str, range]:
    """Which classes each head has."""
    spans, first = {}, 0
    for head, count in heads.items():
        spans[head] = range(first, first + count)
        first += count
    return spans


def check_classes(manifest: Manifest, heads: Mapping[str, int]) -> None:
    """Raise ManifestError unless the manifest's classes are those of the heads."""
    classes, wanted = manifest.classes, sum(heads.values())
    if not classes:
        raise ManifestError(
            f"{manifest.source} names no class: fine-tuning needs a column label or labels"
        )
    if len(classes) != wanted:
        beside = f"list all classes in {classes_file(manifest.source).name}"
        if is_index(manifest.source):
            beside = "pack a manifest with all classes in NAME.classes.txt beside it"
        raise ManifestError(
            f"{manifest.source} names {len(classes)} classes, model.classes = "
            f"{dict(heads) if len(heads) > 1 else wanted}: set model.classes to what there is, or "
            f"{beside} if not all of them occur"
        )
    if len(heads) == 1:
        return
    for head, span in head_spans(heads).items():
        for name in classes[span.start : span.stop]:
            if not name.startswith(f"{head}/"):
                raise ManifestError(
                    f"{manifest.source}: class {name!r} stands where one of the {len(span)} of "
                    f"head {head!r} must, which are named {head}/NAME; heads and classes must be "
                    "in one order"
                )


def _check_labels(
    manifest: Manifest, spans: Mapping[str, Sequence[int]], loss: Loss, required: bool
) -> None:
    bad = []
    for record in range(len(manifest)):
        labels = manifest.labels(record)
        if not labels and not required:
            continue
        counts = [sum(label in span for label in labels) for span in spans.values()]
        if not labels or (loss == "softmax" and any(count != 1 for count in counts)):
            bad.append(record)
    if bad:
        listed = ", ".join(str(manifest[i].path) for i in bad[:_SHOWN])
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        each = "" if len(spans) == 1 else " of each of " + ", ".join(spans)
        wanted = f"exactly one label{each}" if loss == "softmax" else "at least one label"
        remedy = "; for several labels a clip set finetune.loss = 'sigmoid'"
        raise ManifestError(
            f"{manifest.source}: {len(bad)} clips do not have {wanted}: {listed}{more}"
            + remedy * (loss == "softmax" and len(spans) == 1)
        )
