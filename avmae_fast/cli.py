"""The command `avmae`. A command imports what it needs when it runs, so that --help is quick."""

import argparse
import importlib.metadata
import logging
import sys
from collections.abc import Sequence

from avmae_fast import cli_data, cli_downstream, cli_manifest, cli_run
from avmae_fast.cli_bench import add_bench_data
from avmae_fast.cli_convert import add_convert
from avmae_fast.cli_doctor import add_doctor
from avmae_fast.cli_training import add_training_options, configured, fail, run_training

_BAD_INPUT = 2
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
        return fail(error, getattr(error, "exit_code", _BAD_INPUT))


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
    add_training_options(parser, "train.batch=16")
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

    config = configured(args, load_config)
    from avmae_fast.train.pretrain import pretrain

    return run_training(args, pretrain, config)


def _synth(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from avmae_fast.data.synth import synthesise

    options = dict(_SYNTH_PRESETS[args.preset]) if args.preset else {}
    names = ("clips", "classes", "seed", "seconds", "size", "fps", "distractors", "workers")
    options |= {name: value for name in names if (value := getattr(args, name)) is not None}
    if "clips" not in options:
        return fail("clips is not set: give --clips N, or --preset", _BAD_INPUT)
    with tqdm(desc="clips", unit="clip", disable=None) as bar:

        def show(done: int, clips: int) -> None:
            bar.total = clips
            bar.update(done - bar.n)

        try:
            manifest = synthesise(args.out, **options, progress=show)  # type: ignore[arg-type]
        except ValueError as error:
            bar.leave = False
            return fail(error, _BAD_INPUT)
    print(f"{manifest}: {options['clips']} clips")
    return 0


def _probe_files(args: argparse.Namespace) -> int:
    from avmae_fast.data.probe import print_report

    return 1 if print_report(args.folder, args.reader) else 0


def _input_errors() -> tuple[type[BaseException], ...]:
    loaded = sys.modules
    return tuple(getattr(loaded[m], name) for m, name in _INPUT_ERRORS.items() if m in loaded)


def _version() -> str:
    try:
        return importlib.metadata.version("avmae_fast")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


if __name__ == "__main__":
    sys.exit(main())
