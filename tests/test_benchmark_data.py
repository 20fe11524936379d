"""The data benchmark runs, and every way to read gives the same windows."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data, harness


@pytest.mark.slow
def test_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    pytest.importorskip("webdataset")
    monkeypatch.setattr(data, "_SAMPLE_S", 1e-6)
    path = tmp_path / "data.json"
    assert data.main(["--clips", "2", "--rounds", "1", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["ratio_raw_pyav"] == 1.0
    assert result["ratio_h264"] > 2 and result["ratio_mjpeg"] > 2
    # Another conversion to RGB and another resampler, of the same pictures and sound.
    assert result["difference_webdataset"] < 2


def test_other_windows_are_refused() -> None:
    video, sound = np.full((2, 4, 4, 3), 100, np.uint8), np.full(10, 1000, np.int16)
    wanted = [(video, sound)]
    assert data.check("same", [(video + 1, sound)], wanted) == 1.0
    for name, window in {
        "dark": (video // 2, sound),
        "quiet": (video, sound // 2),
        "small": (video[:1], sound),
    }.items():
        with pytest.raises(harness.BenchmarkError, match=f"{name} gives"):
            data.check(name, [window], wanted)
