"""From a batch on the host to the classifier's arguments: augmented, mixed, with labels."""

import torch

from avmae_fast.data.loader import Batch
from avmae_fast.finetune_config import FinetuneConfig
from avmae_fast.models import DropPath, draw_dropped
from avmae_fast.train.augment import augment_pictures, augment_sound
from avmae_fast.train.inputs import Inputs, Stage
from avmae_fast.train.mixup import draw_shares, mix, mix_labels
from avmae_fast.train.targets import Targets


class FinetuneStage(Stage):
    """Makes the arguments of `TrainedClassifier` out of training batches.

    What is random depends on the seed and the positions of the samples; the shares of mixup, and
    who is mixed with whom, also on how a step is cut into micro-batches and over processes.
    """

    def __init__(self, config: FinetuneConfig, targets: Targets, device: torch.device) -> None:
        super().__init__(device)
        self._config, self._targets = config, targets

    def _make(self, batch: Batch) -> Inputs:
        model, recipe, train = self._config.model, self._config.finetune, self._config.train
        keys, first = batch.keys.numpy(), int(batch.keys[0])
        inputs: Inputs = {}
        video, audio = self._video(batch), self._audio(batch, model.audio)
        if video is not None and model.video is not None:
            inputs["video"] = augment_pictures(video, keys, train.seed, recipe, model.video)
        if audio is not None:
            inputs["audio"] = augment_sound(audio, keys, train.seed, recipe)
        labels = self._targets(batch.records).to(self.device, non_blocking=True)
        merged = model.merge == "features"
        names: tuple[str, ...] = ("both",) if merged else model.modalities
        inputs["labels"] = dict.fromkeys(names, labels)
        if recipe.mixup:
            shares = draw_shares(names, recipe.mixup, train.seed, first)
            for m in model.modalities:
                inputs[m] = mix(inputs[m], shares["both" if merged else m])
            inputs["labels"] = mix_labels(labels, shares)
        if model.drop_path:
            place = {"step": first // train.batch, "first": first % train.batch}
            drawn = draw_dropped(model, len(keys), seed=train.seed, **place)
            inputs["drop"] = DropPath.of(model, drawn, self.device)
        return inputs


class PlainStage(Stage):
    """Makes the inputs of a classifier for evaluation: nothing is drawn."""

    def __init__(self, config: FinetuneConfig, device: torch.device) -> None:
        super().__init__(device)
        self._config = config

    def _make(self, batch: Batch) -> Inputs:
        sources = {"video": self._video(batch)}
        sources["audio"] = self._audio(batch, self._config.model.audio)
        return {name: x for name, x in sources.items() if x is not None}
