"""The memory of a worker does not grow with the samples it has read."""

from itertools import islice

import pytest
from loader_cases import ROWS, make_config

from avmae_fast.data.loader import ClipLoader
from benchmarks.loader import private_mib


@pytest.mark.parametrize("samples", [600, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_worker_stays_as_it_is(clips, samples):
    config = make_config(clips, ROWS, batch=20, workers=1, flip=True)
    with ClipLoader(config) as loader:
        batches = iter(loader)
        for _ in islice(batches, 10):  # every file has been read, every slot used
            pass
        (pid,) = loader.worker_pids
        sizes = [private_mib(pid)]
        for _ in islice(batches, samples // 20):
            sizes.append(private_mib(pid))
    assert max(sizes) - min(sizes) < 5
