"""The command `avmae doctor`."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from avmae_fast.cli.training import BAD_INPUT


def add_doctor(commands: Any) -> None:
    """Add the command to the parser's `commands`."""
    summary = "say what this machine can do, and try it"
    parser = commands.add_parser("doctor", help=summary)
    parser.description = (
        "Look at GPU, driver, compiler, back ends and readers, hold every operation against "
        "float64 and train a small model for some seconds. The report is plain text, for bug "
        "threads too: it names no user, host or home directory. Exit codes: 0 this machine can "
        "train, 1 it cannot, the last line says why."
    )
    parser.add_argument("--json", metavar="FILE", help="write the report to FILE as JSON as well")
    parser.add_argument("--device", help="what to try: cpu, cuda or cuda:N (the first GPU, or cpu)")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    # Before the twenty seconds, not after them.
    if args.json and not Path(args.json).absolute().parent.is_dir():
        return _refuse(f"--json {args.json}: its folder does not exist")
    # As training sets it, before torch loads its thread pool.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from avmae_fast.doctor import examine

    try:
        device = torch.device(args.device) if args.device else None
        if device is not None:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        return _refuse(f"--device {args.device} cannot be had: {' '.join(str(error).split())}")
    diagnosis = examine(device)
    print(diagnosis)
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(diagnosis.to_dict(), indent=1) + "\n")
        except OSError as error:
            return _refuse(f"--json {args.json} cannot be written: {error.strerror}")
    return 0 if diagnosis.usable else 1


def _refuse(message: str) -> int:
    print(f"avmae: error: {message}", file=sys.stderr)
    return BAD_INPUT
