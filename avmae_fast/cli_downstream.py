"""Commands for what pretraining is good for: fine-tune, evaluate, embed, retrieve."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from avmae_fast.cli_run import steps_range


def add_commands(commands: Any) -> None:
    """Add `finetune` and `evaluate` to the parser's commands."""
    _add_finetune(commands.add_parser("finetune", help="fine-tune a classifier"))
    _add_evaluate(commands.add_parser("evaluate", help="score a classifier on labelled clips"))


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fine-tune a classifier as a TOML file or a preset says. What it starts from is "
        "finetune.init: a pretraining run, an encoder, a checkpoint or a weights file; what went "
        "where is printed, and kept in transfer.txt of the run."
    )
    parser.add_argument("config", metavar="CONFIG", help="a TOML file, or the name of a preset")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="set one field, as in --set finetune.init=runs/first; may be repeated",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits in every run on one machine, as --set train.deterministic=true",
    )
    parser.add_argument(
        "--profile", metavar="FIRST:LAST", type=steps_range, help="trace these steps, as in 20:25"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in train.out"
    )
    again.add_argument(
        "--restart", action="store_true", help="delete the run in train.out and start anew"
    )
    parser.set_defaults(run=_finetune)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Score a fine-tuned classifier on the clips of a manifest. Logits are averaged over views; "
        "a clip without picture or sound is judged by what it has; clips that cannot be read do "
        "not count, and are told."
    )
    add_model_and_manifest(parser, "train.out of a fine-tuning run, or its classifier/")
    parser.add_argument("--temporal", metavar="N", type=int, help="views in time (as configured)")
    parser.add_argument("--spatial", choices=(1, 3), type=int, help="crops (as configured)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="write summary and CSV here")
    parser.set_defaults(run=_evaluate)


def add_model_and_manifest(parser: argparse.ArgumentParser, model: str) -> None:
    """The arguments of every command that runs a model over clips."""
    parser.add_argument("model", metavar="RUN", type=Path, help=model)
    parser.add_argument("manifest", metavar="MANIFEST", type=Path, help="a .csv or .jsonl file")
    parser.add_argument(
        "--split",
        choices=("train", "val", "test", "all"),
        default="all",
        help="rows to use (all)",
    )
    parser.add_argument("--batch", metavar="N", type=int, default=8, help="clips at a time (8)")
    parser.add_argument("--workers", metavar="N", type=int, default=2, help="processes (2)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")


def _finetune(args: argparse.Namespace) -> int:
    from avmae_fast.config_file import load_finetune_config

    # Before torch is imported: a typing error is told at once.
    overrides = args.overrides + ["train.deterministic=true"] * args.deterministic
    config = load_finetune_config(args.config, overrides)
    # As for `avmae pretrain`: threads that spin while they wait slow a busy CPU down tenfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from avmae_fast.cli import run_training
    from avmae_fast.train.finetune import finetune

    return run_training(args, finetune, config)


def _evaluate(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from avmae_fast.train.classifier_folder import load_classifier
    from avmae_fast.train.evaluate_classifier import Views, evaluate_classifier
    from avmae_fast.train.recipe import choose_device

    tuned = load_classifier(args.model)
    config = tuned.config
    train = replace(config.train, batch=args.batch, accumulate=1, device=args.device)
    train = replace(train, precision=args.precision)
    data = replace(config.data, workers=args.workers)
    recipe = config.finetune
    temporal = recipe.temporal_views if args.temporal is None else args.temporal
    spatial = recipe.spatial_views if args.spatial is None else args.spatial
    if temporal < 1:
        print(f"avmae: error: --temporal {temporal} must be at least 1", file=sys.stderr)
        return 2
    manifest = chosen_rows(args, tuned.classes)
    tuned = replace(tuned, model=tuned.model.to(choose_device(train)))
    report = evaluate_classifier(tuned, manifest, Views(temporal, spatial), data, train)
    print(report)
    if args.out is not None:
        print(report.write(args.out))
    return 0


def chosen_rows(args: argparse.Namespace, classes: tuple[str, ...] | None) -> Any:
    """The rows of the manifest that the options ask for."""
    from avmae_fast.data.manifest import ManifestError, load_manifest

    manifest = load_manifest(args.manifest.expanduser().absolute(), classes)
    if args.split == "all":
        return manifest
    chosen = manifest.select(args.split)
    if not len(chosen):
        raise ManifestError(f"{manifest.source} has no clips of the split {args.split}")
    return chosen
