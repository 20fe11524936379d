"""The README says what is so: its tables are the saved results', its example runs."""

import re
from pathlib import Path

import pytest
import torch

from avmae_fast.config_file import load_config
from avmae_fast.data.synth import synthesise
from avmae_fast.models import AudiovisualMAE
from avmae_fast.train.export import export_encoder
from benchmarks import tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_are_made_from_saved_results() -> None:
    assert tables.filled(README) == README, "run python -m benchmarks.tables"


def test_missing_results_say_so() -> None:
    for make in tables.TABLES.values():
        assert tables.NOT_MEASURED in make(None)


def test_missing_block_is_named() -> None:
    with pytest.raises(ValueError, match="no block <!-- demo -->"):
        tables.filled("nothing here")


def test_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    synthesise("demo/clips", clips=1, seconds=2.0, size=96, workers=1)
    config = load_config("demo", ["data.manifest=demo/clips/manifest.csv"])
    (tmp_path / "demo/run").mkdir()
    torch.manual_seed(0)
    export_encoder(AudiovisualMAE(config.model), config, tmp_path / "demo/run", {})
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    width, grid = config.model.encoder.width, config.model.video.tokens
    assert f"'video': (1, {grid}, {width})" in capsys.readouterr().out


def test_links_and_commands_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{command}:" in makefile, command
