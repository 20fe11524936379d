"""What the commands that train share: their options, how they run and end, and how they fail."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

BAD_INPUT = 2
_NOT_FINITE = 70  # EX_SOFTWARE
_CANNOT_WRITE = 73  # EX_CANTCREAT


def add_training_options(parser: argparse.ArgumentParser, example: str) -> None:
    """The options of a command that trains.

    example: a field and a value to show what --set takes.
    """
    parser.add_argument("config", metavar="CONFIG", help="a TOML file, or the name of a preset")
    add_overrides(parser, f"set one field, as in --set {example}; may be repeated")
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits in every run on one machine, as --set train.deterministic=true",
    )
    parser.add_argument(
        "--profile", metavar="FIRST:LAST", type=_steps_range, help="trace these steps, as in 20:25"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in train.out"
    )
    again.add_argument(
        "--restart", action="store_true", help="delete the run in train.out and start anew"
    )


def add_overrides(parser: argparse.ArgumentParser, text: str) -> None:
    """`--set KEY=VALUE`, which may be repeated, as `overrides`."""
    parser.add_argument(
        "--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[], help=text
    )


def configured(args: argparse.Namespace, load: Callable[[str, Sequence[str]], Any]) -> Any:
    """The configuration as the options say; to be called before torch is imported."""
    # First of all: a typing error is told at once.
    config = load(args.config, args.overrides + ["train.deterministic=true"] * args.deterministic)
    # Read when torch loads its thread pool. Threads that spin while they wait make a CPU run ten
    # times slower as soon as another program wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return config


def run_training(args: argparse.Namespace, train: Callable[..., Any], config: Any) -> int:
    """Run `pretrain` or `finetune` as the options say; returns the program's exit code."""
    from avmae_fast.train.guard import NonFiniteError
    from avmae_fast.train.run_folder import OutputError

    try:
        outcome = train(config, resume=args.resume, restart=args.restart, profile=args.profile)
    except NonFiniteError as error:
        return fail(error, _NOT_FINITE)
    except OutputError as error:
        return fail(error, _CANNOT_WRITE)
    if outcome.exit_code is None:
        return 0
    kept = [word for word in args.argv if word not in ("--resume", "--restart")]
    again = shlex.join(["avmae", *kept, "--resume"])
    print(f"stopped after step {outcome.step}; go on with\n  {again}")
    return outcome.exit_code


def fail(error: object, code: int) -> int:
    """Print what went wrong as one paragraph; returns the exit code."""
    print(f"avmae: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _steps_range(text: str) -> tuple[int, int]:
    """`FIRST:LAST` as two step numbers, for argparse."""
    first, separator, last = text.partition(":")
    if not separator or not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not valid: it must be FIRST:LAST, two step numbers from 1 on, as in 20:25"
        )
    return int(first), int(last)
