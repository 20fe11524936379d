import json

import numpy as np
import pytest

from avmae_kernels import masking_reference
from benchmarks import harness, masking

QUICK = ["--batch", "2", "--repeats", "2"]


def test_writes_its_numbers_and_where_they_came_from(tmp_path, capsys):
    pytest.importorskip("avmae_kernels._C", reason="csrc/ is not built here")
    path = tmp_path / "masking.json"
    assert masking.main([*QUICK, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    printed = capsys.readouterr().out
    for name in ("us_per_clip", "ratio_vs_numpy", "ratio_vs_torch"):
        assert result[name] > 0
        assert name in printed
    assert result["versions"]["numpy"] == np.__version__
    assert {"date", "commit", "machine"} <= result.keys()
    assert [file.name for file in tmp_path.iterdir()] == ["masking.json"]


def test_the_draws_it_compares_are_masks():
    for draw in (masking.ours, masking.numpy_argsort, masking.torch_argsort):
        masking.check(draw.__name__, draw(3), 3)
    visible, masked, inverse = masking.ours(3)[0]
    swapped = masked.copy()
    swapped[:, :2] = masked[:, 1::-1]
    with pytest.raises(AssertionError, match="returned no masks"):
        masking.check("swapped", [(visible, swapped, inverse), masking.ours(3)[1]], 3)


def test_says_why_it_cannot_measure(monkeypatch, capsys):
    assert masking.main(["--batch", "0"]) == 2
    assert "error: --batch and --repeats want 1 or more, got 0" in capsys.readouterr().err
    monkeypatch.setattr(masking.masking, "implementation", lambda: masking_reference)
    assert masking.main(QUICK) == 2
    assert "error: avmae_kernels._C is not built" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "match"), [("", "is a folder"), ("absent/result.json", "does not exist")]
)
def test_unwritable_json_is_an_error_before_any_work(tmp_path, capsys, name, match):
    def measure(args):
        raise AssertionError("measured for nothing")

    assert harness.run(harness.parser("x"), measure, ["--json", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --json") and match in error


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    harness.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        harness.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_candidates_are_timed_in_turn():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    timings = harness.time_interleaved(candidates, repeats=3, sample_s=0)
    assert calls[-6:] == ["a", "b"] * 3
    for timing in timings.values():
        assert 0 <= timing.minimum_s <= timing.lower_quartile_s <= timing.median_s
        assert timing.median_s <= timing.upper_quartile_s
