"""Draw what was measured: bars of the step, the roofline, one step in parts, the ablation ladder.

`python -m benchmarks.plots` draws every saved GPU result into benchmarks/plots. A plot of which
nothing was measured is not drawn.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from benchmarks.device import slug  # noqa: E402
from benchmarks.page import PLOTS  # noqa: E402
from benchmarks.tables import RESULTS, Result, results_of  # noqa: E402

_COLOURS = {"A": "#9aa5b1", "B": "#6f8fb0", "B+": "#3f6fa8", "C": "#d1495b"}
_INK = "#333333"


def bars(result: Result) -> Iterator[tuple[str, Figure]]:
    """Clips a second of every row, a panel for each model, data set and batch."""
    groups: dict[tuple[str, str, int], list[Result]] = {}
    for row in result["rows"]:
        groups.setdefault((row["model"], row["dataset"], row["batch"]), []).append(row)
    for (model, dataset, batch), rows in groups.items():
        if len(rows) < 2:
            continue
        rows.sort(key=lambda row: row["row"])
        figure, axes = _axes(f"ViT-{model}, {dataset}, batch {batch} on {result['gpu']}")
        rates = [row["clips_per_s"] for row in rows]
        colours = [_COLOURS.get(row["row"], _INK) for row in rows]
        drawn = axes.bar([row["row"] for row in rows], rates, color=colours, width=0.6)
        axes.bar_label(drawn, fmt="%.0f", padding=2)
        axes.set_ylabel("clips a second")
        yield f"step-{model}-{dataset}-{batch}", figure


def waterfall(result: Result) -> Iterator[tuple[str, Figure]]:
    """Where one step's device time goes, from the profile of each row."""
    for name, found in result.get("profile", {}).items():
        groups = sorted(found["groups"].items(), key=lambda item: -item[1])
        if not groups:
            continue
        figure, axes = _axes(f"one step: {name} on {result['gpu']}")
        left = 0.0
        for i, (_, ms) in enumerate(groups):
            axes.barh(i, ms, left=left, color="#3f6fa8")
            axes.text(left + ms, i, f" {ms:.1f}", va="center", color=_INK, fontsize=8)
            left += ms
        axes.set_yticks(range(len(groups)), [group for group, _ in groups])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.08 * left)
        axes.set_xlabel("ms of device time")
        yield f"waterfall-{name.replace(' ', '-').replace('+', 'plus')}", figure


def ladder(result: Result) -> Iterator[tuple[str, Figure]]:
    """How much slower a step is with one part put back."""
    rows = [row for row in result.get("ablation", []) if "ms" in row]
    base = next((row["ms"] for row in rows if row["variant"] == "whole engine"), None)
    if base is None or len(rows) < 2:
        return
    rows = [row for row in rows if not row["variant"].startswith("whole engine")]
    rows.sort(key=lambda row: row["ms"])
    figure, axes = _axes(f"one thing changed, ViT-{rows[0]['model']} on {result['gpu']}")
    shares = [100 * (row["ms"] / base - 1) for row in rows]
    drawn = axes.barh([row["variant"] for row in rows], shares, color="#3f6fa8")
    axes.bar_label(drawn, fmt="%+.1f %%", padding=2, fontsize=8)
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.set_xlabel("more time than the whole engine, %")
    yield f"ablation-{rows[0]['model']}-{rows[0]['dataset']}-{rows[0]['batch']}", figure


def scatter(result: Result) -> Iterator[tuple[str, Figure]]:
    """Operations under the roof of the measured ceilings."""
    peak, copy = result["matmul_flops_per_s"], result["copy_bytes_per_s"]
    rows = [row for row in result["rows"] if row["tflops"] and row["direction"] == "training"]
    if not rows:
        return
    figure, axes = _axes(f"under the measured roof of {result['gpu']}, both passes")
    names = sorted({row["candidate"] for row in rows})
    for name in names:
        mine = [row for row in rows if row["candidate"] == name]
        x = [row["tflops"] / row["tb_per_s"] for row in mine]
        axes.scatter(x, [row["tflops"] for row in mine], s=18, label=name)
    ends = [peak / copy / 16, 8 * peak / copy]
    axes.plot([ends[0], peak / copy], [ends[0] * copy / 1e12, peak / 1e12], color=_INK, linewidth=1)
    axes.plot([peak / copy, ends[1]], [peak / 1e12] * 2, color=_INK, linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP a byte")
    axes.set_ylabel("TFLOP/s")
    axes.legend(fontsize=7, frameon=False)
    ops = "-".join(sorted({row["op"] for row in rows}))
    yield f"roofline-{ops}", figure


Draw = Callable[[Result], Iterator[tuple[str, Figure]]]
_DRAWN: tuple[tuple[str, Draw], ...] = (
    ("step", bars),
    ("step", waterfall),
    ("step", ladder),
    ("kernels", scatter),
)


def draw_all(root: Path, out: Path) -> list[Path]:
    """Every plot of the results below `root`; newer results replace older ones' plots."""
    written = []
    for benchmark, draw in _DRAWN:
        for result in results_of(benchmark, root):
            for name, figure in draw(result):
                out.mkdir(parents=True, exist_ok=True)
                path = out / f"{slug(result['gpu'])}-{name}.png"
                figure.savefig(path, dpi=120)
                plt.close(figure)
                written.append(path)
    return written


def _axes(title: str) -> tuple[Figure, plt.Axes]:
    figure, axes = plt.subplots(figsize=(7.0, 4.0), layout="constrained")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--results", type=Path, default=RESULTS)
    options.add_argument("--out", type=Path, default=PLOTS)
    args = options.parse_args(argv)
    for path in draw_all(args.results, args.out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
