"""The program: its commands, and how what goes wrong in one of them is told."""

import argparse
import importlib.metadata
import logging
import sys
from collections.abc import Sequence

from avmae_fast.cli import data, downstream, manifest, run
from avmae_fast.cli.bench import add_bench_data
from avmae_fast.cli.convert import add_convert
from avmae_fast.cli.doctor import add_doctor
from avmae_fast.cli.synth import add_synth
from avmae_fast.cli.training import BAD_INPUT, fail

_INTERRUPTED = 130

_EXIT_CODES = (
    "Exit codes: 0 done; 1 probe-files, verify or doctor found something wrong; 2 bad input, the "
    "message says what would be valid; 70 too many steps were not finite; 73 the disk is full or "
    "cannot be written; 75 stopped by Ctrl-C, SIGTERM or SIGUSR1 after writing a checkpoint; 130 "
    "interrupted, nothing was written."
)

# Errors that are somebody's input and not a fault of this program, by module: one that is not
# loaded cannot have raised its error.
_INPUT_ERRORS = {
    "avmae_fast.config": "ConfigError",
    "avmae_fast.data.bad_files": "TooManyBadFiles",
    "avmae_fast.data.clip": "ClipError",
    "avmae_fast.data.manifest": "ManifestError",
    "avmae_fast.data.pack_clips": "PackError",
    "avmae_fast.data.workers": "LoaderFailed",
    "avmae_fast.interop.entries": "ConvertError",
    "avmae_fast.interop.transfer": "TransferError",
    "avmae_fast.models.pretrained": "PretrainedError",
    "avmae_fast.train.checkpoint": "CheckpointError",
    "avmae_fast.train.lines": "LinesError",
    "avmae_fast.train.lock": "LockedError",
    "avmae_fast.train.memory_advice": "OutOfMemory",
    "avmae_fast.train.model_inputs": "NotFiniteOutput",
    "avmae_fast.train.run_folder": "RunFolderError",
    "builtins": "FileExistsError",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the program's exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    args.argv = list(argv)
    logging.basicConfig(format="avmae: %(message)s")
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("avmae: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if not isinstance(error, _input_errors()):
            raise
        return fail(error, getattr(error, "exit_code", BAD_INPUT))


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `run` of what it makes is the function of one."""
    parser = argparse.ArgumentParser(
        prog="avmae",
        description="Pretrain masked audiovisual autoencoders on media files, and fine-tune them.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"avmae {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    run.add_pretrain(commands.add_parser("pretrain", help="pretrain a model", epilog=_EXIT_CODES))
    add_synth(commands.add_parser("synth", help="make a synthetic set of audiovisual clips"))
    add_convert(commands.add_parser("convert", help="convert weights of other code bases"))
    data.add_probe_files(
        commands.add_parser("probe-files", help="say which media files can be read")
    )
    run.add_commands(commands)
    downstream.add_commands(commands)
    add_bench_data(commands.add_parser("bench-data", help="say how fast media files can be loaded"))
    data.add_commands(commands)
    manifest.add_commands(commands)
    add_doctor(commands)
    return parser


def _input_errors() -> tuple[type[BaseException], ...]:
    loaded = sys.modules
    return tuple(getattr(loaded[m], name) for m, name in _INPUT_ERRORS.items() if m in loaded)


def _version() -> str:
    try:
        return importlib.metadata.version("avmae_fast")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"
