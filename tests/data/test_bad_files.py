"""When the number of bad files stops a run."""

import pickle

import pytest

from avmae_fast.data.bad_files import BadFile, BadFiles, Substitution, TooManyBadFiles
from avmae_fast.data.clip import ClipError


def _bad(position, path="a.mp4", kind="decode"):
    return Substitution(position, path, kind, "broken")


def test_each_file_is_listed_once(caplog):
    bad_files = BadFiles(0.5)
    bad_files.add(8, [_bad(0), _bad(0, "b.mp4", "open"), _bad(5)])
    bad_files.add(8, [_bad(9)])
    assert bad_files.files == (
        BadFile("a.mp4", "decode", "broken", 3),
        BadFile("b.mp4", "open", "broken", 1),
    )
    assert bad_files.kinds == {"decode": 3, "open": 1}
    # Two files failed for the sample at position 0: it counts as one.
    assert (bad_files.samples, bad_files.bad_samples) == (16, 3)
    assert caplog.text.count("a.mp4: decode: broken; another clip takes its place") == 1


def test_stops_soon_when_many_are_bad():
    bad_files = BadFiles(0.01)
    bad_files.add(8, [_bad(position) for position in range(4)])  # too few to tell
    with pytest.raises(TooManyBadFiles, match=r"8 of 16 samples \(50.0%\).*fraction is 1.0%"):
        bad_files.add(8, [_bad(8 + position) for position in range(4)])


def test_does_not_stop_by_bad_luck():
    bad_files = BadFiles(0.01)
    # 1 % throughout, and up to twice as many in the first hundreds.
    for block in range(100):
        bad_files.add(100, [_bad(100 * block)])
        bad_files.add(0, [_bad(100 * block + 1)] if block in (0, 1, 3) else [])


def test_stops_when_slightly_too_many_are_bad_for_long():
    bad_files = BadFiles(0.01)
    with pytest.raises(TooManyBadFiles):
        for block in range(100):
            bad_files.add(100, [_bad(100 * block), _bad(100 * block + 1)])
    assert bad_files.samples < 3000


def test_none_allowed():
    BadFiles(0.0).add(1000, [])
    with pytest.raises(TooManyBadFiles, match="1 of 1000 samples"):
        BadFiles(0.0).add(1000, [_bad(7)])


def test_message_names_kinds_and_first_paths():
    bad_files = BadFiles(0.01)
    many = [_bad(i, f"{i}.mp4", "no_audio" if i % 2 else "open") for i in range(30)]
    with pytest.raises(TooManyBadFiles) as error:
        bad_files.add(40, many)
    text = str(error.value)
    assert "By kind: 15 no_audio, 15 open." in text
    assert "0.mp4 (open: broken); 1.mp4" in text and "and 20 more" in text
    assert "data.missing_audio = 'silence'" in text


def test_clip_error_survives_the_way_from_a_worker():
    error = pickle.loads(pickle.dumps(ClipError("open", "x.mp4", "no such\n  file")))
    assert (error.kind, error.path, error.detail) == ("open", "x.mp4", "no such file")
    assert str(error) == "x.mp4: open: no such file"
