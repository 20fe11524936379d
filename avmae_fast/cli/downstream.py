"""Commands for what pretraining is good for: fine-tune, evaluate, embed, retrieve."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from avmae_fast.cli.training import add_training_options, configured, run_training


def add_commands(commands: Any) -> None:
    """Add `finetune`, `evaluate`, `embed` and `retrieve` to the parser's commands."""
    _add_finetune(commands.add_parser("finetune", help="fine-tune a classifier"))
    _add_evaluate(commands.add_parser("evaluate", help="score a classifier on labelled clips"))
    _add_embed(commands.add_parser("embed", help="write the features of clips"))
    _add_retrieve(commands.add_parser("retrieve", help="search among embedded clips"))


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fine-tune a classifier as a TOML file or a preset says. What it starts from is "
        "finetune.init: a pretraining run, an encoder, a checkpoint or a weights file; what went "
        "where is printed, and kept in transfer.txt of the run."
    )
    add_training_options(parser, "finetune.init=runs/first")
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


def _add_embed(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the features of clips: A of their sound alone, V of their pictures alone, AV of "
        "both together. Rows of clips without what a feature is of are NaN, and A_valid, V_valid "
        "and AV_valid say so."
    )
    parser.add_argument("model", metavar="RUN", type=Path, help="a run, an encoder or a classifier")
    parser.add_argument(
        "inputs", metavar="INPUT", nargs="+", type=Path, help="one manifest, or media files"
    )
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="a .safetensors, .npz or .parquet file"
    )
    kinds = ("A", "V", "AV")
    parser.add_argument("--features", nargs="+", choices=kinds, help="which (all there can be)")
    parser.add_argument("--tokens", action="store_true", help="of every token, not their mean")
    parser.add_argument("--temporal", metavar="N", type=int, default=1, help="views in time (1)")
    parser.add_argument("--spatial", choices=(1, 3), type=int, default=1, help="crops (1)")
    _add_running(parser)
    parser.set_defaults(run=_embed)


def _add_retrieve(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Recall of each clip's pictures by its sound and the other way round; and, with --train, "
        "the accuracy of a vote of the nearest labelled clips."
    )
    parser.add_argument("features", metavar="FEATURES", type=Path, help="what avmae embed wrote")
    parser.add_argument("--k", nargs="+", type=int, default=[1, 5, 10], help="of recall (1 5 10)")
    parser.add_argument("--train", metavar="FEATURES", type=Path, help="labelled clips for a vote")
    parser.add_argument("--neighbours", metavar="N", type=int, default=5, help="that vote (5)")
    parser.set_defaults(run=_retrieve)


def add_model_and_manifest(parser: argparse.ArgumentParser, model: str) -> None:
    """The arguments of a command that runs a model over the clips of a manifest."""
    parser.add_argument("model", metavar="RUN", type=Path, help=model)
    parser.add_argument(
        "manifest", metavar="MANIFEST", type=Path, help="a .csv or .jsonl file, or packed clips"
    )
    _add_running(parser)


def _add_running(parser: argparse.ArgumentParser) -> None:
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

    config = configured(args, load_finetune_config)
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


def _embed(args: argparse.Namespace) -> int:
    from avmae_fast.config import TrainConfig
    from avmae_fast.train.embed import embed, load_embedder, require_writable, write_features
    from avmae_fast.train.evaluate_classifier import Views

    require_writable(args.out.absolute(), args.tokens)
    embedder = load_embedder(args.model)
    with _listed(args.inputs) as args.manifest:
        manifest = chosen_rows(args, None)
    train = TrainConfig(
        out=args.out, batch=args.batch, steps=1, device=args.device, precision=args.precision
    )
    made = embed(
        embedder,
        manifest,
        args.features or embedder.kinds,
        Views(args.temporal, args.spatial),
        train,
        per_token=args.tokens,
        workers=args.workers,
    )
    write_features(made, args.out.absolute())
    for kind, x in made.features.items():
        print(f"{kind}: {made.valid[kind].sum()} of {len(x)} clips, {list(x.shape[1:])} each")
    for path, reason in made.problems:
        print(f"cannot be read: {path} ({reason})", file=sys.stderr)
    return 0


@contextmanager
def _listed(inputs: list[Path]) -> Iterator[Path]:
    """The manifest that was given, or one of the media files that were."""
    if len(inputs) == 1 and (inputs[0].suffix in (".csv", ".jsonl") or inputs[0].is_dir()):
        yield inputs[0]
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clips.jsonl"
        rows = [json.dumps({"path": str(file.expanduser().absolute())}) for file in inputs]
        path.write_text("\n".join(rows))
        yield path


def _retrieve(args: argparse.Namespace) -> int:
    from avmae_fast.train.embed import read_features
    from avmae_fast.train.retrieve import knn_accuracy, recall_at

    features = read_features(args.features)
    if args.train is None or {"A", "V"} <= features.keys():
        found = recall_at(features, args.k)
        for name, value in found.recall.items():
            way, k = name.split()
            print(f"{way} recall@{k}: {value:.4f} (chance {found.chance[int(k)]:.4f})")
        print(f"over {found.clips} clips with both")
    if args.train is not None:
        train = read_features(args.train)
        for kind in [kind for kind in ("A", "V", "AV") if kind in features and kind in train]:
            value, clips = knn_accuracy(train, features, kind, args.neighbours)
            print(f"{kind}, {args.neighbours} neighbours: {value:.4f} of {clips} clips")
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
