"""Which assembler is taken, among some that only say what they are."""

from pathlib import Path

import pytest

from avmae_kernels import _ptxas

if not _ptxas.HAVE_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)


def _fake(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    path = folder / "ptxas"
    path.write_text(f"#!/bin/sh\necho '{text}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_ptxas.VARIABLE, raising=False)
    # Registered, so that what a test's choice sets is taken back.
    monkeypatch.setenv(_ptxas.VARIABLE, "")
    _ptxas.use_newest_ptxas.cache_clear()


@pytest.mark.parametrize(
    ("driver", "taken"), [((13, 0), "13.1"), ((14, 0), "14.0"), ((12, 4), None)]
)
def test_newest_that_the_driver_can_load(
    driver: tuple[int, int], taken: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    releases = ("11.0", "13.0", "13.1", "14.0")
    lines = {r: f"Cuda compilation tools, release {r}, V{r}.80" for r in releases}
    paths = [_fake(tmp_path / release, line) for release, line in lines.items()]
    paths += [_fake(tmp_path / "odd", "who knows"), tmp_path / "nowhere"]
    monkeypatch.setattr(_ptxas, "_candidates", lambda: iter(paths))
    monkeypatch.setattr(_ptxas, "_driver_release", lambda: driver)
    told = _ptxas.use_newest_ptxas()
    if taken is None:
        assert not _ptxas.os.environ[_ptxas.VARIABLE] and "triton" in told
    else:
        assert _ptxas.os.environ[_ptxas.VARIABLE] == str(tmp_path / taken / "ptxas")
        assert told.endswith(f"CUDA {taken}")


def test_a_choice_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_ptxas.VARIABLE, "/my/ptxas")
    assert "/my/ptxas" in _ptxas.use_newest_ptxas()
    assert _ptxas.os.environ[_ptxas.VARIABLE] == "/my/ptxas"


def test_the_bundled_one_says_its_release() -> None:
    bundled = Path(_ptxas.triton.__file__).parent / "backends/nvidia/bin/ptxas"
    release = _ptxas.release_of(bundled)
    assert release is not None and release >= (12, 0)
