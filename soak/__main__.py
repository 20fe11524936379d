"""The kill loop, the tests of several processes and the fuzzing, one after the other, counted.

`python -m soak --json FILE`, or `make soak`: at most 20 minutes on two cores that do nothing else.
Exit code 1 if any of it found a fault.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from benchmarks import harness
from soak.fuzz import fuzz_all
from soak.kill_loop import kill_loop, passed

_TESTS = Path(__file__).parents[1] / "tests"
# Several processes on gloo, in this file also those that are not marked slow; and torchrun.
_GLOO = ("train/test_distributed.py", "train/test_torchrun.py")


def gloo_matrix() -> dict[str, Any]:
    """Run the tests of several processes; how many there were and how they ended."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="avmae_fast-soak-") as folder:
        report = Path(folder) / "report.xml"
        files = [str(_TESTS / name) for name in _GLOO]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", *files]
        subprocess.run([*command, f"--junitxml={report}"], cwd=_TESTS.parent, check=False)
        (suite,) = ElementTree.parse(report).getroot()
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    return {**counts, "seconds": time.monotonic() - began_s}


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """All of it; `faults` is what is wrong."""
    kills = kill_loop(args.kills, args.seed)
    gloo = gloo_matrix()
    fuzz = fuzz_all(args.count, args.workers)
    faults = int(not passed(kills)) + gloo["failures"] + gloo["errors"]
    faults += sum(result["faults"] for result in fuzz.values())
    return {"kill_loop": kills, "gloo": gloo, "fuzz": fuzz, "faults": faults}


def main(argv: list[str] | None = None) -> int:
    options = harness.parser("Kill runs, train with several processes, feed damaged files.")
    options.add_argument("--kills", type=int, default=200, help="of the kill loop (200)")
    options.add_argument("--seed", type=int, default=0, help="of where to kill (0)")
    options.add_argument("--count", type=int, default=10_000, help="damaged inputs a kind (10000)")
    options.add_argument("--workers", type=int, default=2, help="processes that read them (2)")
    found: dict[str, Any] = {}

    def measure(args: argparse.Namespace) -> dict[str, Any]:
        found.update(soak(args))
        return found

    return harness.run(options, measure, argv) or int(bool(found["faults"]))


if __name__ == "__main__":
    sys.exit(main())
