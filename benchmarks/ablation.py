"""The paper's ablation in miniature: how both modalities meet, and what is predicted.

Each fusion with each objective is pretrained on the clips of `benchmarks.downstream`, and tuned for
audio and video from a few labels, over the same seeds; all else is the same.

`python -m benchmarks.ablation --folder downstream --json FILE`
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from avmae_fast.train.pretrain import pretrain
from benchmarks import harness
from benchmarks.downstream import (
    accuracy,
    labelled,
    make_clips,
    mean_and_sd,
    pretraining,
    test_views,
    tuning,
)

FUSIONS = ("early", "mid", "shared", "separate")
OBJECTIVES = ("reconstruction", "inpainting")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Accuracies by fusion and objective, and what they took."""
    folder: Path = args.folder.absolute()
    began_s = time.monotonic()
    everything = make_clips(folder)
    test = everything.select("val")
    clips = test_views(pretraining(folder, "ablation", args.steps), test)
    found: dict[str, list[float]] = {}
    for fusion in args.fusions:
        for objective in args.objectives:
            more = [f"model.fusion={fusion}", f"model.objective={objective}"]
            config = pretraining(folder, "ablation", args.steps, *more)
            pretrain(config, restart=True)
            for seed in range(args.seeds):
                path = folder / f"train-{args.labels}-{seed}.csv"
                manifest = labelled(everything, path, args.labels, seed)
                init = config.train.out
                run = tuning(config, manifest, folder / "tuned", "AV", init, seed, args.tune_steps)
                found.setdefault(f"{fusion} {objective}", []).append(accuracy(run, test, clips))
            print(f"{fusion}, {objective}: {mean_and_sd(found[f'{fusion} {objective}'])}")
    shutil.rmtree(folder / "ablation", ignore_errors=True)
    result = {
        "command": "make ablation",
        "accuracy": found,
        "labels": args.labels,
        "seeds": args.seeds,
        "test_clips": len(test),
        "pretraining_steps": args.steps,
        "tuning_steps": args.tune_steps,
        "minutes": (time.monotonic() - began_s) / 60,
        "load": os.getloadavg()[0],
    }
    print("\n".join("  ".join(f"{cell:18s}" for cell in row) for row in rows(result)))
    return result


def rows(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The table's rows, the header first: mean and standard deviation over seeds."""
    yield ("fusion", *OBJECTIVES)
    for fusion in FUSIONS:
        cells = [result["accuracy"].get(f"{fusion} {objective}") for objective in OBJECTIVES]
        if any(cells):
            yield (fusion, *(mean_and_sd(cell) if cell else "not measured" for cell in cells))


def main(argv: Iterable[str] | None = None) -> int:
    options = harness.parser(__doc__ or "")
    options.add_argument("--folder", type=Path, default=Path("downstream"), help="of it all")
    options.add_argument("--steps", type=int, default=1000, help="of each pretraining (1000)")
    options.add_argument("--tune-steps", type=int, default=120, help="of each fine-tuning (120)")
    options.add_argument("--labels", type=int, default=4, help="labelled clips of a class (4)")
    options.add_argument("--fusions", nargs="+", choices=FUSIONS, default=list(FUSIONS))
    options.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    options.add_argument("--seeds", type=int, default=3)
    return harness.run(options, measure, None if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
