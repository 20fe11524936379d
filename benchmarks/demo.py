"""Keep the numbers of a finished demo run with a record of the machine they came from.

`make demo`, then `python -m benchmarks.demo --run demo/run --json FILE`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import harness


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The numbers of `RUN/report/summary.json` that the README's table shows."""
    path = args.run / "report" / "summary.json"
    try:
        summary = json.loads(path.read_text())
    except OSError as error:
        raise harness.BenchmarkError(f"{path}: {error.strerror}; run `make demo` first") from error
    if summary["probe"] is None:
        raise harness.BenchmarkError(f"{path} holds no probe: {summary['no_probe']}")
    video, audio = (summary["reconstruction"][m] for m in ("video", "audio"))
    return {
        "command": "make demo",
        "steps": summary["steps"],
        "minutes": summary["time_s"] / 60,
        "clips_per_s": summary["clips_per_s"],
        "parameters": summary["parameters"],
        "held_out_clips": summary["clips"],
        "video_mse": video["mse"],
        "video_mean_mse": video["mean_mse"],
        "audio_mse": audio["mse"],
        "audio_mean_mse": audio["mean_mse"],
        "probe_trained": summary["probe"]["trained"],
        "probe_untrained": summary["probe"]["untrained"],
        "probe_chance": summary["probe"]["chance"],
    }


def main(argv: list[str] | None = None) -> int:
    options = harness.parser(__doc__ or "")
    options.add_argument("--run", type=Path, default=Path("demo/run"), help="folder of the run")
    return harness.run(options, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
