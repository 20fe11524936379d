"""Candidates are timed in turn, forwards and backwards, on rotating inputs."""

import torch

from benchmarks import device as devices
from benchmarks import timing

CPU = torch.device("cpu")


def test_order_is_a_b_b_a() -> None:
    assert timing.abba(["a", "b"], 4) == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_inputs_rotate_and_quartiles_are_in_order() -> None:
    seen: dict[str, list[int]] = {"a": [], "b": []}
    calls = {name: seen[name].append for name in seen}
    found = timing.in_turn(calls, CPU, sets=3, rounds=2, sample_s=1e-5, warm_up_s=1e-5)
    for name, timed in found.items():
        assert seen[name][:3] == [0, 1, 2] and set(seen[name]) == {0, 1, 2}
        assert 0 < timed.minimum_s <= timed.lower_quartile_s <= timed.median_s
        assert timed.median_s <= timed.upper_quartile_s


def test_sets_exceed_the_cache(monkeypatch) -> None:
    monkeypatch.setattr(devices, "l2_bytes", lambda device: 60 * 2**20)
    assert timing.sets_beyond_cache(60 * 2**20, CPU) == 3
    assert timing.sets_beyond_cache(2**30, CPU) == 2
    assert timing.sets_beyond_cache(1, CPU) == 16


def test_names_become_folders() -> None:
    assert devices.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert devices.gpu_name(CPU) == "cpu"
    assert devices.state(CPU) == {} and devices.energy_j(CPU) is None
