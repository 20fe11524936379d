"""Damaged files fail with a `ClipError`, or read; the reader neither ends nor hangs."""

import pytest

from benchmarks import fuzz_media


def _assert_survived(result, count):
    assert result["files"] == count
    assert (result["hangs"], result["crashes"], result["untyped_errors"]) == (0, 0, {})
    assert result["ok"] + sum(result["failed"].values()) == count
    # Most damage is survived, much is not: the files are neither whole nor all rubbish.
    assert 0.3 * count < result["ok"] < 0.9 * count
    assert set(result["failed"]) <= {"open", "decode", "short", "no_audio", "no_video"}


def test_the_reader_survives_damaged_files():
    _assert_survived(fuzz_media.fuzz(200, "pyav", timeout_s=20.0), 200)


@pytest.mark.slow
def test_the_reader_survives_many_damaged_files():
    _assert_survived(fuzz_media.fuzz(10_000, "pyav", timeout_s=20.0), 10_000)


def test_a_file_is_the_same_every_time(tmp_path):
    originals = [bytes(range(256)) * 8, bytes(1000)] + [bytes(2000)] * 5
    files = [fuzz_media.damaged(originals, number) for number in range(140)]
    assert files == [fuzz_media.damaged(originals, number) for number in range(140)]
    assert sum(file != originals[i % 7] for i, file in enumerate(files)) > 100
    assert originals[1] == bytes(1000)


def test_errors_of_other_types_are_counted(monkeypatch):
    def careless(path, reader):
        raise AttributeError("no such thing")

    monkeypatch.setattr(fuzz_media, "open_clip", careless)
    result = fuzz_media.fuzz(7, "pyav", timeout_s=20.0, workers=0)
    assert result["untyped"] == 7
    assert result["untyped_errors"] == {"untyped: AttributeError: no such thing": 7}


def test_wants_files(capsys):
    assert fuzz_media.main(["--count", "0"]) == 2
    assert "--count wants 1 or more, got 0" in capsys.readouterr().err
