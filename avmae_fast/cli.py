"""The command `avmae`. A command imports what it needs when it runs, so that --help is quick."""

import argparse
import importlib.metadata
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from avmae_fast import cli_data, cli_downstream, cli_manifest, cli_run
from avmae_fast.cli_bench import add_bench_data
from avmae_fast.cli_convert import add_convert
from avmae_fast.cli_doctor import add_doctor
from avmae_fast.cli_run import steps_range

_BAD_INPUT = 2
_NOT_FINITE = 70  # EX_SOFTWARE
_CANNOT_WRITE = 73  # EX_CANTCREAT
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

# Clips to go with the preset of the same name.
_SYNTH_PRESETS: dict[str, dict[str, int | float]] = {
    "demo": {"clips": 320, "classes": 8, "seconds": 4.0, "size": 96},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the program's exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
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
        return _fail(error, getattr(error, "exit_code", _BAD_INPUT))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="avmae",
        description="Pretrain masked audiovisual autoencoders on media files, and fine-tune them.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"avmae {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_pretrain(commands.add_parser("pretrain", help="pretrain a model", epilog=_EXIT_CODES))
    _add_synth(commands.add_parser("synth", help="make a synthetic set of audiovisual clips"))
    add_convert(commands.add_parser("convert", help="convert weights of other code bases"))
    _add_probe(commands.add_parser("probe-files", help="say which media files can be read"))
    cli_run.add_commands(commands)
    cli_downstream.add_commands(commands)
    add_bench_data(commands.add_parser("bench-data", help="say how fast media files can be loaded"))
    cli_data.add_commands(commands)
    cli_manifest.add_commands(commands)
    add_doctor(commands)
    return parser


def _add_pretrain(parser: argparse.ArgumentParser) -> None:
    parser.description = "Pretrain a model as a TOML file or a preset says."
    parser.add_argument("config", metavar="CONFIG", help="a TOML file, or the name of a preset")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="set one field, as in --set train.batch=16; may be repeated",
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
    parser.set_defaults(run=_pretrain)


def _add_synth(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write mp4 files in which what is seen causes what is heard, and their manifest. Equal "
        "options give equal files; a set that is there already is left as it is."
    )
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--preset", choices=_SYNTH_PRESETS, help="the clips that a preset expects")
    parser.add_argument("--clips", type=int, help="how many clips; needed without --preset")
    parser.add_argument("--classes", type=int, help="how many classes (8)")
    parser.add_argument("--seed", type=int, help="at least 0 (0)")
    parser.add_argument("--seconds", type=float, help="length of a clip (4)")
    parser.add_argument("--size", type=int, help="height and width in pixels (128)")
    parser.add_argument("--fps", type=int, help="frames a second (25)")
    parser.add_argument("--distractors", type=int, help="misleading sounds in each clip (0)")
    parser.add_argument("--workers", type=int, help="processes (one for each processor)")
    parser.set_defaults(run=_synth)


def _add_probe(parser: argparse.ArgumentParser) -> None:
    parser.description = "Try every media file below a folder, one line each."
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument(
        "--reader", default="auto", help="auto (the default), pyav, torchcodec or decord"
    )
    parser.set_defaults(run=_probe_files)


def _pretrain(args: argparse.Namespace) -> int:
    from avmae_fast.config_file import load_config

    # Before torch is imported: a typing error is told at once.
    overrides = args.overrides + ["train.deterministic=true"] * args.deterministic
    config = load_config(args.config, overrides)
    # Read when torch loads its thread pool. Threads that spin while they wait make a CPU run ten
    # times slower as soon as another program wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from avmae_fast.train.pretrain import pretrain

    return run_training(args, pretrain, config)


def run_training(args: argparse.Namespace, train: Callable[..., Any], config: Any) -> int:
    """Run `pretrain` or `finetune` as the options say; returns the program's exit code."""
    from avmae_fast.train.guard import NonFiniteError
    from avmae_fast.train.run_folder import OutputError

    try:
        outcome = train(config, resume=args.resume, restart=args.restart, profile=args.profile)
    except NonFiniteError as error:
        return _fail(error, _NOT_FINITE)
    except OutputError as error:
        return _fail(error, _CANNOT_WRITE)
    if outcome.exit_code is None:
        return 0
    kept = [word for word in args.argv if word not in ("--resume", "--restart")]
    print(f"stopped after step {outcome.step}; go on with\n  {_command(*kept, '--resume')}")
    return outcome.exit_code


def _synth(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from avmae_fast.data.synth import synthesise

    options = dict(_SYNTH_PRESETS[args.preset]) if args.preset else {}
    names = ("clips", "classes", "seed", "seconds", "size", "fps", "distractors", "workers")
    options |= {name: value for name in names if (value := getattr(args, name)) is not None}
    if "clips" not in options:
        return _fail("clips is not set: give --clips N, or --preset", _BAD_INPUT)
    with tqdm(desc="clips", unit="clip", disable=None) as bar:

        def show(done: int, clips: int) -> None:
            bar.total = clips
            bar.update(done - bar.n)

        try:
            manifest = synthesise(args.out, **options, progress=show)  # type: ignore[arg-type]
        except ValueError as error:
            bar.leave = False
            return _fail(error, _BAD_INPUT)
    print(f"{manifest}: {options['clips']} clips")
    return 0


def _probe_files(args: argparse.Namespace) -> int:
    from avmae_fast.data.probe import print_report

    return 1 if print_report(args.folder, args.reader) else 0


def _fail(error: object, code: int) -> int:
    """Print what went wrong as one paragraph."""
    print(f"avmae: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _input_errors() -> tuple[type[BaseException], ...]:
    loaded = sys.modules
    return tuple(getattr(loaded[m], name) for m, name in _INPUT_ERRORS.items() if m in loaded)


def _command(*words: str) -> str:
    return shlex.join(["avmae", *words])


def _version() -> str:
    try:
        return importlib.metadata.version("avmae_fast")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


if __name__ == "__main__":
    sys.exit(main())
