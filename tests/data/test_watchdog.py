"""Readers that hang or crash cost their own file; workers that die are replaced."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from itertools import islice
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from hanging import HangingClips, HangingJob, never_start
from loader_cases import AUDIO, GOOD, VIDEO, assert_same, make_config, take

from avmae_fast.data import loader as loader_module
from avmae_fast.data import workers as workers_module
from avmae_fast.data.bad_files import TooManyBadFiles
from avmae_fast.data.loader import ClipLoader
from avmae_fast.data.workers import LoaderStalled, WorkersDied

# Long enough for any good file on a busy machine.
TIMEOUT_S = 2.0


@pytest.fixture
def misbehaving(clips, monkeypatch):
    """The folder of clips, with some on which the loader's job does what their names say."""
    for name in ("hangs", "crashes", "raises", "crashes_once"):
        shutil.copy(clips / "9.mov", clips / f"{name}.mov")
    (clips / "crashes_once.crashed").unlink(missing_ok=True)
    monkeypatch.setattr(loader_module, "LoadJob", HangingJob)
    return clips


def _config(folder, *names, **data):
    rows = [*GOOD[:5], *(f"{name}.mov,9" for name in names)]
    return make_config(folder, rows, **({"workers": 2, "timeout_s": TIMEOUT_S} | data))


def _positions_of(config, path):
    """The positions below 24 at which a file is due."""
    with ClipLoader(config) as loader:
        number = [record.path.name for record in loader.manifest].index(path)
        groups = loader._order.groups(0, 24)
    return {group.first for group in groups if group.record == number}


@pytest.mark.parametrize(("name", "kind"), [("hangs", "timeout"), ("crashes", "crash")])
def test_a_bad_reader_costs_only_its_file(misbehaving, caplog, name, kind):
    config = _config(misbehaving, name)
    before = set(active_children())
    with ClipLoader(config) as loader:
        batches = list(islice(loader, 6))
        (file,) = loader.bad_files.files
        assert len(set(active_children()) - before) == 2
    due = _positions_of(config, f"{name}.mov")
    assert {bad.position for batch in batches for bad in batch.substituted} == due
    assert len(due) == 4 and file.count == 4
    assert file.path.endswith(f"{name}.mov") and file.kind == kind
    if kind == "timeout":
        assert "within data.timeout_s = 2 s" in file.detail
    else:
        assert "crashed (SIGSEGV), 2 times" in file.detail
        assert re.search(
            r"loader worker \d crashed \(SIGSEGV\) while it read .*crashes", caplog.text
        )
    # As if it had been known from the start, with any workers: the rule knows no others.
    why = {file.path: (file.kind, file.detail)}
    known = take(make_config(misbehaving, [*GOOD[:5], f"{name}.mov,9"]), 6, excluded=why)
    assert_same(batches, known)
    assert set(active_children()) <= before


def test_hanging_is_the_same_for_any_ranks_and_after_a_resume(misbehaving):
    config = _config(misbehaving, "hangs")
    whole = take(config, 6)
    assert_same(take(_config(misbehaving, "hangs", workers=1), 3, start=12), whole[3:])
    ranks = [take(config, 6, rank=rank, world=2) for rank in range(2)]
    joined = torch.cat([b.video for pair in zip(*ranks, strict=True) for b in pair])
    assert torch.equal(joined, torch.cat([batch.video for batch in whole]))


def test_an_innocent_file_is_read_again(misbehaving, caplog):
    """As when the system ends a worker because memory ran out: not a sample is lost or changed."""
    batches = take(_config(misbehaving, "crashes_once"), 6)
    assert "was killed (SIGKILL), as the system does when memory runs out" in caplog.text
    assert "does its work again" in caplog.text
    assert_same(batches, take(_config(misbehaving, "crashes_once", workers=0), 6))
    assert not any(batch.substituted for batch in batches)


def test_workers_killed_from_outside(clips):
    config = make_config(clips, workers=2)
    expected = take(make_config(clips), 12)
    before = set(active_children())
    with ClipLoader(config) as loader:
        batches = []
        for number, batch in enumerate(islice(loader, 12)):
            batches.append(batch)
            if number in (1, 2, 5):
                victim = sorted(set(active_children()) - before, key=lambda p: p.pid)[0]
                os.kill(victim.pid, signal.SIGKILL)
    assert_same(batches, expected)


def test_deaths_without_end_stop_the_run(misbehaving, monkeypatch):
    monkeypatch.setattr(workers_module, "MAX_DEATHS", 1)
    before = set(active_children())
    text = r"2 loader workers died within an hour, .* \(SIGSEGV\) while it read .*crashes.mov"
    with pytest.raises(WorkersDied, match=text):
        take(_config(misbehaving, "crashes"), 6)
    assert set(active_children()) <= before


def test_hangs_count_as_bad_samples(misbehaving):
    with pytest.raises(TooManyBadFiles, match="By kind: 1 timeout"):
        take(_config(misbehaving, "hangs", max_bad_fraction=0.0), 6)


def test_workers_that_do_not_start(clips, monkeypatch):
    monkeypatch.setattr(workers_module, "START_S", 0.5)
    monkeypatch.setattr(workers_module, "_work", never_start)
    before = set(active_children())
    with pytest.raises(LoaderStalled, match="nothing came from loader worker 0 .* did not start"):
        take(make_config(clips, workers=1), 1)
    assert set(active_children()) <= before


def test_a_stopped_worker_is_replaced(clips):
    config = make_config(clips, workers=1, timeout_s=TIMEOUT_S)
    before = set(active_children())
    with ClipLoader(config) as loader:
        batches = iter(loader)
        first = [next(batches)]
        (worker,) = set(active_children()) - before
        time.sleep(1)  # then it has nothing to read: a stop in a read is taken for a hang
        os.kill(worker.pid, signal.SIGSTOP)
        first += islice(batches, 9)
    assert_same(first, take(make_config(clips), 10))


def test_whoever_waits_is_told_what_for(misbehaving, monkeypatch, caplog):
    monkeypatch.setattr(workers_module, "TELL_AFTER_S", 0.2)
    with caplog.at_level(logging.WARNING):
        take(_config(misbehaving, "hangs", timeout_s=2.0, workers=1), 6)
    assert re.search(r"no data for \d s: worker 0 reads .*hangs.mov for \d s", caplog.text)


def test_the_mistakes_of_a_worker_arrive(misbehaving):
    loader = ClipLoader(_config(misbehaving, "raises"))
    with pytest.raises(KeyError, match="a mistake of ours") as raised:
        list(islice(loader, 6))
    with pytest.raises(ValueError, match="the loader is closed"):
        iter(loader)
    assert "in _misbehave" in raised.value.__notes__[0]


def test_the_cache_survives_a_hang(misbehaving, monkeypatch):
    from avmae_fast.data import cache as cache_module

    monkeypatch.setattr(cache_module, "_WholeClips", HangingClips)
    batches = take(_config(misbehaving, "hangs", cache="ram"), 6)
    assert {bad.kind for batch in batches for bad in batch.substituted} == {"timeout"}


def _run_and_kill(clips, tmp_path, rows):
    """A training process with two workers that ends by SIGKILL; the workers' process ids."""
    config = make_config(clips, rows)
    script = tmp_path / "script.py"
    text = f"""
        import os, signal, time
        from multiprocessing import active_children
        from pathlib import Path
        from hanging import HangingClips, HangingJob, never_start
        from avmae_fast.config import *
        from avmae_fast.data import loader as loader_module
        config = Config(
            model=ModelConfig.of_size("Ti", video={VIDEO!r}, audio={AUDIO!r}),
            data=DataConfig(manifest=Path({str(config.data.manifest)!r}), short_side=64, workers=2),
            train=TrainConfig(out=Path("."), batch=4, steps=1),
        )
        if __name__ == "__main__":
            loader_module.LoadJob = HangingJob
            loader = loader_module.ClipLoader(config)
            batches = iter(loader)
            next(batches)
            time.sleep(1)
            print(*[worker.pid for worker in active_children()], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        """
    script.write_text(textwrap.dedent(text))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return [int(pid) for pid in done.stdout.split()]


def test_a_killed_run_leaves_nothing_behind(misbehaving, tmp_path):
    """Neither workers, one of which hangs in C, nor shared memory."""
    there = set(os.listdir("/dev/shm"))
    # Its third batch holds one that hangs, which a worker meets while the first is trained on.
    rows = [*GOOD[:5], "hangs.mov,9", *GOOD[4:]]
    pids = _run_and_kill(misbehaving, tmp_path, rows)
    assert len(pids) == 2
    deadline_s = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline_s, "a worker outlived the run"
        time.sleep(0.05)
    assert set(os.listdir("/dev/shm")) <= there
