"""Write the tables of README.md and benchmarks/README.md from saved results: no figure is typed.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`. What no saved result holds says "not
measured". `python -m benchmarks.tables` rewrites both files, `--check` only says whether it would.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablation import rows as ablation_rows
from benchmarks.downstream import rows as downstream_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NOT_MEASURED = "not measured"

Result = dict[str, Any]


def newest(name: str) -> Result | None:
    """The newest saved `results/*/NAME.json`, or None."""
    found = [json.loads(path.read_text()) for path in RESULTS.glob(f"*/{name}.json")]
    return max(found, key=lambda result: result["date"], default=None)


def results_of(benchmark: str, root: Path = RESULTS) -> list[Result]:
    """Every saved result of a benchmark on a GPU, oldest first."""
    found = [json.loads(path.read_text()) for path in root.glob(f"*/{benchmark}*.json")]
    on_gpu = [r for r in found if r.get("benchmark") == benchmark and r.get("gpu", "cpu") != "cpu"]
    return sorted(on_gpu, key=lambda result: result["date"])


def demo_table(result: Result | None) -> str:
    rows = [("", "after the demo", "what it must beat")]
    if result is None:
        rows.append((NOT_MEASURED, NOT_MEASURED, NOT_MEASURED))
        return table(rows)
    for m in ("video", "audio"):
        mean = f"{result[f'{m}_mean_mse']:.3f}, the training set's mean at each position"
        rows.append((f"squared error, masked {m} patches", f"{result[f'{m}_mse']:.3f}", mean))
    probe = f"{result['probe_untrained']:.1%}, untrained (chance {result['probe_chance']:.1%})"
    rows.append(("linear probe, 8 classes", f"{result['probe_trained']:.1%}", probe))
    text = (
        f"{result['held_out_clips']} held-out clips; {result['steps']:,} steps of a model of "
        f"{result['parameters'] / 1e6:.1f} M parameters in {result['minutes']:.1f} minutes "
    )
    return f"{table(rows)}\n\n{text}{_where(result)}."


def masking_table(result: Result | None) -> str:
    rows = [("1568 + 496 tokens", "µs a clip, one core")]
    for label, key in (
        ("`avmae_kernels.masking`", "us_per_clip"),
        ("NumPy `argsort`", "numpy_us_median"),
        ("torch `rand().argsort()`", "torch_us_median"),
    ):
        rows.append((label, NOT_MEASURED if result is None else f"{result[key]:.1f}"))
    text = table(rows)
    return text if result is None else f"{text}\n\nMeasured {_where(result)}."


def data_table(result: Result | None) -> str:
    rows = [("16 pictures of 224 x 224, 10 s of sound", "clips/s, one core", "ratio", "kB a clip")]
    for label, key, stored in (
        ("mp4, PyAV", "raw_pyav", "raw"),
        ("mp4, torchcodec", "raw_torchcodec", "raw"),
        ("mp4, decord", "raw_decord", "raw"),
        ("mp4 in a tar, webdataset and PyAV", "webdataset", "raw"),
        ("`avmae pack`", "packed_h264", "h264"),
        ("`avmae pack`, `data.pixels=yuv420`", "packed_h264_planes", "h264"),
        ("`avmae pack --codec mjpeg`", "packed_mjpeg", "mjpeg"),
        ("`avmae pack --codec mjpeg`, `data.pixels=yuv420`", "packed_mjpeg_planes", "mjpeg"),
    ):
        if result is None or f"ms_{key}" not in result:
            rows.append((label, NOT_MEASURED, NOT_MEASURED, NOT_MEASURED))
            continue
        ratio = result[f"ratio_{key.removeprefix('packed_')}"]
        size = f"{result[f'kilobytes_{stored}']:.0f}"
        rows.append((label, f"{1e3 / result[f'ms_{key}']:.0f}", f"{ratio:.1f}", size))
    text = table(rows)
    if result is None:
        return text
    busy = f"; load of the machine {result['load']:.1f}" if result["load"] > 1.5 else ""
    return f"{text}\n\nProcessor time {_where(result)}{busy}."


def downstream_table(result: Result | None) -> str:
    if result is None:
        return table([("accuracy, %",), (NOT_MEASURED,)])
    cells = [(row[0] or "accuracy, %", *row[1:]) for row in downstream_rows(result)]
    text = (
        f"{result['classes']} classes, chance {result['chance']:.1%}, {result['test_clips']} "
        f"held-out clips, {result['seeds']} seeds, mean ± standard deviation; pretrained once, "
        f"{result['pretraining_steps']:,} steps on {result['pretraining_clips']} clips without "
        f"labels; all of it took {result['minutes']:.0f} minutes "
    )
    return f"{table(cells)}\n\n{text}{_where(result)}{_load(result)}."


def ablation_table(result: Result | None) -> str:
    if result is None:
        return table([("fusion",), (NOT_MEASURED,)])
    text = (
        f"Accuracy in %, audio and video, {result['labels']} labels a class, {result['seeds']} "
        f"seeds; {result['pretraining_steps']:,} steps of pretraining each; "
    )
    return f"{table(list(ablation_rows(result)))}\n\n{text}{_where(result)}{_load(result)}."


def _load(result: Result) -> str:
    """That others used the machine, where a result says so."""
    load = result.get("load")
    return "" if load is None else f"; load of the machine {load:.1f}"


TABLES: dict[str, Callable[[Result | None], str]] = {
    "demo": demo_table,
    "masking": masking_table,
    "downstream": downstream_table,
    "ablation": ablation_table,
    "data": data_table,
}


def _where(result: Result) -> str:
    machine = result["machine"]
    cores = f"{machine['cores']} core{'s' * (machine['cores'] > 1)}"
    return f"on {cores} of an {machine['processor']} ({result['date'][:10]})"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def filled(text: str) -> str:
    """README.md's `text` with every table made from the newest results."""
    return with_blocks(text, {name: make(newest(name)) for name, make in TABLES.items()})


def with_blocks(text: str, blocks: Mapping[str, str]) -> str:
    """`text` with what stands between the markers of each name replaced."""
    for name, new in blocks.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not block.search(text):
            raise ValueError(f"README.md has no block <!-- {name} --> ... <!-- /{name} -->")
        text = block.sub(lambda match, t=new: f"{match[1]}{t}\n{match[2]}", text)  # type: ignore[misc]
    return text


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--check", action="store_true", help="exit with 1 if one is behind")
    args = options.parse_args(argv)
    from benchmarks import page

    behind = False
    for path, fill in ((ROOT / "README.md", filled), (page.PATH, page.filled)):
        text = path.read_text()
        new = fill(text)
        behind |= new != text
        if not args.check:
            path.write_text(new)
    return int(args.check and behind)


if __name__ == "__main__":
    sys.exit(main())
