"""What a run trains for: all in which pretraining and fine-tuning differ, seen from their loop."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from avmae_fast.config import Run
from avmae_fast.data.loader import ClipLoader
from avmae_fast.data.manifest import Manifest
from avmae_fast.models import AudiovisualMAE, TrainedClassifier
from avmae_fast.train.inputs import Stage
from avmae_fast.train.metrics import Metrics
from avmae_fast.train.optim import ReleasedAdamW
from avmae_fast.train.recipe import choose_autocast
from avmae_fast.train.sgd import ReleasedSGD

Model = AudiovisualMAE | TrainedClassifier


class Task(ABC):
    """A model, how its inputs are made, how it is updated and judged, and what it leaves behind.

    config: the run. autocast: the context of every forward pass.
    """

    def __init__(self, config: Run, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.autocast = choose_autocast(config.train, device)

    @property
    def training_input(self) -> Run:
        """What the loader cuts training clips for."""
        return self.config

    @property
    @abstractmethod
    def clip_flops(self) -> int:
        """Operations of one training step for one clip."""

    @abstractmethod
    def stage(self, manifest: Manifest) -> Stage:
        """Makes the model's arguments out of batches of the training clips in `manifest`."""

    @abstractmethod
    def build(self, resumed: bool) -> Model:
        """The model as the run begins; `resumed` if a checkpoint's weights will replace its own."""

    @abstractmethod
    def optimizer(self, model: Model) -> ReleasedAdamW | ReleasedSGD:
        """What updates it."""

    @abstractmethod
    def opened(self) -> None:
        """The run's folder is this run's from now on; called where its files are written."""

    @abstractmethod
    def validate(self, model: Model, held_out: ClipLoader, metrics: Metrics, step: int) -> None:
        """Write a line of validation.jsonl."""

    @abstractmethod
    def finish(self, weights: dict[str, Tensor], step: int) -> Path:
        """Leave the trained model and a report in the run's folder; returns the report."""
