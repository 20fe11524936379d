"""The examples run and learn, and stay short."""

import runpy
from pathlib import Path

import pytest
from libraries import library

EXAMPLES = Path(__file__).parents[1] / "examples"
# What each file needs beside avmae_fast.
NEEDS = {
    "pytorch_mae": (),
    "contrastive": (),
    "huggingface_trainer": ("transformers", "accelerate"),
    "lightning_module": ("timm", "lightning"),
}
# A loop of somebody else's, of which ours are a few lines.
MOST_LINES = 75


def test_every_example_is_known() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS[name]:
        library(package)
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) <= MOST_LINES
    monkeypatch.chdir(tmp_path)
    losses = runpy.run_path(str(path))["main"]()
    third = len(losses) // 3
    assert sum(losses[-third:]) < 0.95 * sum(losses[:third]), losses
    assert not list(tmp_path.iterdir())
    # Its first lines say what to install.
    assert all(package in path.read_text().split('"""')[1] for package in NEEDS[name])
