"""Ring 4: the reference reproduces numbers that the authors' own code produced.

Runs on the folder named by AVMAE_GOLDEN, by default the files that come with the tests.
"""

from pathlib import Path

import pytest
from golden_cases import REPOSITORY_FOLDER, Case, Comparison, folder, load
from golden_finetune import check_e2e_finetune, check_finetune, check_sgd
from golden_model import check_e2e_pretrain, check_pretrain
from golden_parts import (
    check_adam,
    check_dataset,
    check_lr,
    check_mask_counts,
    check_posemb,
    check_targets,
)
from golden_transfer import check_init_mapping

CHECKS = {
    "pretrain": check_pretrain,
    "e2e_pretrain": check_e2e_pretrain,
    "adam": check_adam,
    "lr": check_lr,
    "posemb": check_posemb,
    "targets": check_targets,
    "mask_counts": check_mask_counts,
    "dataset": check_dataset,
    "finetune": check_finetune,
    "e2e_finetune": check_e2e_finetune,
    "ft_init_mapping": check_init_mapping,
    "sgd": check_sgd,
    "sgd_layerwise": check_sgd,
}
PATHS = sorted(folder().glob("*.npz"))


def _comparisons(case: Case) -> list[Comparison]:
    if case.kind not in CHECKS:
        pytest.fail(f"unknown kind {case.kind!r}, known are {sorted(CHECKS)}")
    return list(CHECKS[case.kind](case))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    comparisons = _comparisons(load(path))
    assert comparisons, f"{path} holds nothing to compare"
    wrong = [str(comparison) for comparison in comparisons if not comparison.ok]
    assert not wrong, f"{len(wrong)} of {len(comparisons)} differ: " + "; ".join(wrong[:20])


def test_the_folder_has_every_kind() -> None:
    kinds = {load(path).kind for path in PATHS}
    assert kinds, f"no golden file in {folder()}"
    if folder() == REPOSITORY_FOLDER:
        # Momentum without layer-wise decay is part of what "sgd_layerwise" checks.
        assert kinds >= CHECKS.keys() - {"sgd"}


def test_an_unknown_kind_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match="unknown kind 'vision'"):
        _comparisons(Case({}, {"kind": "vision"}))
