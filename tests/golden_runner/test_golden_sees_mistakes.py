"""Mistakes that keep the loss almost right must turn the golden comparison red."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_parts
import pytest
import torch
from golden_cases import REPOSITORY_FOLDER, Case, Comparison, batch, load, model_config
from golden_model import build, check_float32, compare_outputs

from avmae_fast.config import ModelConfig
from avmae_fast.reference import ReferenceMAE

PRETRAIN = sorted(REPOSITORY_FOLDER.glob("pre_*.npz"))


def _comparisons(
    case: Case, config: ModelConfig, spoil: Callable[[ReferenceMAE], None] = lambda model: None
) -> tuple[list[Comparison], list[Comparison]]:
    """Comparisons of predictions and losses of a spoiled model, in float64 and float32."""
    wide = build(case, config, torch.float64)
    narrow = build(case, config, torch.float32)
    spoil(wide)
    spoil(narrow)
    with torch.no_grad():
        out = wide(**batch(case, torch.float64))
    return list(compare_outputs(case, out)), list(check_float32(case, narrow))


def _assert_red(comparisons: tuple[list[Comparison], list[Comparison]]) -> None:
    for run in comparisons:
        wrong = [c for c in run if c.name.startswith("pred") and not c.ok]
        assert wrong, f"nothing is red: {[str(c) for c in run]}"


def test_the_model_as_it_is_stays_green() -> None:
    for path in PRETRAIN[:2]:
        case = load(path)
        wide, narrow = _comparisons(case, model_config(case))
        assert all(comparison.ok for comparison in wide + narrow)


@pytest.mark.parametrize("mistake", [{"gelu": "erf"}, {"layer_norm_eps": 1e-5}], ids=str)
@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)
def test_wrong_constants_are_seen(path: Path, mistake: dict[str, Any]) -> None:
    case = load(path)
    _assert_red(_comparisons(case, dataclasses.replace(model_config(case), **mistake)))


def test_a_missing_middle_norm_is_seen() -> None:
    def spoil(model: ReferenceMAE) -> None:
        model.encoder["video"].norm = None

    cases = [load(path) for path in PRETRAIN]
    configs = [(case, model_config(case)) for case in cases]
    mid = [(case, c) for case, c in configs if c.fusion == "mid" and c.encoder_norm and c.video]
    assert mid
    for case, config in mid:
        _assert_red(_comparisons(case, config, spoil))


@pytest.mark.parametrize("where", ["pos", "decoder_pos"])
def test_sines_and_cosines_in_halves_are_seen(where: str) -> None:
    def spoil(model: ReferenceMAE) -> None:
        for m in model.config.modalities:
            table = model.get_buffer(f"{where}_{m}")
            table.copy_(torch.cat([table[:, 0::2], table[:, 1::2]], dim=1))

    case = load(REPOSITORY_FOLDER / "pre_same_sep.npz")
    _assert_red(_comparisons(case, model_config(case), spoil))


def test_decay_before_the_update_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.optim.AdamW` is what one would take for the authors' optimiser; it is not."""

    def adamw(groups: list[dict[str, Any]], weight_decay: float, **kwargs: Any) -> Any:
        renamed = [
            {
                "params": group["params"],
                "weight_decay": group.get("explicit_weight_decay", weight_decay),
            }
            for group in groups
        ]
        return torch.optim.AdamW(renamed, **kwargs)

    case = load(REPOSITORY_FOLDER / "opt_adam_explicit_wd.npz")
    assert all(comparison.ok for comparison in golden_parts.check_adam(case))
    monkeypatch.setattr(golden_parts, "ReleasedAdamW", adamw)
    wrong = {c.name for c in golden_parts.check_adam(case) if not c.ok}
    kernels = {f"param3/{leaf}" for leaf in case.meta["decayed_leaves"]}
    assert kernels <= wrong, f"{sorted(kernels - wrong)} stay green"


def test_a_schedule_one_step_late_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = golden_parts.learning_rate
    monkeypatch.setattr(
        golden_parts, "learning_rate", lambda step, **kwargs: right(step + 1, **kwargs)
    )
    case = load(REPOSITORY_FOLDER / "lr_schedules.npz")
    assert not any(comparison.ok for comparison in golden_parts.check_lr(case))


def test_nan_and_other_shapes_are_errors() -> None:
    expected = torch.zeros(3).numpy()
    nan = golden_parts.compare("x", torch.full((3,), float("nan")), expected, 1.0)
    short = golden_parts.compare("x", torch.zeros(2), expected, 1.0)
    assert not nan.ok and not short.ok
