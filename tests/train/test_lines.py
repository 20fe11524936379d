"""Lines are appended, cut back, and read again; damage in the middle is told, a torn end is not."""

from pathlib import Path

import pytest

from avmae_fast.train.lines import LinesError, append_lines, cut_lines, read_lines


def _file(tmp_path: Path, *more: bytes) -> Path:
    path = tmp_path / "metrics.jsonl"
    append_lines(path, ({"step": step} for step in (1, 2, 3)))
    path.write_bytes(path.read_bytes() + b"".join(more))
    return path


def test_cut_back(tmp_path: Path) -> None:
    path = _file(tmp_path)
    cut_lines(path, "step", 2)
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    cut_lines(tmp_path / "absent.jsonl", "step", 2)
    assert read_lines(tmp_path / "absent.jsonl") == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", [b'{"step"', b"\0\0\0", b"\xff", b'{"step": 1' + b"0" * 5000])
def test_a_torn_end_is_left_out(tmp_path: Path, torn: bytes) -> None:
    path = _file(tmp_path, torn)
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
    cut_lines(path, "step", 3)
    assert path.read_bytes().endswith(b'{"step": 3}\n')


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"step"', "line 4 is not JSON"),
        (b"\xff", "line 4 is not JSON"),
        (b"[" * 100_000, "line 4 is not JSON"),
        (b"[1]", "line 4 has no 'step' as it was written"),
        (b'{"Step": 1}', "line 4 has no 'step'"),
        (b'{"step": "1"}', "line 4 has no 'step'"),
    ],
)
def test_damage_is_told_and_left_as_it_is(tmp_path: Path, line: bytes, message: str) -> None:
    path = _file(tmp_path, line, b'\n{"step": 5}\n')
    before = path.read_bytes()
    with pytest.raises(LinesError, match=f"metrics.jsonl, {message}.*: repair the file"):
        cut_lines(path, "step", 2)
    assert path.read_bytes() == before
