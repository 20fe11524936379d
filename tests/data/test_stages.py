"""Time goes to the stage that is on, and a stage inside another pauses it."""

import time

import pytest

from avmae_fast.data.stages import STAGES, stage, take_seconds


def _wait(seconds):
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        pass


def test_stages_exclude_each_other():
    take_seconds()
    began_s = time.perf_counter()
    with stage("decode"):
        _wait(0.01)
        with pytest.raises(ValueError), stage("convert"):
            _wait(0.02)
            raise ValueError
        _wait(0.01)
    seconds = dict(zip(STAGES, take_seconds(), strict=True))
    whole_s = time.perf_counter() - began_s
    assert 0.02 <= seconds["decode"] and 0.02 <= seconds["convert"]
    assert sum(seconds.values()) <= whole_s
    assert seconds["sound"] == 0.0
    # What was taken is not counted again.
    assert sum(take_seconds()) < whole_s
