"""A batch is kept until the GPU has read it, and its inputs do not depend on who else is there."""

import json
import weakref

import pytest
import torch

from avmae_fast.data.loader import ClipLoader
from avmae_fast.train.inputs import InFlight, InputStage


class Event:
    """A copy that ends when it is told to, or when somebody waits for it."""

    def __init__(self):
        self.done = self.waited_for = False

    def query(self):
        return self.done

    def synchronize(self):
        self.done = self.waited_for = True


class Memory:
    """Stands for a batch: what counts is whether somebody keeps it."""


def test_kept_until_its_copy_is_done():
    flights, event, memory = InFlight(), Event(), Memory()
    alive = weakref.ref(memory)
    flights.add(event, memory)
    del memory
    assert alive() is not None and len(flights) == 1
    event.done = True
    later = Event()
    flights.add(later, Memory())
    assert alive() is None and len(flights) == 1 and not later.waited_for


def test_no_more_than_the_loader_lends():
    flights, events = InFlight(most=2), [Event() for _ in range(4)]
    for event in events:
        flights.add(event, Memory())
    assert [event.waited_for for event in events] == [True, True, False, False]
    assert len(flights) == 2


def test_ends_in_order():
    flights, first, second = InFlight(), Event(), Event()
    second.done = True
    flights.add(first, Memory())
    flights.add(second, Memory())
    assert len(flights) == 2
    first.done = True
    flights.add(Event(), Memory())
    assert len(flights) == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_ahead_gives_every_batch_in_order(make_config, device):
    config = make_config(train={"device": device})
    stage = InputStage(config, torch.device(device))
    with ClipLoader(config, "val") as clips:
        expected = [stage(batch) for batch in clips]
        expected = [{m: inputs[m].clone() for m in ("video", "audio")} for inputs in expected]
        got = list(stage.ahead(iter(clips)))
    assert len(got) == len(expected) > 0
    for ours, theirs in zip(got, expected, strict=True):
        assert ours["video"].device.type == device
        for m in ("video", "audio"):
            assert torch.equal(ours[m], theirs[m])


def test_files_that_hung_stay_excluded(tmp_path):
    from avmae_fast.train.run_folder import files_to_exclude

    lines = [
        (3, "a.mp4", "timeout"),
        (5, "b.mp4", "decode"),
        (6, "c.mp4", "crash"),
        (9, "d.mp4", "timeout"),
    ]
    text = "".join(
        json.dumps({"position": p, "path": path, "kind": kind, "detail": "why"}) + "\n"
        for p, path, kind in lines
    )
    (tmp_path / "bad_samples.jsonl").write_text(text)
    # What is not a function of the bytes is remembered, up to where the run goes on from.
    expected = {"a.mp4": ("timeout", "why"), "c.mp4": ("crash", "why")}
    assert files_to_exclude(tmp_path, 9) == expected
    assert files_to_exclude(tmp_path, 0) == files_to_exclude(tmp_path / "none", 9) == {}
