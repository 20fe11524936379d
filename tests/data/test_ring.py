"""Slots of the ring: no slot is used twice at a time, and each is free again when it can be."""

import gc
import threading

import numpy as np
import pytest
import torch

from avmae_fast.data.ring import Layout, Ring, Slots

LAYOUT = Layout(batch=3, frames=2, picture=(5, 7, 3), samples=11)


def test_a_slot_goes_round():
    slots = Slots(2)
    assert (slots.take(), slots.take(), slots.take()) == (0, 1, None)
    slots.filled(0)
    slots.lend(0)
    assert slots.take() is None and slots.state(0) == "lent"
    slots.give_back(0)
    assert slots.state(0) == "free" and slots.count("filling") == 1
    assert slots.take() == 0
    slots.drop(1)
    assert slots.take() == 1


@pytest.mark.parametrize(
    ("steps", "wrong", "message"),
    [
        ((), "filled", "slot 0 is free: filled follows filling"),
        (("take",), "lend", "slot 0 is filling: lent follows filled"),
        (("take", "filled"), "filled", "slot 0 is filled: filled follows filling"),
        (("take", "filled", "lend"), "drop", "slot 0 is lent: only one in filling"),
        ((), "drop", "slot 0 is free"),
    ],
)
def test_wrong_turns(steps, wrong, message):
    slots = Slots(1)
    for step in steps:
        slots.take() if step == "take" else getattr(slots, step)(0)
    with pytest.raises(ValueError, match=message):
        getattr(slots, wrong)(0)


def test_a_slot_that_was_not_lent_cannot_come_back():
    slots = Slots(1)
    slots.give_back(0)
    with pytest.raises(ValueError, match="slot 0 is free: free follows lent"):
        slots.take()


def test_slots_come_back_from_any_thread():
    slots = Slots(64)
    for slot in range(64):
        slots.take(), slots.filled(slot), slots.lend(slot)
    threads = [
        threading.Thread(target=lambda i=i: [slots.give_back(s) for s in range(i, 64, 4)])
        for i in range(4)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert slots.count("free") == 64


def test_arrays_do_not_overlap():
    ring = Ring(LAYOUT, 3)
    for slot in range(3):
        arrays = ring.arrays(slot)
        for number, name in enumerate(("video", "waveform", "labels", "has_audio")):
            getattr(arrays, name)[...] = 10 * slot + number
    for slot in range(3):
        arrays = ring.arrays(slot)
        for number, name in enumerate(("video", "waveform", "labels", "has_audio")):
            assert (getattr(arrays, name) == 10 * slot + number).all()
        assert arrays.video.shape == (3, 2, 5, 7, 3) and arrays.waveform.shape == (3, 11)
        assert arrays.waveform.ctypes.data % 64 == arrays.labels.ctypes.data % 64 == 0
    assert ring.size == 3 * LAYOUT.size and LAYOUT.size % 4096 == 0


def test_a_batch_is_the_slot_and_frees_it_with_its_last_tensor():
    ring, slots = Ring(LAYOUT, 1), Slots(1)
    arrays = ring.arrays(slots.take())
    slots.filled(0)
    slots.lend(0)
    video, waveform = ring.tensors(0, slots)
    arrays.video[...] = np.arange(arrays.video.size).reshape(arrays.video.shape) % 251
    arrays.waveform[...] = -7
    assert torch.equal(video, torch.from_numpy(arrays.video.copy()))  # written after: not a copy
    assert video.dtype == torch.uint8 and waveform.dtype == torch.int16
    assert (waveform == -7).all()
    part = video[1:, 0].permute(0, 3, 1, 2)
    del video, waveform
    gc.collect()
    assert slots.state(0) == "lent"
    del part
    gc.collect()
    assert slots.state(0) == "free"


def test_without_a_modality():
    ring = Ring(Layout(2, 0, (0, 0, 3), 5), 2)
    assert ring.arrays(1).video.size == 0 and ring.arrays(1).waveform.shape == (2, 5)
    assert Ring(Layout(2, 1, (4, 4, 3), 0), 1).arrays(0).waveform.size == 0
