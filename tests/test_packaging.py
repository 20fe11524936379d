"""What users install: the wheel holds every module, the presets and the compiled part."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROBE = """
import sys
sys.path.insert(0, sys.argv[1])
import avmae_fast, avmae_kernels, avmae_kernels.masking as masking
for module in (avmae_fast, avmae_kernels):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
from avmae_fast.config_file import load_config
config = load_config("audioset-L", ["data.manifest=clips.csv", "train.out=run"])
assert config.model.encoder.width == 1024
print(masking.implementation().__name__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    # Built in a copy, so that the test leaves no build products in the checkout.
    copy = out / "source"
    copy.mkdir()
    files = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
    for name in ("avmae_fast", "kernels", "csrc", *files):
        (copy / name).symlink_to(ROOT / name)
    env = {**os.environ, "AVMAE_CSRC": "1"}
    subprocess.run([*command, "--wheel-dir", str(out), str(copy)], check=True, env=env)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_every_module(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for root in (ROOT / "avmae_fast", ROOT / "kernels" / "avmae_kernels"):
        for path in root.rglob("*"):
            if path.suffix in (".py", ".toml", ".json") and path.name != "ruff.toml":
                inside = f"{root.name}/{path.relative_to(root)}"
                assert inside in names, f"{inside} is missing from the wheel"
    assert any(name.startswith("avmae_kernels/_C") for name in names)
    assert not any(
        name.startswith(("tests/", "benchmarks/", "kernels/", "soak/")) for name in names
    )


def test_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    result = subprocess.run(
        [sys.executable, "-P", "-c", PROBE, str(target)],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "avmae_kernels._C"
