"""The classifier as training calls it: clips and labels in, losses out."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from avmae_fast.finetune_config import ClassifierConfig, RecipeConfig
from avmae_fast.models.classification_loss import classification_loss
from avmae_fast.models.classifier import Classifier, Prediction
from avmae_fast.models.drop_path import DropPath


@dataclass(frozen=True)
class Classification:
    """loss: scalar, the mean of `losses`. losses: scalar of each modality, see `loss_names`."""

    loss: Tensor
    losses: dict[str, Tensor]


class TrainedClassifier(Classifier):
    """A `Classifier` whose forward pass ends in the losses; weights and names are the same.

    Args:
        config: what it is made of.
        recipe: kind of loss, and label smoothing.
    """

    def __init__(self, config: ClassifierConfig, recipe: RecipeConfig) -> None:
        super().__init__(config)
        self._recipe = recipe

    @property
    def loss_names(self) -> tuple[str, ...]:
        """What has a loss of its own: each modality, or "both" where features are merged."""
        return ("both",) if self.config.merge == "features" else self.config.modalities

    def forward(  # type: ignore[override]
        self,
        video: Tensor | None = None,
        audio: Tensor | None = None,
        *,
        labels: Mapping[str, Tensor],
        drop: DropPath | None = None,
    ) -> Classification:
        """The losses of a batch.

        Args:
            video, audio, drop: as `Classifier.forward` takes them.
            labels: [B, C] float of each of `loss_names`.

        Raises:
            ValueError: an input or the labels are missing or of another shape.
        """
        predicted = super().forward(video, audio, drop=drop)
        return self.losses(predicted.by_modality, labels)

    def predict(self, video: Tensor | None = None, audio: Tensor | None = None) -> Prediction:
        """What a `Classifier` of these weights says, in evaluation."""
        return super().forward(video, audio)

    def losses(self, logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Classification:
        """The losses of logits [B, C] by name."""
        recipe, heads = self._recipe, self.config.heads
        losses = {
            name: classification_loss(
                {name: x}, labels, recipe.loss, heads=heads, smoothing=recipe.label_smoothing
            )
            for name, x in logits.items()
        }
        return Classification(torch.stack(list(losses.values())).mean(), losses)
