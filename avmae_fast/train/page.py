"""The words of a report: sentences for the console and the page that holds everything."""

import base64
import html
import math
from collections.abc import Mapping
from string import Template
from typing import Any

# Ratios of squared errors: what may be called better than the mean.
_BARELY, _CLEARLY = 0.97, 0.75

_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Pretraining report</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p, ul { max-width: 46rem; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid #ddd; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; }
footer { color: #666; margin-top: 3rem; font-size: .85rem; }
</style>
<h1>Pretraining report</h1>
<p>$run</p>
<h2>What was learned</h2>
<ul>$findings</ul>
$table
<p>$reading</p>
<h2>Loss</h2>
<img src="$loss" alt="loss of each modality over the steps">
$pictures
$bad
<footer>$footer</footer>
</html>
""")


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """The findings, one sentence each, then how to read them."""
    return [_run(summary), "", *(f"- {text}" for text in _findings(summary)), "", _reading(summary)]


def page(summary: Mapping[str, Any], pngs: Mapping[str, bytes]) -> str:
    """The whole report as one HTML page.

    Args:
        pngs: the figures: "loss", and one for each modality.
    """
    findings = "".join(f"<li>{html.escape(text)}</li>" for text in _findings(summary))
    versions = ", ".join(f"{name} {v}" for name, v in summary["versions"].items())
    return _PAGE.substitute(
        run=html.escape(_run(summary)),
        findings=findings,
        table=_table(summary),
        reading=html.escape(_reading(summary)),
        loss=_inline(pngs["loss"]),
        pictures="".join(_picture(m, pngs[m], summary) for m in summary["reconstruction"]),
        bad=_bad_files(summary),
        footer=html.escape(f"{versions}. All numbers and the configuration: summary.json."),
    )


def _run(summary: Mapping[str, Any]) -> str:
    minutes = summary["time_s"] / 60
    return (
        f"{summary['steps']:,} steps over {summary['samples']:,} samples in {minutes:.1f} minutes "
        f"on {summary['device']} ({summary['clips_per_s']:.1f} clips/s, "
        f"{summary['data_wait_fraction']:.0%} of the time waiting for data). The model has "
        f"{summary['parameters']:,} parameters, "
        f"{summary['encoder_parameters']:,} of them in the encoder."
    )


def _findings(summary: Mapping[str, Any]) -> list[str]:
    clips = f"{summary['clips']} {_kind_of_clips(summary)}"
    texts = []
    for m, numbers in summary["reconstruction"].items():
        texts.append(
            f"{m.capitalize()}: squared error {numbers['mse']:.4f} at the masked patches of "
            f"{clips}; the training set's mean at each position has {numbers['mean_mse']:.4f}. "
            f"Ratio {numbers['ratio']:.3f}: {_verdict(numbers['ratio'])}."
        )
    probe = summary["probe"]
    if probe is None:
        texts.append(f"No linear probe: {summary['no_probe']}.")
    else:
        texts.append(
            f"Linear probe on the frozen encoder: {probe['trained']:.1%} of held-out clips right, "
            f"{probe['untrained']:.1%} with the untrained encoder, {probe['chance']:.1%} by chance "
            f"({probe['classes']} classes, {probe['train_clips']} clips to fit, "
            f"{probe['test_clips']} to test, mean of {len(probe['trained_by_seed'])} seeds)."
        )
    return texts


def _verdict(ratio: float) -> str:
    if ratio >= 1:
        return "no better than the average clip; nothing about the single clip is reconstructed yet"
    if ratio > _BARELY:
        return "hardly better than the average clip"
    if ratio > _CLEARLY:
        return f"{1 - ratio:.0%} less error than the average clip, a beginning"
    return f"{1 - ratio:.0%} less error than the average clip"


def _kind_of_clips(summary: Mapping[str, Any]) -> str:
    return "held-out clips" if summary["held_out"] else "training clips (none are held out)"


def _reading(summary: Mapping[str, Any]) -> str:
    """What these numbers are not."""
    text = (
        "How far to trust this: it is one run with one seed, measured on "
        f"{summary['clips']} {_kind_of_clips(summary)} with one mask each. "
    )
    if not summary["held_out"]:
        text += "Without held-out clips it cannot tell learning from memory. "
    probe = summary["probe"]
    if probe is not None:
        share = probe["trained"]
        error = math.sqrt(share * (1 - share) / probe["test_clips"])
        low, high = min(probe["trained_by_seed"]), max(probe["trained_by_seed"])
        text += (
            f"A probe tested on {probe['test_clips']} clips is uncertain by about "
            f"{100 * error:.0f} points (one standard error), and by seed it ranges from "
            f"{low:.1%} to {high:.1%}; the seed chooses the windows cut from the training clips. "
        )
    return text + (
        "The pictures show the first clips of the list, not the best ones. Squared error rewards "
        "the mean of everything that fits, so what cannot be known comes out blurred or grey."
    )


def _table(summary: Mapping[str, Any]) -> str:
    rows = [
        (f"{m}: squared error / that of the training set's mean", f"{numbers['ratio']:.3f}")
        for m, numbers in summary["reconstruction"].items()
    ]
    probe = summary["probe"]
    if probe is not None:
        rows += [
            ("linear probe, pretrained encoder", f"{probe['trained']:.1%}"),
            ("linear probe, untrained encoder", f"{probe['untrained']:.1%}"),
            ("most frequent class", f"{probe['chance']:.1%}"),
        ]
    cells = (f"<tr><td>{name}</td><td class=number>{value}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _picture(m: str, png: bytes, summary: Mapping[str, Any]) -> str:
    text = (
        f"{_kind_of_clips(summary).capitalize()}. <b>masked</b> is what the encoder saw; "
        "<b>reconstruction</b> is the model's output at masked patches and the original at visible "
        "ones; <b>raw</b> is the model's output everywhere, also at visible patches, where nothing "
        "has trained it."
    )
    if summary["config"]["model"]["target_norm"] != "none":
        text += " The model predicts normalised patches: each one's true mean and spread are used."
    return f'<h2>{m.capitalize()}</h2><p>{text}</p><img src="{_inline(png)}" alt="{m} clips">'


def _bad_files(summary: Mapping[str, Any]) -> str:
    bad = summary["bad_samples"]
    if not bad["samples"]:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(file['path'])}</td><td>{file['kind']}</td>"
        f"<td class=number>{file['count']}</td></tr>"
        for file in bad["files"]
    )
    return (
        f"<h2>Files that could not be read</h2><p>Other clips took the place of {bad['samples']} "
        f"samples.</p><table><tr><th>file</th><th>why</th><th>times</th></tr>{rows}</table>"
    )


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
