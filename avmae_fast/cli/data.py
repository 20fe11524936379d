"""The commands about data: probe-files, pack, verify, stats."""

import argparse
import sys
from typing import Any


def add_commands(commands: Any) -> None:
    """Add `pack`, `verify` and `stats` to those of `avmae`."""
    _add_pack(commands.add_parser("pack", help="re-encode clips once, for quick training"))
    _add_verify(commands.add_parser("verify", help="check packed clips against their index"))
    _add_stats(commands.add_parser("stats", help="log-mel mean and deviation, durations, labels"))


def add_probe_files(parser: argparse.ArgumentParser) -> None:
    """Give the command its options."""
    parser.description = "Try every media file below a folder, one line each."
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument(
        "--reader", default="auto", help="auto (the default), pyav, torchcodec or decord"
    )
    parser.set_defaults(run=_probe_files)


def _add_pack(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Decode the clips of a manifest once and write them as training shards: tar files that "
        "webdataset reads too, and an index. OUT then stands for the manifest, in data.manifest. "
        "Equal options and files give equal bytes, for any -j; a job that was stopped goes on "
        "with --resume. What cannot be read is listed in OUT/failed.jsonl."
    )
    parser.add_argument("manifest", metavar="MANIFEST", help="a .csv or .jsonl manifest")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--codec", help="h264 (the default), or mjpeg: larger, quicker to decode")
    parser.add_argument("--fps", type=float, help="pictures a second (8)")
    parser.add_argument("--short-side", type=int, help="of the pictures, in pixels (256)")
    parser.add_argument("--crf", type=int, help="of h264: 0..51, less is finer (26)")
    parser.add_argument("--quality", type=int, help="of mjpeg: 1..100, more is finer (75)")
    parser.add_argument("--clip-seconds", type=float, help="about how long a record is (10)")
    parser.add_argument("-j", "--jobs", type=int, help="processes (one for each processor)")
    parser.add_argument("--resume", action="store_true", help="go on with what is in OUT")
    parser.set_defaults(run=_pack)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare every byte of packed clips with the index and decode one record in 50. Exit code "
        "1 if anything is wrong."
    )
    parser.add_argument("out", metavar="OUT", help="a folder written by avmae pack")
    parser.set_defaults(run=_verify)


def _add_stats(parser: argparse.ArgumentParser) -> None:
    parser.description = "Read all sound of a set and print what its clips are like."
    parser.add_argument("out", metavar="OUT", help="a folder written by avmae pack, or a manifest")
    parser.set_defaults(run=_stats)


def _probe_files(args: argparse.Namespace) -> int:
    from avmae_fast.data.probe import print_report

    return 1 if print_report(args.folder, args.reader) else 0


def _pack(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from avmae_fast.data.pack import Estimate, pack
    from avmae_fast.data.pack_clips import PackOptions
    from avmae_fast.data.pack_jobs import Progress

    names = ("codec", "fps", "short_side", "crf", "quality", "clip_seconds")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    with tqdm(desc="packing", unit="clip", disable=None) as bar:

        def announce(estimate: Estimate) -> None:
            minutes = f"{estimate.seconds / 60:.0f} min" if estimate.seconds > 90 else "a minute"
            size = estimate.bytes / 2**30
            print(f"{estimate.clips} clips: about {size:.2f} GiB, {minutes}", flush=True)
            bar.total = estimate.clips

        def progress(done: Progress) -> None:
            bar.set_postfix_str(f"{done.bytes / 2**30:.2f} GiB, {done.failed} failed", False)
            bar.update(done.clips - bar.n)

        options, how = PackOptions(**given), {"jobs": args.jobs, "resume": args.resume}
        try:
            index = pack(
                args.manifest, args.out, options, **how, announce=announce, progress=progress
            )
        except KeyboardInterrupt:
            print("finished shards are kept; --resume goes on after them", file=sys.stderr)
            raise
    header = index.header
    size = sum(shard["bytes"] for shard in header["shards"])
    print(
        f"{args.out}: {len(index.rows)} records of {header['clips']} clips in "
        f"{len(header['shards'])} shards, {size / 2**30:.2f} GiB"
    )
    if header["failed"]:
        print(f"{header['failed']} could not be packed, see {args.out}/failed.jsonl")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from avmae_fast.data.pack_verify import verify

    with tqdm(desc="verifying", unit="record", disable=None) as bar:
        verdict = verify(args.out, bar.update)
    for problem in verdict.problems:
        print(f"BAD   {problem}")
    print(
        f"{args.out}: {verdict.records} records, {verdict.bytes / 2**30:.2f} GiB, "
        f"{verdict.decoded} decoded, {len(verdict.problems)} problems"
    )
    return 1 if verdict.problems else 0


def _stats(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from avmae_fast.data.stats import clip_stats

    with tqdm(desc="reading", unit="record", disable=None) as bar:

        def progress(done: int, records: int) -> None:
            bar.total = records
            bar.update(done - bar.n)

        stats = clip_stats(args.out, progress)
    print("\n".join(stats.lines()))
    return 0
