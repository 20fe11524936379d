"""The floors: imports point down only, and importing the package touches neither GPU nor disk."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each part of avmae_fast may import from avmae_fast, besides itself and the leaves.
LEAVES = {"config", "finetune_config", "positions"}
MAY_IMPORT = {
    "models": {"config_file"},
    "acceleration": set(),
    "reference": set(),
    "interop": {"models", "config_file"},
    "data": set(),
    "train": {"models", "data", "interop", "config_file"},
}


def _imported(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
            if node.module == "avmae_fast":
                modules |= {f"avmae_fast.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize("floor", MAY_IMPORT)
def test_imports_point_down(floor: str) -> None:
    allowed = MAY_IMPORT[floor] | LEAVES | {floor}
    for path in (ROOT / "avmae_fast" / floor).rglob("*.py"):
        own = {m.split(".")[1] for m in _imported(path) if m.startswith("avmae_fast.")}
        assert own <= allowed, f"{path.relative_to(ROOT)} imports {sorted(own - allowed)}"


def test_kernels_stand_alone() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        roots = {module.split(".")[0] for module in _imported(path)}
        assert "avmae_fast" not in roots, f"{path.relative_to(ROOT)} imports avmae_fast"


def test_import_is_light() -> None:
    """A fresh interpreter imports the models without Triton, PyAV or a CUDA context."""
    code = (
        "import sys; sys.modules['triton'] = None; import avmae_fast.models, torch; "
        "assert 'av' not in sys.modules; assert not torch.cuda.is_initialized()"
    )
    paths = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]; "
    subprocess.run([sys.executable, "-c", paths + code], check=True, cwd="/")
