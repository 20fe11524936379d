"""`avmae bench-data`: a row for each combination, and what is asked for wrongly."""

import pytest
from loader_cases import AUDIO, GOOD, VIDEO, make_config

from avmae_fast.cli import main
from avmae_fast.data import bench

FAST = ("--config", "demo", "--set", "data.short_side=64", "--clips", "8", "--workers", "1")


def test_measures_every_combination(clips):
    config = make_config(clips, [*GOOD[:4], "random.mp4,7"], model={"video": VIDEO, "audio": AUDIO})
    # On a machine that does other things too, a single measurement may be anything.
    for _ in range(5):
        rows = _measure(config)
        if rows[1].ms["open"] < rows[0].ms["open"] and all(map(_adds_up, rows)):
            return
    pytest.fail(f"opening is not shared by the windows of a record, or times do not add up: {rows}")


def _adds_up(row):
    """A worker is busy at most all of the time, up to what was on its way when it began."""
    busy_ms = sum(ms for name, ms in row.ms.items() if name not in ("queue", "mask"))
    return busy_ms < 1.5 * 1e3 * row.workers / row.clips_per_s


def _measure(config):
    rows = list(bench.measure(config, readers=["pyav"], workers=[1, 2], repeats=[1, 4], clips=64))
    assert [(row.workers, row.repeat) for row in rows] == [(1, 1), (1, 4), (2, 1), (2, 4)]
    for row in rows:
        assert row.clips >= 64 and row.bad > 0 and row.clips_per_s > 0
        assert set(row.ms) == set(bench.COLUMNS)
        assert all(row.ms[name] > 0 for name in ("open", "decode", "convert", "sound", "copy"))
        assert row.cores(1000) == row.cpu_ms
    return rows


def test_prints_a_table(clips, capsys):
    manifest = make_config(clips).data.manifest
    argv = ("bench-data", str(manifest), *FAST, "--repeats", "1,2", "--clips-per-s", "500")
    assert main(argv) == 0
    header, one, two, *advice = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["reader", "workers", "repeat", "clips/s"]
    assert one.split()[:3] == ["pyav", "1", "1"] and two.split()[:3] == ["pyav", "1", "2"]
    assert len(one) == len(header)
    assert advice[0].startswith("500 clips/s with pyav, one window a record: ")
    assert advice[1].startswith("500 clips/s with pyav, 2 windows a record: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--workers", "0"), "--workers 0 is not valid"),
        (("--repeats", "1,x"), "--repeats 1,x is not valid"),
        (("--clips", "0"), "--clips 0 is not valid"),
        (("--clips-per-s", "-1"), "--clips-per-s -1.0 is not valid"),
        (("--readers", "vlc"), "reader = 'vlc' is not valid"),
    ],
)
def test_bad_options(clips, capsys, options, message):
    manifest = make_config(clips).data.manifest
    assert main(("bench-data", str(manifest), *FAST, *options)) == 2
    assert message in capsys.readouterr().err


def test_files_that_no_reader_can_read(clips, caplog):
    config = make_config(clips, ["random.mp4,1"])
    assert not list(bench.measure(config, readers=["pyav"], workers=[1], repeats=[1], clips=8))
    assert "no figures for pyav: 1 records in a row could not be read" in caplog.text
