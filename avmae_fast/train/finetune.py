"""Fine-tuning: the loop of `avmae_fast.train.pretrain` with a classifier in it."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from avmae_fast.data.loader import ClipLoader, split_manifest
from avmae_fast.data.manifest import Manifest, ManifestError
from avmae_fast.finetune_config import FinetuneConfig
from avmae_fast.interop.transfer import TransferError, transfer
from avmae_fast.models import TrainedClassifier
from avmae_fast.train.classifier_folder import load_classifier, save_classifier
from avmae_fast.train.distributed import World
from avmae_fast.train.evaluate_classifier import Views, evaluate_classifier
from avmae_fast.train.finetune_inputs import FinetuneStage, PlainStage
from avmae_fast.train.flops import classifier_flops
from avmae_fast.train.initial_weights import load_initial_weights
from avmae_fast.train.inputs import Stage
from avmae_fast.train.metrics import Metrics
from avmae_fast.train.optim import ReleasedAdamW
from avmae_fast.train.pretrain import Outcome, prepare, run_task
from avmae_fast.train.recipe import build_classifier, check_kernels
from avmae_fast.train.run_folder import EVALUATION, TRANSFER, versions
from avmae_fast.train.score import score_heads
from avmae_fast.train.sgd import ReleasedSGD, adamw_groups, layerwise_groups
from avmae_fast.train.targets import Targets
from avmae_fast.train.task import Model, Task

_MAX_CLIPS = 512


def finetune(
    config: FinetuneConfig,
    *,
    resume: bool = False,
    restart: bool = False,
    profile: tuple[int, int] | None = None,
) -> Outcome:
    """Fine-tune a classifier as configured; leave it and its scores in `train.out`.

    Arguments as those of `pretrain`.

    Raises:
        ConfigError, ManifestError, TransferError, RunFolderError, CheckpointError: before anything
            is written.
        TooManyBadFiles, NonFiniteError, OutputError: while training; checkpoints stay as they are.
    """
    world = World.of_environment()
    task = _Finetuning(config, prepare(config.train, world))
    return run_task(task, world, resume=resume, restart=restart, profile=profile)


class _Finetuning(Task):
    def __init__(self, config: FinetuneConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self._run = config
        self._plain = PlainStage(config, device)
        self._classes: tuple[str, ...] = ()
        self._report = ""

    @property
    def training_input(self) -> FinetuneConfig:
        return self._run.training_input

    @property
    def clip_flops(self) -> int:
        return classifier_flops(self._run.model)

    def stage(self, manifest: Manifest) -> Stage:
        self._classes = manifest.classes
        targets = Targets(manifest, self._run.model.heads, self._run.finetune.loss)
        return FinetuneStage(self._run, targets, self.device)

    def build(self, resumed: bool) -> TrainedClassifier:
        """Initialised by the run's seed, then by what was pretrained."""
        check_kernels(self._run.model, self.device, self.autocast)
        model = build_classifier(self._run)
        if not resumed:
            self._report = self._transfer(model)
        return model.to(self.device).train()

    def _transfer(self, model: TrainedClassifier) -> str:
        recipe = self._run.finetune
        if recipe.init is None:
            return "finetune.init is not set: training starts from scratch\n"
        initial = load_initial_weights(recipe.init)
        try:
            report = transfer(
                initial.weights,
                initial.config,
                model,
                norms=recipe.norms,
                fresh=recipe.fresh,
                leave=recipe.leave,
                interpolate_positions=recipe.interpolate_positions,
            )
        except TransferError as error:
            text = f"finetune.init = {str(recipe.init)!r} does not fit the classifier: {error}"
            raise TransferError(text) from error
        return f"from {initial.source}\n{report}\n"

    def optimizer(self, model: Model) -> ReleasedAdamW | ReleasedSGD:
        train, recipe = self._run.train, self._run.finetune
        groups = layerwise_groups(model, self._run.model.encoder.layers, recipe.layer_decay)
        if recipe.optimizer == "sgd":
            return ReleasedSGD(groups, recipe.momentum)
        return ReleasedAdamW(
            adamw_groups(groups),
            betas=train.betas,
            eps=train.eps,
            weight_decay=train.weight_decay,
        )

    def opened(self) -> None:
        if self._report:
            print(self._report, end="")
            (self._run.train.out / TRANSFER).write_text(self._report)

    @torch.no_grad()
    def validate(self, model: Model, held_out: ClipLoader, metrics: Metrics, step: int) -> None:
        """The loss and the scores of the centred window of at most 512 held-out clips."""
        assert isinstance(model, TrainedClassifier)
        heads, loss = self._run.model.heads, self._run.finetune.loss
        targets = Targets(held_out.manifest, heads, loss, required=False)
        logits, labels, losses = [], [], []
        model.eval()
        for batch in held_out:
            inputs = self._plain(batch)
            with self.autocast():
                predicted = model.predict(**inputs)
            wanted = targets(batch.records).to(self.device)
            names = dict.fromkeys(predicted.by_modality, wanted)
            losses += [model.losses(predicted.by_modality, names).loss.double()] * len(batch)
            logits.append(predicted.logits.float())
            labels.append(wanted)
            if len(losses) >= _MAX_CLIPS:
                break
        model.train()
        known = torch.cat(labels).any(1).cpu()
        values = {"loss": float(torch.stack(losses).mean())}
        scored = (torch.cat(logits).cpu()[known].numpy(), torch.cat(labels).cpu()[known].numpy())
        if known.any():
            for head, scores in score_heads(*scored, heads, loss).items():
                values |= {f"{head}_{name}": value for name, value in scores.summary().items()}
        metrics.write_validation(step, values)

    def finish(self, weights: dict[str, Tensor], step: int) -> Path:
        out = self._run.train.out
        record = {"step": step, "versions": versions()}
        save_classifier(self._run, self._classes, weights, record)
        try:
            manifest = split_manifest(self._run, "val")
        except ManifestError:
            print(f"no clips are held out to evaluate on; {out} has the classifier")
            return out
        recipe = self._run.finetune
        views = Views(recipe.temporal_views, recipe.spatial_views)
        # As everybody else will read it: what is scored is what is left behind.
        tuned = load_classifier(out)
        tuned = replace(tuned, model=tuned.model.to(self.device))
        report = evaluate_classifier(tuned, manifest, views, self._run.data, self._run.train)
        print(report)
        return report.write(out / EVALUATION)
