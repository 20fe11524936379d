"""The report a run ends with: figures, numbers, and one page that shows them.

report/index.html           everything on one page, pictures included
report/summary.json         all numbers
report/loss.png, video.png, audio.png
"""

import io
import json
import os
import shutil
import statistics
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import nn

from avmae_fast.config import Config
from avmae_fast.config_file import to_dict
from avmae_fast.data.loader import ClipLoader
from avmae_fast.models import AudiovisualMAE
from avmae_fast.train.evaluate import Evaluation, evaluate
from avmae_fast.train.export import encoder_names
from avmae_fast.train.figures import clip_grid, loss_curves
from avmae_fast.train.inputs import InputStage
from avmae_fast.train.lines import read_lines
from avmae_fast.train.page import page, sentences
from avmae_fast.train.recipe import Autocast
from avmae_fast.train.run_folder import (
    METRICS,
    REPORT,
    VALIDATION,
    RunFolderError,
    read_bad_samples,
    versions,
)

_DPI = 110


def write_report(
    config: Config,
    model: AudiovisualMAE,
    stage: InputStage,
    autocast: Autocast,
    clips: ClipLoader,
    held_out: ClipLoader | None,
) -> Path:
    """Measure the model, write `train.out/report` in place of an earlier one, print the numbers.

    Returns:
        The page, index.html.
    """
    lines = read_lines(config.train.out / METRICS)
    if not lines:
        raise RunFolderError(f"{config.train.out / METRICS} is empty: the report needs its lines")
    evaluation = evaluate(model, stage, autocast, clips, held_out)
    summary = summarise(config, model, evaluation, lines, str(stage.device))
    validation = read_lines(config.train.out / VALIDATION)
    figures = {"loss": loss_curves(lines, validation, evaluation.mean_mse)}
    for m in config.model.modalities:
        figures[m] = clip_grid(config, m, [clip[m] for clip in evaluation.pictures])
    pngs = {name: _png(figure) for name, figure in figures.items()}

    folder = config.train.out / REPORT
    partial = folder.with_name(f".partial-{REPORT}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name, png in pngs.items():
        (partial / f"{name}.png").write_bytes(png)
    (partial / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (partial / "index.html").write_text(page(summary, pngs), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
    print("\n".join(["", *sentences(summary), "", f"report: {folder / 'index.html'}"]))
    return folder / "index.html"


def summarise(
    config: Config,
    model: AudiovisualMAE,
    evaluation: Evaluation,
    lines: list[dict[str, Any]],
    device: str,
) -> dict[str, Any]:
    """All numbers of a run, as summary.json holds them.

    Args:
        lines: of metrics.jsonl.
    """
    last = lines[-1]
    encoder = encoder_names(model)
    bad = read_bad_samples(config.train.out)
    kinds = {line["path"]: line["kind"] for line in reversed(bad)}
    counts = Counter(line["path"] for line in bad)
    return {
        "steps": last["step"],
        "samples": last["samples"],
        "time_s": last["time_s"],
        "clips_per_s": statistics.median(line["clips_per_s"] for line in lines),
        "data_wait_fraction": statistics.mean(line["data_wait_fraction"] for line in lines),
        "device": device,
        "parameters": _count(model),
        "encoder_parameters": _count(model, encoder),
        "last_losses": {name: last[name] for name in last if name.startswith("loss")},
        "held_out": evaluation.held_out,
        "clips": evaluation.clips,
        "mean_windows": evaluation.mean_windows,
        "reconstruction": {
            m: {
                "mse": evaluation.mse[m],
                "mean_mse": evaluation.mean_mse[m],
                "ratio": evaluation.mse[m] / evaluation.mean_mse[m],
            }
            for m in config.model.modalities
        },
        "probe": _probe_numbers(evaluation),
        "no_probe": evaluation.no_probe,
        "bad_samples": {
            "samples": len({line["position"] for line in bad}),
            "files": [{"path": p, "kind": kinds[p], "count": n} for p, n in counts.items()],
        },
        "config": to_dict(config),
        "versions": versions(),
    }


def _probe_numbers(evaluation: Evaluation) -> dict[str, Any] | None:
    probe = evaluation.probe
    if probe is None:
        return None
    numbers = asdict(probe)
    for name in ("trained", "untrained"):
        numbers[f"{name}_by_seed"] = numbers[name]
        numbers[name] = statistics.mean(numbers[name])
    return numbers


def _count(model: nn.Module, names: set[str] | None = None) -> int:
    chosen = model.named_parameters()
    return sum(p.numel() for name, p in chosen if names is None or name in names)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()
