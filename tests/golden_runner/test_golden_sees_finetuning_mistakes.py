"""Mistakes in the classifier must turn the golden comparison red."""

import dataclasses
from typing import Any

import pytest
import torch
from golden_cases import REPOSITORY_FOLDER, Case, load
from golden_finetune import check_e2e_finetune, check_sgd, classifier_config, compare_classifier

from avmae_fast.finetune_config import ClassifierConfig


def _case(name: str) -> Case:
    return load(REPOSITORY_FOLDER / f"{name}.npz")


def _wrong(case: Case, config: ClassifierConfig) -> set[str]:
    return {c.name.split("/")[0] for c in compare_classifier(case, config) if not c.ok}


@pytest.mark.parametrize(
    ("name", "mistake", "seen"),
    [
        ("ft_mbt_softmax", {"gelu": "erf"}, {"logits64", "logits"}),
        ("ft_mbt_softmax", {"layer_norm_eps": 1e-5}, {"logits64", "logits"}),
        ("ft_mbt_sigmoid", {"fusion_layer": 2}, {"logits64", "train_loss64"}),
        ("ft_mbt_droplayer", {"drop_path_scaled": True}, {"train_loss64", "train_loss"}),
        ("ft_mbt_test_without_bottleneck", {"fuse_at_test": True}, {"logits64", "encoded"}),
        ("ft_mbt_nobottleneck", {"fusion": "late"}, {"logits64", "train_loss64"}),
    ],
    ids=str,
)
def test_wrong_settings_are_seen(name: str, mistake: dict[str, Any], seen: set[str]) -> None:
    case = _case(name)
    config = classifier_config(case)
    assert not _wrong(case, config)
    assert seen <= _wrong(case, dataclasses.replace(config, **mistake))


def test_clipping_by_another_norm_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case("opt_sgd_layerwise")
    assert all(c.ok for c in check_sgd(case))
    monkeypatch.setattr(
        "golden_finetune.clip_to_norm", lambda ps, norm: torch.nn.utils.clip_grad_norm_(ps, norm, 1)
    )
    assert not all(c.ok for c in check_sgd(case))


def test_one_rate_for_all_layers_is_seen() -> None:
    case = _case("e2e_finetune_3steps")
    assert all(c.ok for c in check_e2e_finetune(case))
    case.meta["config"]["optimizer_configs"]["layerwise_decay"] = None
    wrong = {c.name.split("/")[0] for c in check_e2e_finetune(case) if not c.ok}
    assert {"param2", "param3"} <= wrong
