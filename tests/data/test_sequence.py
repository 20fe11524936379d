"""One sequence of samples, for any ranks, workers, micro-batches and from any position on."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from loader_cases import AUDIO, GOOD, ROWS, VIDEO, assert_same, make_config, take
from media import shown_index, truncate, write_clip

from avmae_fast.config import ConfigError
from avmae_fast.data.loader import ClipLoader

BATCH, STEPS = 8, 4
FIELDS = ("video", "waveform", "keys", "labels", "records", "has_audio")
SMALL_CROP = {"video": replace(VIDEO, height=32, width=48), "audio": AUDIO}


def _with_workers(config, workers):
    return replace(config, data=replace(config.data, workers=workers))


def _steps(config, world, first, last):
    """The samples of optimiser steps `first` to `last - 1`, put together from all ranks."""
    accumulate = config.train.accumulate
    micro_batches = (last - first) * accumulate
    ranks = [
        take(config, micro_batches, start=first * BATCH, rank=rank, world=world)
        for rank in range(world)
    ]
    assert all(len(batch) == BATCH // accumulate // world for rank in ranks for batch in rank)
    # A micro-batch of all ranks is theirs end to end.
    in_order = [batch for micro_batch in zip(*ranks, strict=True) for batch in micro_batch]
    joined = {name: torch.cat([getattr(b, name) for b in in_order]) for name in FIELDS}
    return joined, [bad for batch in in_order for bad in batch.substituted]


@pytest.fixture(scope="module")
def expected(clips):
    return _steps(make_config(clips, ROWS, batch=BATCH, flip=True, model=SMALL_CROP), 1, 0, STEPS)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_workers_and_micro_batches(clips, expected, world, workers, accumulate):
    """Stopped in mid-epoch (an epoch has ten samples) and resumed with other workers."""
    config = make_config(
        clips, ROWS, batch=BATCH, accumulate=accumulate, flip=True, model=SMALL_CROP
    )
    others = {0: 3, 1: 0, 3: 1}[workers]
    begun, bad = _steps(_with_workers(config, workers), world, 0, 2)
    resumed, bad_after = _steps(_with_workers(config, others), world, 2, STEPS)
    for name in FIELDS:
        assert torch.equal(torch.cat([begun[name], resumed[name]]), expected[0][name]), name
    assert bad + bad_after == expected[1] and bad and bad_after


def test_validation_over_ranks(clips):
    rows = [f"{row},val" for row in GOOD]
    config = make_config(clips, rows, header="path,label,split")
    parts = [take(config, 9, "val", rank=rank, world=2) for rank in range(2)]
    keys = [[batch.keys.tolist() for batch in part] for part in parts]
    assert keys == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7]]]


# --- repeated sampling


@pytest.mark.parametrize(("windows", "views"), [(2, 1), (1, 2), (2, 2)])
def test_repeated_sampling(clips, windows, views):
    repeat = windows * views
    config = make_config(
        clips, batch=8, repeat_windows=windows, repeat_views=views, flip=True, model=SMALL_CROP
    )
    batches = take(config, 5 * repeat)
    labels = torch.cat([batch.labels for batch in batches]).reshape(4, 10, repeat)
    assert (labels == labels[:, :, :1]).all()
    # A pass over the records is `repeat` times as many samples.
    assert all(sorted(one_pass.tolist()) == list(range(10)) for one_pass in labels[:, :, 0])
    waveforms = torch.cat([batch.waveform for batch in batches])
    waveforms = waveforms.reshape(-1, windows, views, waveforms.shape[-1])
    videos = torch.cat([batch.video for batch in batches])
    videos = videos.reshape(-1, windows, views, *videos.shape[1:])
    assert (waveforms == waveforms[:, :, :1]).all()  # views of a window have one sound
    if windows > 1:
        moved = (waveforms[:, 0, 0] != waveforms[:, 1, 0]).any(dim=1)
        assert moved.float().mean() > 0.8
    if views > 1:
        differ = (videos[:, :, 0] != videos[:, :, 1]).flatten(2).any(dim=2)
        assert differ.float().mean() > 0.9  # crop and flip are their own


def test_views_show_the_same_pictures(clips):
    config = make_config(clips, ["9.mov,0"], batch=4, repeat_views=4)
    for batch in take(config, 3):
        shown = [[shown_index(p.numpy()) for p in video] for video in batch.video]
        assert shown == [shown[0]] * 4
        assert batch.keys.diff().tolist() == [1, 1, 1]  # masks are drawn by the key


@pytest.mark.parametrize("workers", [0, 2])
def test_repeated_sampling_from_any_position(clips, workers):
    config = make_config(
        clips, ROWS, batch=8, repeat_windows=2, repeat_views=2, flip=True, model=SMALL_CROP
    )
    expected = take(config, 6)
    assert any(batch.substituted for batch in expected)
    there = _with_workers(config, workers)
    assert_same(take(there, 4, start=16), expected[2:])
    ranks = [take(there, 6, rank=rank, world=2) for rank in range(2)]
    joined = torch.cat([b.video for pair in zip(*ranks, strict=True) for b in pair])
    assert torch.equal(joined, torch.cat([batch.video for batch in expected]))
    # Cut in the middle of a record, and of a window.
    shifted = take(there, 2, start=11)
    assert torch.equal(shifted[0].video[:5], expected[1].video[3:])
    assert torch.equal(shifted[1].video[:5], expected[2].video[3:])


def test_samples_of_a_bad_record_have_one_substitute(clips):
    config = make_config(clips, [*GOOD[:5], "random.mp4,7"], batch=4, repeat_windows=4)
    batches = [batch for batch in take(config, 12) if batch.substituted]
    assert len(batches) == 2
    for batch in batches:
        assert [bad.position for bad in batch.substituted] == batch.keys.tolist()
        assert len(set(batch.labels.tolist())) == 1


def test_one_bad_window_costs_only_itself(clips):
    """The good start of a file that was cut off is used, the rest substituted."""
    truncate(write_clip(clips / "mostly.mp4", frames=100, size=(64, 64)), 0.6)
    config = make_config(clips, ["0.mov,0", "mostly.mp4,2"], batch=4, repeat_windows=4)
    labels = [batch.labels.tolist() for batch in take(config, 20)]
    assert any(sorted(set(group)) == [0, 2] for group in labels)


def test_batches_that_do_not_fit_the_repeats(clips):
    with pytest.raises(ConfigError, match="accumulate = 4 is not valid: .* a multiple of .* = 6"):
        make_config(clips, batch=8, accumulate=2, repeat_windows=3, repeat_views=2)
    config = make_config(clips, batch=8, repeat_windows=4)
    with pytest.raises(ConfigError, match="= 8 is not valid with 4 ranks: .* a multiple of 16"):
        ClipLoader(config, world=4)
    for name, value in (("timeout_s", 0.0), ("repeat_windows", 0), ("repeat_views", -1)):
        with pytest.raises(ConfigError, match=f"data.{name} = {value} is not valid.*positive"):
            make_config(clips, **{name: value})


# --- the life of a batch


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_are_kept_stay_as_they_are(clips, workers):
    config = make_config(clips, workers=workers)
    kept = take(config, 12)
    with ClipLoader(config) as loader:
        for batch, ours in zip(islice(loader, 12), kept, strict=True):
            assert_same([batch], [ours])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_used_where_it_was_filled(clips, workers):
    """No more memory than the ring has: nothing is copied for a loop that lets its batches go."""
    with ClipLoader(make_config(clips, workers=workers)) as loader:
        places = {batch.video.data_ptr() for batch in islice(loader, 40)}
        assert len(places) <= loader._ring.slots


@pytest.mark.parametrize("workers", [0, 2])
def test_iterations_that_are_left(clips, workers):
    config = make_config(clips, workers=workers)
    with ClipLoader(config) as loader:
        expected = list(islice(loader, 3))
        for left_after in (1, 0, 2, 1):
            assert_same(list(islice(loader, left_after)), expected[:left_after])
        assert_same(list(islice(loader, 3)), expected)
