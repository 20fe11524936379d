"""The command `avmae synth`."""

import argparse

from avmae_fast.cli.training import BAD_INPUT, fail

# Clips to go with the preset of the same name.
_SYNTH_PRESETS: dict[str, dict[str, int | float]] = {
    "demo": {"clips": 320, "classes": 8, "seconds": 4.0, "size": 96},
}


def add_synth(parser: argparse.ArgumentParser) -> None:
    """Give the command its options."""
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


def _synth(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from avmae_fast.data.synth import synthesise

    options = dict(_SYNTH_PRESETS[args.preset]) if args.preset else {}
    names = ("clips", "classes", "seed", "seconds", "size", "fps", "distractors", "workers")
    options |= {name: value for name in names if (value := getattr(args, name)) is not None}
    if "clips" not in options:
        return fail("clips is not set: give --clips N, or --preset", BAD_INPUT)
    with tqdm(desc="clips", unit="clip", disable=None) as bar:

        def show(done: int, clips: int) -> None:
            bar.total = clips
            bar.update(done - bar.n)

        try:
            manifest = synthesise(args.out, **options, progress=show)  # type: ignore[arg-type]
        except ValueError as error:
            bar.leave = False
            return fail(error, BAD_INPUT)
    print(f"{manifest}: {options['clips']} clips")
    return 0
