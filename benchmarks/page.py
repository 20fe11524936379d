"""benchmarks/README.md: tables and plots between its markers, made from saved results."""

from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.roofline import GPUS, LABEL, predict
from benchmarks.roofline_ops import NAMES
from benchmarks.tables import NOT_MEASURED, Result, newest, results_of, table, with_blocks
from benchmarks.targets import ESTIMATE, targets
from benchmarks.workload import SIZES

FOLDER = Path(__file__).parent
PATH = FOLDER / "README.md"
PLOTS = FOLDER / "plots"


def targets_table() -> str:
    rows = [("what", "target", ESTIMATE, "measured")]
    rows += [(t.what, t.target, t.estimate, t.measured()) for t in targets()]
    return table(rows)


def predictions_table() -> str:
    """The model's estimate of every row, beside nothing: what a run is to be held against."""
    gpu = GPUS[0]
    rows = [("AudioSet, batch 128", *(f"{row}, ms" for row in NAMES), "largest batch A / B+ / C")]
    for size in SIZES:
        found = {row: predict(gpu, size, "audioset", 128, row) for row in NAMES}
        largest = " / ".join(str(found[row].largest_batch) for row in ("A", "B+", "C"))
        rows.append((f"ViT-{size}", *(f"{found[row].ms:.0f}" for row in NAMES), largest))
    return f"{table(rows)}\n\nEvery number is a {LABEL} for one {gpu.name}; none was measured."


def step_table(results: list[Result]) -> str:
    head = ("model, data set, batch", "row", "ms", "clips/s", "of matmul ceiling", "peak GB",
            "J a clip", "largest batch")  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    for result in results:
        for row in result["rows"]:
            peak = row["peak_bytes"]
            rows.append(
                (
                    f"ViT-{row['model']}, {row['dataset']}, {row['batch']}",
                    row["row"],
                    f"{row['ms']:.1f} ({row['ms_lower']:.1f}..{row['ms_upper']:.1f})",
                    f"{row['clips_per_s']:.0f}",
                    f"{100 * row['share_of_matmul_ceiling']:.0f} %",
                    NOT_MEASURED if peak is None else f"{peak / 1e9:.1f}",
                    _or_not(row["joules_per_clip"], ".2f"),
                    _or_not(row.get("largest_batch"), "d"),
                )
            )
    return _with_misses(rows, results, ("model", "dataset", "batch", "row"))


def kernels_table(results: list[Result]) -> str:
    head = ("operation", "shape", "candidate", "pass", "µs", "TFLOP/s", "TB/s", "of the ceiling",
            "max error")  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    for result in results:
        for row in result["rows"]:
            bound = "matmul" if row["tflops"] else "copy"
            rows.append(
                (
                    row["op"],
                    row["shape"],
                    row["candidate"],
                    row["direction"],
                    f"{row['us']:.1f}",
                    "" if row["tflops"] is None else f"{row['tflops']:.0f}",
                    f"{row['tb_per_s']:.2f}",
                    f"{100 * row[f'share_of_{bound}_ceiling']:.0f} % {bound}",
                    f"{row['max_error']:.1e}",
                )
            )
    return _with_misses(rows, results, ("op", "shape", "candidate"))


def peers_table(results: list[Result]) -> str:
    rows: list[tuple[str, ...]] = [("contest", "shape", "candidate", "ms", "clips/s")]
    for result in results:
        for row in result["rows"]:
            names = (f"{row['contest']}, ViT-{row['model']}, {row['batch']}", row["shape"])
            values = (f"{row['ms']:.1f}", f"{row['clips_per_s']:.0f}")
            rows.append((*names, row["candidate"], *values))
    return _with_misses(rows, results, ("contest", "candidate"))


def finetune_table(results: list[Result]) -> str:
    rows: list[tuple[str, ...]] = [
        ("model, batch", "modalities", "row", "ms", "clips/s", "peak GB")
    ]
    for result in results:
        for row in result["rows"]:
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}"
            names = (f"ViT-{row['model']}, {row['batch']}", row["modalities"], row["row"])
            rows.append((*names, f"{row['ms']:.1f}", f"{row['clips_per_s']:.0f}", peak))
    return _with_misses(rows, results, ("modalities", "row"))


def end_to_end_table(results: list[Result]) -> str:
    rows: list[tuple[str, ...]] = [("from", "model, workers", "clips/s", "waiting for the loader")]
    for result in results:
        for row in result["rows"]:
            model = f"ViT-{row['model']}, {row['workers']}"
            waiting = f"{100 * row['share_waiting']:.0f} %"
            rows.append((row["source"], model, f"{row['clips_per_s']:.0f}", waiting))
    return _with_misses(rows, results, ("source",))


def cpu_table(result: Result | None) -> str:
    rows: list[tuple[str, ...]] = [("one thread", "candidate", "ms", "times ours")]
    if result is None:
        return table([*rows, (NOT_MEASURED,) * 4])
    for row in result["rows"]:
        values = (f"{row['ms']:.3g}", f"{row['times_ours']:.2f}")
        rows.append((row["what"], row["candidate"], *values))
    machine = result["machine"]
    where = f"Measured on {machine['cores']} cores of an {machine['processor']} "
    where += f"({result['date'][:10]})"
    if (load := result.get("load_average", 0.0)) > machine["cores"]:
        where += f", busy with other work (load average {load:.1f}): ratios hold, times do not"
    return f"{_with_misses(rows, [result], ('what', 'candidate'))}\n\n{where}."


def plots_block() -> str:
    """The plots there are; none is drawn of what was not measured."""
    found = sorted(PLOTS.glob("*.png"))
    if not found:
        return f"Plots are drawn from measured results alone: {NOT_MEASURED}."
    return "\n\n".join(f"![{path.stem}](plots/{path.name})" for path in found)


def _or_not(value: float | int | None, form: str) -> str:
    return NOT_MEASURED if value is None else format(value, form)


def _with_misses(
    rows: list[tuple[str, ...]], results: Iterable[Result], names: tuple[str, ...]
) -> str:
    """The table, or one that says so where nothing was measured; then what could not run."""
    results = list(results)
    if len(rows) == 1:
        rows.append((NOT_MEASURED,) * len(rows[0]))
    misses = [
        f"- {', '.join(str(row[n]) for n in names if n in row)}: {row['why']}"
        for result in results
        for row in result["not_run"]
    ]
    return table(rows) + ("\n\nNot run:\n\n" + "\n".join(misses) if misses else "")


_MEASURED: dict[str, tuple[str, Callable[[list[Result]], str]]] = {
    "step": ("step", step_table),
    "kernels": ("kernels", kernels_table),
    "peers": ("peers", peers_table),
    "finetune": ("finetune", finetune_table),
    "end-to-end": ("end_to_end", end_to_end_table),
}


def blocks() -> dict[str, str]:
    """What stands between the markers of the page, by their names."""
    return {
        "targets": targets_table(),
        "predictions": predictions_table(),
        **{name: make(results_of(benchmark)) for name, (benchmark, make) in _MEASURED.items()},
        "cpu": cpu_table(newest("cpu")),
        "plots": plots_block(),
    }


def filled(text: str) -> str:
    """The page's `text` with every block made anew."""
    return with_blocks(text, blocks())
