"""The command `avmae bench-data`: how fast training clips come out of the user's own files."""

import argparse
import os

from avmae_fast.cli.training import add_overrides

_DESCRIPTION = (
    "Load training clips from the files of a manifest with every combination of reader, workers "
    "and windows a record, and say how fast they come, where a worker's time goes (ms a clip) and "
    "how many cores a rate needs. Clips are cut as the configuration says."
)


def add_bench_data(parser: argparse.ArgumentParser) -> None:
    """Give the command its options."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    parser.description = _DESCRIPTION
    parser.add_argument("manifest", metavar="MANIFEST", help="a CSV or JSONL file of clips")
    parser.add_argument(
        "--config", default="audioset-B", help="a preset or a TOML file (audioset-B)"
    )
    add_overrides(parser, "set one field of it, as in --set data.fps=8; may be repeated")
    parser.add_argument("--readers", default="auto", help="as in pyav,torchcodec (auto)")
    parser.add_argument("--workers", default=f"1,{cores}", help=f"as in 1,2,4 (1,{cores})")
    parser.add_argument("--repeats", default="1,4", help="windows a record, as in 1,2,4 (1,4)")
    parser.add_argument("--clips", type=int, default=192, help="clips loaded for each row (192)")
    parser.add_argument(
        "--clips-per-s",
        type=float,
        metavar="N",
        help="what a training step eats: say how many cores",
    )
    parser.set_defaults(run=_bench_data)


def _bench_data(args: argparse.Namespace) -> int:
    from avmae_fast.config import ConfigError
    from avmae_fast.config_file import load_config

    workers, repeats = _numbers("workers", args.workers), _numbers("repeats", args.repeats)
    if args.clips < 1:
        raise ConfigError(f"--clips {args.clips} is not valid: it must be at least 1")
    if args.clips_per_s is not None and not args.clips_per_s > 0:
        raise ConfigError(f"--clips-per-s {args.clips_per_s} is not valid: it must be positive")
    config = load_config(args.config, [*args.overrides, f"data.manifest={args.manifest}"])
    from avmae_fast.data import bench

    readers = args.readers.split(",")
    rows: list[bench.Measurement] = []
    for text in bench.table([]):
        print(text, flush=True)
    for row in bench.measure(
        config, readers=readers, workers=workers, repeats=repeats, clips=args.clips
    ):
        rows.append(row)
        print(bench.line(row), flush=True)
    if bad := sum(row.bad for row in rows):
        print(
            f"{bad} of {sum(row.clips for row in rows)} clips could not be read: avmae probe-files"
        )
    if args.clips_per_s is not None:
        print("\n".join(bench.advice(rows, args.clips_per_s)))
    return 0


def _numbers(name: str, text: str) -> list[int]:
    from avmae_fast.config import ConfigError

    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--{name} {text} is not valid: it must be whole numbers, as in 1,2,4")
    return [int(part) for part in parts]
