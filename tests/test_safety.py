"""Nothing that is read can run: no pickles, no shell, no code of text; names stay in folders."""

import ast
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from avmae_fast.config import Config
from avmae_fast.config_file import from_dict
from avmae_fast.data.manifest import ManifestError, load_manifest
from avmae_fast.data.shard_index import read_index
from avmae_fast.train.checkpoint import damage
from avmae_fast.train.run_folder import RunFolderError, find_resume_point, open_run

ROOT = Path(__file__).parents[1]
SOURCES = [p for name in ("avmae_fast", "kernels") for p in sorted((ROOT / name).rglob("*.py"))]

# Calls that run what they are given, by the last two parts of their name; eval and exec by one.
FORBIDDEN = {
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "shelve.open",
    "marshal.load", "marshal.loads", "joblib.load", "dill.load", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "eval", "exec", "compile",
}  # fmt: skip
IMPORTS = {"marshal", "shelve", "dill", "joblib", "yaml"}

# Distributed checkpoints have a pickle in them; the run refuses one unless it is named its own.
PICKLES_OF_ITS_OWN = {"avmae_fast/train/parts.py"}


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return ""


def _keyword(call: ast.Call, name: str) -> object:
    values = [k.value for k in call.keywords if k.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def _dangers(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            banned = IMPORTS if isinstance(node, ast.Import) else IMPORTS | {"pickle"}
            yield from (f"import {n}" for n in names if n and n.split(".")[0] in banned)
        if not isinstance(node, ast.Call):
            continue
        name = _name(node.func)
        if name in FORBIDDEN or name.startswith("pickle."):
            yield name
        if name == "torch.load" and _keyword(node, "weights_only") is not True:
            yield "torch.load without weights_only=True"
        if _keyword(node, "shell") not in (None, False):
            yield "shell"
        if name in ("np.load", "numpy.load") and _keyword(node, "allow_pickle"):
            yield "np.load(allow_pickle=True)"
        if name.startswith("dcp."):
            yield "distributed checkpoint"


def test_nothing_runs_what_it_reads() -> None:
    assert len(SOURCES) > 100
    for path in SOURCES:
        found = set(_dangers(ast.parse(path.read_text())))
        own = path.relative_to(ROOT).as_posix() in PICKLES_OF_ITS_OWN
        assert found <= ({"distributed checkpoint"} if own else set()), path


@pytest.mark.parametrize(
    ("code", "danger"),
    [
        ("torch.load(f)", "torch.load without weights_only=True"),
        ("torch.load(f, weights_only=False)", "torch.load without weights_only=True"),
        ("subprocess.run(x, shell=True)", "shell"),
        ("eval(x)", "eval"),
        ("pickle.loads(x)", "pickle.loads"),
        ("from pickle import load", "import pickle"),
        ("from yaml import load", "import yaml"),
        ("np.load(f, allow_pickle=True)", "np.load(allow_pickle=True)"),
    ],
)
def test_the_search_finds_them(code: str, danger: str) -> None:
    assert list(_dangers(ast.parse(code))) == [danger]
    assert not list(_dangers(ast.parse("torch.load(f, weights_only=True); model.eval()")))


@pytest.fixture
def run(tmp_path: Path) -> Config:
    """A folder of a run that has begun."""
    stack = {"width": 8, "layers": 2, "heads": 2, "mlp": 8}
    model = {"encoder": stack, "decoder": {**stack, "layers": 1}, "fusion_layers": 1}
    data, train = {"manifest": "clips.csv"}, {"out": str(tmp_path / "run"), "steps": 1}
    config = from_dict({"model": model, "data": data, "train": train})
    with open_run(config, None, False, 0):
        pass
    return config


@pytest.mark.parametrize(
    "name",
    [
        "run.lock", "run.json", ".partial-run.json", "metrics.jsonl", ".partial-metrics.jsonl",
        "bad_samples.jsonl", "checkpoints", "encoder", ".partial-report", "failed/step-00000001",
        "checkpoints/step-00000001", "checkpoints/.partial-step-00000001",
    ],
)  # fmt: skip
@pytest.mark.parametrize("restart", [False, True])
def test_links_in_a_run_are_refused(run: Config, tmp_path: Path, name: str, restart: bool) -> None:
    """One that somebody put there could have files elsewhere written over or deleted."""
    target = tmp_path / "precious"
    target.mkdir()
    (target / "file").write_text("precious")
    link = run.train.out / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(target / "file" if link.suffix else target)
    if name != "run.json":
        assert (run.train.out / "run.json").exists()
    with pytest.raises(RunFolderError, match="is a symbolic link"):
        find_resume_point(run, resume=False, restart=restart)
    assert (target / "file").read_text() == "precious" and len(list(target.iterdir())) == 1


def test_the_folder_of_a_run_may_be_a_link(run: Config, tmp_path: Path) -> None:
    out = run.train.out
    out.rename(tmp_path / "elsewhere")
    out.symlink_to(tmp_path / "elsewhere")
    assert find_resume_point(run, resume=False, restart=False) is None


@pytest.mark.parametrize("name", ["../../precious", "/etc/passwd", "parts/../../x", "step/.."])
def test_a_manifest_of_a_checkpoint_names_its_own_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / "step-00000001"
    path.mkdir()
    entry = {"size_bytes": 0, "crc32": "00000000"}
    files = {n: entry for n in ("model.safetensors", "optimizer.safetensors", "state.json", name)}
    for own in list(files)[:3]:
        (path / own).touch()
    (path / "MANIFEST.json").write_text(json.dumps({"format": 1, "files": files}))
    assert damage(path) == "MANIFEST.json names a file that is none of a checkpoint"


@pytest.mark.parametrize(
    "name", ["../x.tar", "/x.tar", "a/b.tar", "x\\y.tar", "x.tar\n", ".tar", 7]
)
def test_an_index_names_shards_beside_it(
    packed: Path, edit_index: Callable[[Path, str, object], None], name: object
) -> None:
    edit_index(packed, "name", name)
    with pytest.raises(ManifestError, match="is damaged: the header"):
        load_manifest(packed)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A folder of packed clips."""
    from avmae_fast.data.pack import pack
    from avmae_fast.data.pack_clips import PackOptions
    from avmae_fast.data.synth import synthesise

    clips = synthesise(tmp_path / "clips", clips=1, classes=1, seconds=1, size=32, fps=5, workers=1)
    pack(clips, tmp_path / "packed", PackOptions(), jobs=1)
    return tmp_path / "packed"


@pytest.fixture
def edit_index() -> Callable[[Path, str, object], None]:
    def edit(folder: Path, field: str, value: object) -> None:
        index = read_index(folder)
        index.header["shards"][0][field] = value
        (folder / "index.avmae").write_bytes(index.to_bytes())

    return edit


def test_values_reach_no_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that a shell would run is a path."""
    monkeypatch.chdir(tmp_path)
    for text in ("$(touch x)", "; touch x", "`touch x`", "| touch x"):
        manifest = tmp_path / "clips.csv"
        manifest.write_text(f"path\n{text}\n")
        (record,) = load_manifest(manifest)
        assert record.path == tmp_path / text
    assert os.listdir(tmp_path) == ["clips.csv"]
