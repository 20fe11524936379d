"""Pretraining, the report of a run once more, and the batch that stopped one."""

import argparse
from pathlib import Path
from typing import Any

from avmae_fast.cli.training import add_training_options, configured, run_training


def add_pretrain(parser: argparse.ArgumentParser) -> None:
    """Give the command its options."""
    parser.description = "Pretrain a model as a TOML file or a preset says."
    add_training_options(parser, "train.batch=16")
    parser.set_defaults(run=_pretrain)


def add_commands(commands: Any) -> None:
    """Add `report` and `replay-batch` to the parser's commands."""
    report = commands.add_parser("report", help="write the report of a run anew")
    report.description = "Measure the newest checkpoint of a run and write its report anew."
    report.add_argument("run_folder", metavar="RUN", type=Path, help="train.out of the run")
    report.set_defaults(run=_report)
    replay = commands.add_parser("replay-batch", help="look at the batch that stopped a run")
    replay.description = (
        "Run the samples of the step that stopped a run, of pretraining or of fine-tuning, one by "
        "one, and say which of them and which layer is not finite. Fine-tuning, which blends "
        "samples, is also tried with all of a micro-batch. Exit code 1 if anything is not finite."
    )
    replay.add_argument("run_folder", metavar="RUN", type=Path, help="train.out of the run")
    replay.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    replay.set_defaults(run=_replay)


def _pretrain(args: argparse.Namespace) -> int:
    from avmae_fast.config_file import load_config

    config = configured(args, load_config)
    from avmae_fast.train.pretrain import pretrain

    return run_training(args, pretrain, config)


def _report(args: argparse.Namespace) -> int:
    from avmae_fast.train.pretrain import report

    report(args.run_folder)
    return 0


def _replay(args: argparse.Namespace) -> int:
    from avmae_fast.train.replay import replay

    broken = 0
    for one in replay(args.run_folder, args.device):
        broken += not one.finite
        print(one)
    print(f"not finite: {broken}" if broken else "all samples are finite")
    return 1 if broken else 0
