"""The synthetic set: equal bytes, real media, impacts that are heard when they are seen."""

import csv
import json
from collections import Counter
from dataclasses import replace

import av
import numpy as np
import pytest

from avmae_fast.data import synth
from avmae_fast.data.manifest import load_manifest
from avmae_fast.data.synth import synthesise
from avmae_fast.data.synth_render import hsv_to_rgb, make_room, render
from avmae_fast.data.synth_scene import (
    GRAVITY,
    MATERIALS,
    MAX_CLASSES,
    Body,
    class_name,
    class_of,
    distracted,
    make_scene,
)
from avmae_fast.data.synth_sound import SAMPLE_RATE_HZ, impact_response, make_sound

SMALL = {"clips": 5, "classes": 4, "seed": 3, "seconds": 1.2, "size": 64, "workers": 1}
FRAMES = 30  # 1.2 s at 25 frames a second


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    out = tmp_path_factory.mktemp("synth") / "set"
    synthesise(out, **SMALL)
    return out


def _bytes(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def _rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _scenes(folder):
    return [json.loads(line) for line in (folder / "scenes.jsonl").read_text().splitlines()]


def _decode(path):
    """Frames [T, H, W, 3], their times, sound [L] in [-1, 1], and the time of its first sample."""
    with av.open(str(path)) as container:
        decoded = list(container.decode(video=0))
        frames = np.stack([f.to_ndarray(format="rgb24") for f in decoded])
        times_s = np.array([f.time for f in decoded])
    with av.open(str(path)) as container:
        decoded = list(container.decode(audio=0))
        sound = np.concatenate([f.to_ndarray()[0] for f in decoded])
    return frames, times_s, sound, decoded[0].time


def _onset_s(sound, impact):
    """When the sound first reaches a third of this impact's loudness."""
    return np.argmax(np.abs(sound) > impact["loudness"] / 3) / SAMPLE_RATE_HZ


def _rise(sound, time_s):
    """Energy of the 10 ms after a time over that of the 10 ms before, of the treble.

    In the bass a new impact may arrive out of phase with the ringing of the last one.
    """
    at, n = round(time_s * SAMPLE_RATE_HZ), SAMPLE_RATE_HZ // 100
    energy = np.square(np.diff(sound))
    return energy[at : at + n].sum() / energy[at - n : at].sum()


def _lag(sound, original):
    """Samples by which `sound` is late, where the two correlate best."""
    n = 2 * len(sound)
    spectrum = np.fft.rfft(sound, n) * np.conj(np.fft.rfft(original, n))
    lag = int(np.fft.irfft(spectrum, n).argmax())
    return lag - n if lag > n // 2 else lag


# ---- files


def test_bytes_do_not_depend_on_run_or_workers(small_set, tmp_path):
    for workers in (1, 2):
        synthesise(tmp_path / str(workers), **SMALL | {"workers": workers})
        assert _bytes(tmp_path / str(workers)) == _bytes(small_set)


def test_seed_and_clip_decide_the_bytes(small_set, tmp_path):
    synthesise(tmp_path / "seed", **SMALL | {"seed": 4})
    synthesise(tmp_path / "more", **SMALL | {"clips": 6})
    name = "clips/clip-00000.mp4"
    assert _bytes(tmp_path / "seed")[name] != _bytes(small_set)[name]
    assert _bytes(tmp_path / "more")[name] == _bytes(small_set)[name]
    assert len(set(_bytes(small_set / "clips").values())) == SMALL["clips"]


def test_clips_are_whole_h264_and_aac(small_set):
    for path in sorted((small_set / "clips").iterdir()):
        with av.open(str(path)) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            audio = container.streams.audio[0].codec_context
            assert (audio.name, audio.sample_rate, audio.channels) == ("aac", SAMPLE_RATE_HZ, 1)
            assert "creation_time" not in container.metadata
        frames, times_s, sound, first_sample_s = _decode(path)
        assert frames.shape == (FRAMES, 64, 64, 3)
        np.testing.assert_allclose(times_s, np.arange(FRAMES) / 25, atol=1e-4)
        assert first_sample_s == 0
        # AAC comes in frames of 1024 samples: the last one may run past the end, none is lost.
        assert 0 <= len(sound) - 1.2 * SAMPLE_RATE_HZ < 1024


def test_index_precedes_the_media(small_set):
    data = (small_set / "clips/clip-00000.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_long_clips_have_several_groups_of_pictures(tmp_path):
    synthesise(tmp_path / "set", clips=1, seconds=5.0, size=32, workers=1)
    with av.open(str(tmp_path / "set/clips/clip-00000.mp4")) as container:
        packets = [p for p in container.demux(video=0) if p.pts is not None]
    assert [float(p.pts * p.time_base) for p in packets if p.is_keyframe] == [0.0, 2.0, 4.0]
    assert any(p.pts != p.dts for p in packets[1:]), "no B-frame in 5 s"


def test_x264_runs_on_one_thread(tmp_path):
    # With more, the bytes would depend on the machine's processors. x264 writes its options into
    # the stream; frames smaller than this one get a single thread anyway.
    synthesise(tmp_path / "set", clips=1, seconds=1.0, size=128, fps=5, workers=1)
    data = (tmp_path / "set/clips/clip-00000.mp4").read_bytes()
    assert b" threads=1 lookahead_threads=1 " in data


def test_decoded_frames_are_the_rendered_ones_in_order(small_set):
    scene = make_scene(3, 1, 1, 1.2)
    rendered = render(scene, make_room(3, 1, 64), np.arange(FRAMES) / 25)
    frames, *_ = _decode(small_set / "clips/clip-00001.mp4")
    error = np.square(frames[:, None].astype(float) - rendered[None]).mean(axis=(2, 3, 4))
    np.testing.assert_array_equal(error.argmin(axis=1), np.arange(FRAMES))
    # 30 dB: what 4:2:0 colour costs at hard edges is above the loss at crf 20.
    assert np.diagonal(error).max() < 255**2 / 10**3


# ---- lists


def test_manifest_lists_balanced_classes(tmp_path):
    manifest = synthesise(
        tmp_path / "set", clips=18, classes=8, seconds=1.0, size=32, fps=10, workers=1
    )
    rows = _rows(manifest)
    assert manifest == tmp_path / "set/manifest.csv"
    assert list(rows[0]) == ["path", "label", "start", "end", "split"]
    counts = Counter(int(row["label"]) for row in rows)
    assert sorted(counts) == list(range(8)) and max(counts.values()) - min(counts.values()) == 1
    assert all((manifest.parent / row["path"]).is_file() for row in rows)
    assert {(row["start"], row["end"]) for row in rows} == {("0.0", "1.0")}
    for split, clips in (("train", 10), ("val", 8)):
        of_split = [{**row} for row in rows if row["split"] == split]
        for row in of_split:
            del row["split"]
        assert len(of_split) == clips
        assert _rows(manifest.parent / f"{split}.csv") == of_split
        assert len(load_manifest(manifest).select(split)) == clips
    names = (manifest.parent / "classes.txt").read_text().split("\n")[:-1]
    scenes = _scenes(manifest.parent)
    assert [scene["class"] for scene in scenes] == [names[int(row["label"])] for row in rows]
    assert [scene["path"] for scene in scenes] == [row["path"] for row in rows]


def test_each_class_shares_its_material_and_its_shape():
    assert len({class_name(label) for label in range(MAX_CLASSES)}) == MAX_CLASSES
    for word in (0, 1):
        counts = Counter(class_of(label)[word].name for label in range(8))
        assert sorted(counts.values()) == [2, 2, 2, 2]


# ---- physics


def _extent_below(shape, radius, angle):
    """From the centre of a body down to its lowest point, corners not rounded."""
    if not shape.turn:
        return radius
    wide, high = shape.half_width * radius, shape.half_height * radius
    return wide * np.abs(np.sin(angle)) + high * np.abs(np.cos(angle))


@pytest.mark.parametrize("label", range(0, 16, 3))
def test_bodies_stay_in_the_room_and_impacts_are_where_they_touch(label):
    scene = make_scene(1, label, label, 8.0)
    times_s = np.linspace(0, 8, 2000)
    for b, body in enumerate(scene.bodies):
        x, height, angle = body.at(times_s)
        below = _extent_below(scene.shape, body.radius, angle)
        centre = scene.shape.half_height * body.radius + height
        assert (centre - below).min() > -1e-9
        assert (centre + below).max() < body.floor
        reach = scene.shape.half_width * body.radius
        assert x.min() >= reach and x.max() <= 1 - reach
        hits = [impact for impact in scene.impacts if impact.body == b]
        assert hits
        x, height, angle = body.at(np.array([impact.time_s for impact in hits]))
        for i, impact in enumerate(hits):
            if impact.against == "floor":
                assert height[i] < 1e-9 and abs(angle[i]) < 1e-9
            else:
                assert min(x[i], 1 - x[i]) == pytest.approx(reach + 0.01)


def test_motion_between_impacts_is_free_fall():
    scene = make_scene(1, 0, 0, 4.0)
    impacts = [impact.time_s for impact in scene.impacts if impact.body == 0]
    start, end = next((a, b) for a, b in zip(impacts, impacts[1:], strict=False) if b - a > 0.4)
    t = np.linspace(start + 1e-6, end - 1e-6, 50)
    x, height, _ = scene.bodies[0].at(t)
    np.testing.assert_allclose(np.diff(height, 2), -GRAVITY * np.diff(t)[0] ** 2, rtol=1e-6)
    np.testing.assert_allclose(np.diff(x, 2), 0, atol=1e-12)


def test_impulse_is_the_change_of_speed():
    scene = make_scene(2, 5, 5, 6.0)
    for impact in scene.impacts:
        t = impact.time_s + np.array([-2e-5, -1e-5, 1e-5, 2e-5])
        x, height, _ = scene.bodies[impact.body].at(t)
        along = height if impact.against == "floor" else x
        speed_in, _, speed_out = np.diff(along) / np.diff(t)
        assert abs(speed_out - speed_in) == pytest.approx(impact.impulse, rel=1e-3)


def test_a_longer_clip_begins_with_the_shorter_one():
    short, long = make_scene(0, 2, 2, 2.0), make_scene(0, 2, 2, 6.0)
    assert long.impacts[: len(short.impacts)] == short.impacts
    assert len(long.impacts) > len(short.impacts)


def test_the_room_does_not_know_the_class():
    pictures = [make_room(0, i, 32).picture for i in range(2)]
    assert not np.array_equal(*pictures)
    # The class is not even an argument; what is drawn over the room stays near the bodies.
    for label in (0, 1):
        scene = make_scene(0, 0, label, 1.0)
        empty = replace(scene, bodies=())
        (frame,) = render(empty, make_room(0, 0, 32), np.zeros(1))
        np.testing.assert_array_equal(frame, (pictures[0] * 255 + 0.5).astype(np.uint8))


# ---- picture


def _still_body(x, floor, radius, hue=0.0):
    flights = np.array([[0.0, x, 0.0, 0.0, 0.0, 0.0, 0.0]])
    return Body(radius=radius, hue=hue, saturation=0.9, floor=floor, flights=flights)


@pytest.mark.parametrize("label", range(4))
def test_a_body_is_drawn_where_it_is(label):
    scene = make_scene(0, 0, label, 1.0)
    body = _still_body(x=0.62, floor=0.9, radius=0.15, hue=0.33)
    room = replace(make_room(0, 0, 128), picture=np.full((128, 128, 3), 0.5, np.float32))
    (frame,) = render(replace(scene, bodies=(body,)), room, np.zeros(1))
    green = frame[..., 1].astype(int) - frame[..., 0] > 40
    rows, columns = np.nonzero(green)
    shape = scene.shape
    expected = {
        "left": 0.62 - shape.half_width * 0.15,
        "right": 0.62 + shape.half_width * 0.15,
        "top": 0.9 - 2 * shape.half_height * 0.15,
        "bottom": 0.9,
    }
    found = {
        "left": columns.min() / 128,
        "right": (columns.max() + 1) / 128,
        "top": rows.min() / 128,
        "bottom": (rows.max() + 1) / 128,
    }
    # Half-covered pixels at the outline may fall on either side of the threshold.
    assert found == pytest.approx(expected, abs=2 / 128)


def test_hsv_to_rgb_knows_the_primaries():
    for hue, rgb in ((0, (1, 0, 0)), (1 / 3, (0, 1, 0)), (2 / 3, (0, 0, 1)), (1 / 6, (1, 1, 0))):
        np.testing.assert_allclose(hsv_to_rgb(hue, 1.0, 1.0), rgb, atol=1e-12)
    np.testing.assert_allclose(hsv_to_rgb(0.4, 0.0, 0.7), 0.7)


# ---- sound


def _clear_impacts(impacts, seconds, quiet_s=0.05):
    """Impacts of at least median loudness with no other within `quiet_s` before or after."""
    times = np.array([impact["time_s"] for impact in impacts])
    strong = np.median([impact["loudness"] for impact in impacts])
    for i, impact in enumerate(impacts):
        alone = np.abs(np.delete(times, i) - times[i]).min(initial=np.inf) > quiet_s
        if alone and impact["loudness"] >= strong and quiet_s < times[i] < seconds - quiet_s:
            yield impact


def test_impacts_are_heard_when_they_are_seen(tmp_path):
    manifest = synthesise(tmp_path / "set", clips=8, seconds=4.0, size=32, fps=10, workers=1)
    checked = 0
    for index, described in enumerate(_scenes(manifest.parent)):
        scene = make_scene(0, index, described["label"], 4.0)
        pcm = make_sound(0, index, scene, 4.0) / 32767
        _, _, sound, first_sample_s = _decode(manifest.parent / described["path"])
        # AAC delays the sound by 1024 samples; the file says so, and its reader undoes it.
        shift_s = _lag(sound, pcm) / SAMPLE_RATE_HZ + first_sample_s
        assert abs(shift_s) < 0.001, index
        first = described["impacts"][0]
        assert -0.0001 <= _onset_s(pcm, first) - first["time_s"] < 0.003, index
        # AAC spreads noise ahead of a sudden sound, by at most one frame of 64 ms.
        assert -0.04 <= _onset_s(sound, first) - first["time_s"] < 0.003, index
        for impact in _clear_impacts(described["impacts"], 4.0):
            assert _rise(pcm, impact["time_s"]) > 1.5, (index, impact)
            checked += 1
    assert checked >= 20


def test_each_impact_is_added_at_its_sample_with_its_loudness():
    scene = make_scene(0, 4, 4, 2.0)
    silent = make_sound(0, 4, replace(scene, impacts=()), 2.0).astype(int)
    for impact in scene.impacts[:-1]:
        alone = make_sound(0, 4, replace(scene, impacts=(impact,)), 2.0).astype(int)
        start = round(impact.time_s * SAMPLE_RATE_HZ)
        np.testing.assert_array_equal(alone[:start], silent[:start])
        added = np.abs(alone - silent) / 32767
        # Both sides are rounded to int16.
        assert added.max() == pytest.approx(impact.loudness, abs=2 / 32767)
        assert added[start : start + 3 * SAMPLE_RATE_HZ // 1000].max() > 0.3 * impact.loudness


def test_harder_impacts_are_louder():
    impacts = make_scene(0, 4, 4, 4.0).impacts
    by_impulse = sorted(impacts, key=lambda impact: impact.impulse)
    assert by_impulse == sorted(impacts, key=lambda impact: impact.loudness)
    assert by_impulse[0].loudness < 0.8 * by_impulse[-1].loudness


@pytest.mark.parametrize("material", MATERIALS, ids=lambda m: m.name)
def test_a_smaller_body_sounds_higher(material):
    def lowest_hz(radius):
        response = impact_response(material, radius, np.random.default_rng(0))
        spectrum = np.abs(np.fft.rfft(response, 1 << 16))
        bins = np.flatnonzero(spectrum > 0.5 * spectrum.max())
        first = bins[: np.argmax(np.diff(bins, append=len(spectrum)) > 10) + 1]
        return first.mean() * SAMPLE_RATE_HZ / (1 << 16)

    assert lowest_hz(0.07) == pytest.approx(2 * lowest_hz(0.14), rel=0.03)


# ---- resuming and refusing


def test_a_whole_set_is_left_alone(small_set, monkeypatch):
    monkeypatch.setattr(synth, "_write_clip", lambda *_: pytest.fail("a clip was made again"))
    before = {p: p.stat().st_mtime_ns for p in small_set.rglob("*")}
    calls = []
    synthesise(small_set, **SMALL, progress=lambda done, total: calls.append((done, total)))
    assert {p: p.stat().st_mtime_ns for p in small_set.rglob("*")} == before
    assert calls == [(5, 5)]


def test_whole_seconds_may_be_an_integer(tmp_path):
    for seconds in (1, 1.0):
        synthesise(tmp_path, clips=1, seconds=seconds, size=32, workers=1)


def test_a_half_written_set_is_finished(small_set, tmp_path, monkeypatch):
    out = tmp_path / "set"
    write_mp4, written = synth.write_mp4, []

    def fail_in_the_third(path, frames, pcm, **kwargs):
        if len(written) == 2:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        written.append(path)
        write_mp4(path, frames, pcm, **kwargs)

    monkeypatch.setattr(synth, "write_mp4", fail_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        synthesise(out, **SMALL)
    assert sorted(p.name for p in (out / "clips").glob("*.mp4")) == [
        "clip-00000.mp4",
        "clip-00001.mp4",
    ]
    assert not (out / "manifest.csv").exists()

    monkeypatch.setattr(synth, "write_mp4", write_mp4)
    calls = []
    synthesise(out, **SMALL, progress=lambda done, total: calls.append(done))
    assert calls == [2, 3, 4, 5]
    assert _bytes(out) == _bytes(small_set)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 9}, "seed = 3 there, 9 asked"),
        ({"clips": 6}, "clips = 5 there, 6 asked"),
        ({"seconds": 2.0}, "seconds = 1.2 there, 2.0 asked"),
    ],
)
def test_a_set_of_other_parameters_is_refused(small_set, change, named):
    before = _bytes(small_set)
    with pytest.raises(ValueError, match=named):
        synthesise(small_set, **SMALL | change)
    assert _bytes(small_set) == before


def test_a_set_of_another_version_is_refused(tmp_path):
    synthesise(tmp_path, **SMALL | {"clips": 1})
    record = json.loads((tmp_path / "synth.json").read_text())
    older = {**record, "version": 0, "digest": "of version 0"}
    (tmp_path / "synth.json").write_text(json.dumps(older))
    with pytest.raises(ValueError, match=f"version = 0 there, {record['version']} asked"):
        synthesise(tmp_path, **SMALL | {"clips": 1})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"clips": 0}, "clips = 0 is not valid: it must be an integer at least 1"),
        ({"clips": 2.0}, "clips = 2.0 is not valid"),
        ({"classes": 0}, r"classes = 0 is not valid: it must be an integer in 1\.\.16"),
        ({"classes": 17}, "classes = 17 is not valid"),
        ({"seed": -1}, "seed = -1 is not valid"),
        ({"seconds": 0.5}, r"seconds = 0.5 is not valid: it must be in 1\.0\.\.60\.0"),
        ({"seconds": float("nan")}, "seconds = nan is not valid"),
        ({"seconds": "4"}, "seconds = '4' is not valid"),
        ({"size": 65}, "size = 65 is not valid: it must be even"),
        ({"size": 16}, r"size = 16 is not valid: it must be an integer in 32\.\.1024"),
        ({"fps": 0}, "fps = 0 is not valid"),
        ({"workers": 0}, "workers = 0 is not valid"),
    ],
)
def test_rejects_bad_parameters_before_any_work(tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        synthesise(tmp_path / "set", **SMALL | change)
    assert not (tmp_path / "set").exists()


def test_rejects_a_folder_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "set"):
        with pytest.raises(ValueError, match="it must be a folder that can be written"):
            synthesise(out, **SMALL)
    assert (tmp_path / "file").read_text() == "mine"


def test_rejects_a_folder_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="it holds files but no synthetic set"):
        synthesise(tmp_path, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_rejects_a_damaged_record(tmp_path):
    (tmp_path / "synth.json").write_text("{")
    with pytest.raises(ValueError, match=r"synth\.json is damaged"):
        synthesise(tmp_path, **SMALL)


def test_distractors_mislead(tmp_path):
    """Other materials are heard from outside, colours differ, and nothing else does."""
    plain, hard = make_scene(3, 1, 1, 1.2), distracted(make_scene(3, 1, 1, 1.2), 3, 1, 1.2, 4)
    assert len(hard.distractors) == 4
    assert all(other.material is not hard.material for other in hard.distractors)
    assert hard.impacts == plain.impacts
    assert [body.radius for body in hard.bodies] == [body.radius for body in plain.bodies]
    assert hard.bodies[0].hue != plain.bodies[0].hue
    sounds = [make_sound(3, 1, scene, 1.2).astype(int) for scene in (plain, hard)]
    assert np.abs(sounds[1] - sounds[0]).max() > 300  # 1% of full scale
    # The same room noise and the same impacts lie under them.
    first = min(round(other.time_s * SAMPLE_RATE_HZ) for other in hard.distractors)
    assert (sounds[0][:first] == sounds[1][:first]).all()


def test_distractors_make_another_set(small_set, tmp_path):
    """Records of sets without them do not change; a set with them is another one."""
    assert "distractors" not in json.loads((small_set / "synth.json").read_text())
    hard = tmp_path / "hard"
    synthesise(hard, **SMALL, distractors=2)
    assert json.loads((hard / "synth.json").read_text())["distractors"] == 2
    assert len(_scenes(hard)[0]["distractors"]) == 2
    with pytest.raises(ValueError, match="distractors = 0 there, 2 asked"):
        synthesise(small_set, **SMALL, distractors=2)
    with pytest.raises(ValueError, match="distractors = 17 is not valid: .* 0..16"):
        synthesise(tmp_path / "other", **SMALL, distractors=17)
