"""What the engine is to reach, what the model expects of it, and what was measured.

"as it is" is the engine's row C, "planned" the row C+ of `benchmarks.roofline_ops`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from avmae_kernels.attention_backends import HOPPER
from benchmarks.roofline import GPUS, LABEL, Prediction, attention_ratio, predict
from benchmarks.roofline_ops import Name
from benchmarks.tables import NOT_MEASURED, results_of

_GPU = GPUS[0]
_BATCH = 128
# Clips a second that one core decodes, loader included, as timed on a machine without a GPU.
_DECODED_A_CORE = {"raw mp4": 13.3, "packed mjpeg": 385.0}
_CORES = 16

Result = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One line: what is asked for, the estimate, and how to find it among measured results."""

    what: str
    target: str
    estimate: str
    measured: Callable[[], str]


def targets() -> list[Target]:
    return [
        *(_step(row, target) for row, target in _STEP.items()),
        Target(
            "step over its products and attention",
            "≤ 1.2×",
            _both(lambda p: p.ms / p.products_and_attention_ms, "×"),
            lambda: NOT_MEASURED,
        ),
        Target(
            "share of the measured matmul ceiling, ViT-B / L",
            "≥ 55 % / ≥ 65 %",
            _both(lambda p: 100 * p.share_of_matmul_ceiling, " %"),
            lambda: _of_rows(lambda row: f"{100 * row['share_of_matmul_ceiling']:.0f} %"),
        ),
        Target(
            "largest batch vs A / vs B+, ViT-L",
            "≥ 2.4× / ≥ 1.8×",
            " / ".join(f"{_largest('C') / _largest(row):.1f}×" for row in ("A", "B+")),
            _measured_largest,
        ),
        Target(
            f"end to end from files, {_CORES} cores, vs B+ on raw mp4, ViT-B",
            "≥ 5×",
            f"{_end_to_end():.1f}×, packed mjpeg",
            _measured_end_to_end,
        ),
        Target(
            "packed attention, ≤ 320 tokens, head_dim 64, vs the best library",
            "≥ 1.5×",
            _attention((157, 306), 64, ("flash 2", "cuDNN")),
            lambda: _measured_attention(lambda n, d: n <= 320 and d == 64, None),
        ),
        Target(
            "packed attention, 1568 and 2064 tokens, head_dim 64, vs FlashAttention 2",
            "≥ 1.25×",
            _attention((1568, 2064), 64, ("flash 2",)),
            lambda: _measured_attention(lambda n, d: n >= 1568 and d == 64, "sdpa-flash"),
        ),
        Target(
            "packed attention, 1568 and 2064 tokens, head_dim 32, vs FlashAttention 2",
            "≥ 1.5×",
            _attention((1568, 2064), 32, ("flash 2",)),
            lambda: _measured_attention(lambda n, d: n >= 1568 and d == 32, "sdpa-flash"),
        ),
        Target(
            "add_layer_norm, loss, sequence assembly, patch embedding, both passes",
            "≥ 80 % of the copy bandwidth",
            "88 %, assumed",
            _measured_memory,
        ),
    ]


_STEP: dict[Name, str] = {
    "A": "≥ 2.4× / ≥ 2.0×",
    "B": "≥ 1.7× / ≥ 1.6×",
    "B+": "≥ 1.4× / ≥ 1.35×",
}
_OURS: tuple[tuple[Name, str], ...] = (("C", "as it is"), ("C+", "planned"))


def _of(size: str, name: Name) -> Prediction:
    return predict(_GPU, size, "audioset", _BATCH, name)


def _both(value: Callable[[Prediction], float], unit: str) -> str:
    """As it is and planned, for ViT-B and L."""
    parts = []
    for name, label in _OURS:
        found = " / ".join(f"{value(_of(s, name)):.3g}{unit}" for s in "BL")
        parts.append(f"{label} {found}")
    return "; ".join(parts)


def _step(row: Name, target: str) -> Target:
    def measured() -> str:
        return _of_rows(lambda ours, other: f"{other['ms'] / ours['ms']:.2f}×", row)

    estimate = "; ".join(
        f"{label} " + " / ".join(f"{_of(s, row).ms / _of(s, name).ms:.2f}×" for s in "BL")
        for name, label in _OURS
    )
    return Target(f"step vs {row}, ViT-B / L", target, estimate, measured)


def _of_rows(text: Callable[..., str], other: str | None = None) -> str:
    """Of the newest run at the batch that held row C (and another row) of ViT-B and of L."""
    found = []
    for size in "BL":
        cell = ""
        for result in results_of("step"):
            rows = {
                r["row"]: r
                for r in result["rows"]
                if (r["model"], r["dataset"], r["batch"]) == (size, "audioset", _BATCH)
            }
            if "C" in rows and (other is None or other in rows):
                values = (rows["C"],) if other is None else (rows["C"], rows[other])
                cell = f"{text(*values)} on {result['gpu']}"
        found.append(cell or NOT_MEASURED)
    return NOT_MEASURED if set(found) == {NOT_MEASURED} else " / ".join(found)


def _largest(row: Name) -> int:
    return _of("L", row).largest_batch


def _measured_largest() -> str:
    for result in reversed(results_of("step")):
        found = {r["row"]: r["batch"] for r in result.get("largest", []) if "batch" in r}
        if {"A", "B+", "C"} <= found.keys():
            ratios = " / ".join(f"{found['C'] / found[row]:.1f}×" for row in ("A", "B+"))
            return f"{ratios} on {result['gpu']}"
    return NOT_MEASURED


def _end_to_end() -> float:
    """Both sides are as fast as the slower of the card and the cores."""
    raw, packed = (_CORES * rate for rate in _DECODED_A_CORE.values())
    rival, ours = (_of("B", row).clips_per_s for row in ("B+", "C"))
    return min(ours, packed) / min(rival, raw)


def _measured_end_to_end() -> str:
    for result in reversed(results_of("end_to_end")):
        rates = {row["source"]: row["clips_per_s"] for row in result["rows"]}
        ours = [rate for source, rate in rates.items() if source.startswith("C, packed")]
        if "B+, raw mp4" in rates and ours:
            return f"{max(ours) / rates['B+, raw mp4']:.1f}× on {result['gpu']}"
    return NOT_MEASURED


def _attention(lengths: Sequence[int], head_dim: int, others: Sequence[str]) -> str:
    parts = []
    for kernel, label in (("ours", "as it is"), ("ours, goal", "planned")):
        ratios = [attention_ratio(n, head_dim, kernel, others) for n in lengths]
        parts.append(f"{label} {min(ratios):.2f}×..{max(ratios):.2f}×")
    return "; ".join(parts)


def _measured_attention(wanted: Callable[[int, int], bool], rival: str | None) -> str:
    """The worst ratio over the shapes, forward and backward."""
    for result in reversed(results_of("kernels")):
        shapes: dict[str, dict[str, float]] = {}
        for row in result["rows"]:
            if row["op"] == "attention" and row["direction"] == "training":
                if len(row["lengths"]) == 1 and wanted(row["lengths"][0], row["head_dim"]):
                    shapes.setdefault(row["shape"], {})[row["candidate"]] = row["us"]
        ratios = []
        for us in shapes.values():
            ours = [us[name] for name in ("ours", HOPPER) if name in us]
            own = ("ours", HOPPER, "eager", "compiled")
            theirs = [t for name, t in us.items() if name not in own and rival in (None, name)]
            if ours and theirs:
                ratios.append(min(theirs) / min(ours))
        if ratios:
            return f"{min(ratios):.2f}×..{max(ratios):.2f}× on {result['gpu']}"
    return NOT_MEASURED


def _measured_memory() -> str:
    for result in reversed(results_of("kernels")):
        shares = [
            row["share_of_copy_ceiling"]
            for row in result["rows"]
            if row["candidate"] == "ours"
            and row["direction"] == "training"
            and row["op"] not in ("attention", "bias_gelu")
        ]
        if shares:
            return f"{100 * min(shares):.0f}..{100 * max(shares):.0f} % on {result['gpu']}"
    return NOT_MEASURED


ESTIMATE = f"{LABEL}, {_GPU.name}, batch {_BATCH}"
