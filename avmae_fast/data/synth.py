"""A synthetic audiovisual set of real media files, in which what is seen causes what is heard.

Bodies of some material and shape fall, bounce and hit the walls of a room; each impact sounds at
its true time, louder when harder, lower when the body is larger. Out comes a folder

    manifest.csv            path,label,start,end,split: every clip, paths relative to the folder
    train.csv, val.csv      path,label,start,end: the same by split; a quarter of each class is val
    classes.txt             one class name a line, line number = label
    scenes.jsonl            per clip: class, bodies, and time and loudness of every impact
    synth.json              the parameters and their digest
    clips/clip-00000.mp4    H.264 and AAC

With `distractors` the set is harder: see `synthesise`.

Equal parameters give equal bytes on one machine, for any number of workers: every random number
is keyed by (seed, clip index).
"""

import csv
import hashlib
import io
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from avmae_fast.data.synth_encode import write_mp4
from avmae_fast.data.synth_render import make_room, render
from avmae_fast.data.synth_scene import MAX_CLASSES, Scene, class_name, distracted, make_scene
from avmae_fast.data.synth_sound import SAMPLE_RATE_HZ, make_sound

# Raised whenever equal parameters would give other clips, so that sets are not mixed.
_VERSION = 1

_SECONDS = (1.0, 60.0)
_SIZES = (32, 1024)
_FPS = (5, 120)
_DISTRACTORS = (0, 16)

# What a record that does not speak of a parameter means.
_ABSENT = {"distractors": 0}


@dataclass(frozen=True, kw_only=True)
class _Parameters:
    """What decides the bytes of a set. Checked on creation."""

    clips: int
    classes: int
    seed: int
    seconds: float
    size: int
    fps: int
    distractors: int = 0
    version: int = _VERSION

    def __post_init__(self) -> None:
        _require_int("clips", self.clips, 1, None)
        _require_int("classes", self.classes, 1, MAX_CLASSES)
        _require_int("seed", self.seed, 0, None)
        _require_int("size", self.size, *_SIZES)
        _require_int("fps", self.fps, *_FPS)
        _require_int("distractors", self.distractors, *_DISTRACTORS)
        if self.size % 2:
            raise ValueError(f"size = {self.size} is not valid: it must be even (4:2:0 colour)")
        low, high = _SECONDS
        ok = isinstance(self.seconds, int | float) and not isinstance(self.seconds, bool)
        if not (ok and low <= self.seconds <= high):
            raise ValueError(
                f"seconds = {self.seconds!r} is not valid: it must be in {low}..{high}"
            )
        object.__setattr__(self, "seconds", float(self.seconds))  # 4 and 4.0 are one set

    def recorded(self) -> dict[str, int | float]:
        """All of it, as synth.json has it: sets without distractors do not speak of them."""
        fields = asdict(self)
        if not self.distractors:
            del fields["distractors"]
        return fields

    @property
    def digest(self) -> str:
        text = json.dumps(self.recorded(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def end_s(self) -> float:
        """Length of every clip: a whole number of frames."""
        return round(self.seconds * self.fps) / self.fps

    def label(self, index: int) -> int:
        return index % self.classes

    def split(self, index: int) -> str:
        return "val" if index // self.classes % 4 == 1 else "train"

    def scene(self, index: int) -> Scene:
        scene = make_scene(self.seed, index, self.label(index), self.end_s)
        if not self.distractors:
            return scene
        return distracted(scene, self.seed, index, self.end_s, self.distractors)


def synthesise(
    out_dir: str | os.PathLike[str],
    *,
    clips: int,
    classes: int = 8,
    seed: int = 0,
    seconds: float = 4.0,
    size: int = 128,
    fps: int = 25,
    distractors: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a synthetic set to `out_dir` and return the path of its manifest.

    A finished set of the same parameters is left as it is, a half-written one is finished: a file
    under its own name is always whole.

    Args:
        out_dir: a folder that is absent, empty, or holds a set of the same parameters.
        clips: how many; clip i is of class `i % classes`.
        classes: 1..16. Up to 4 share neither material nor shape; 8 share each with one other.
        seed: at least 0.
        seconds: length of a clip, 1..60, rounded to whole frames.
        size: height and width in pixels, even, 32..1024.
        fps: frames a second, 5..120.
        distractors: sounds from outside the picture in each clip, 0..16, none of them of the clip's
            material. With any, colours tell shapes apart less surely too.
        workers: processes; by default one for each processor this process may use. 1 works in
            this process. More need the caller's script to guard its entry point (they are spawned).
        progress: called with (clips done, clips) once at the start and after each clip.

    Raises:
        ValueError: a parameter is out of range, `out_dir` cannot be written, holds something else,
            or holds a set of other parameters. Nothing is written then.
    """
    parameters = _Parameters(
        clips=clips,
        classes=classes,
        seed=seed,
        seconds=seconds,
        size=size,
        fps=fps,
        distractors=distractors,
    )
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    _require_int("workers", workers, 1, None)
    out = Path(out_dir)
    _open_set(out, parameters)

    missing = [i for i in range(clips) if not (out / _clip_path(i)).exists()]
    done = clips - len(missing)
    if progress:
        progress(done, clips)
    for _ in _write_clips(out, parameters, missing, workers):
        done += 1
        if progress:
            progress(done, clips)
    manifest = out / "manifest.csv"
    if missing or not manifest.exists():
        _write_lists(out, parameters)
    return manifest


def _open_set(out: Path, parameters: _Parameters) -> None:
    """Make `out` the folder of this set; ValueError if it is another's or cannot be written."""
    record = out / "synth.json"
    try:
        if record.exists():
            _require_same(record, parameters)
        elif out.is_dir() and any(out.iterdir()):
            raise ValueError(
                f"out_dir = {str(out)!r} is not valid: it holds files but no synthetic set; "
                "it must be absent, empty or a set of the same parameters"
            )
        out.mkdir(parents=True, exist_ok=True)
        if not record.exists():
            fields = {**parameters.recorded(), "digest": parameters.digest}
            _write_text(record, json.dumps(fields, indent=2) + "\n")
        (out / "clips").mkdir(exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"out_dir = {str(out)!r} is not valid: it must be a folder that can be written "
            f"({error.strerror})"
        ) from error


def _require_same(record: Path, parameters: _Parameters) -> None:
    try:
        found = json.loads(record.read_text())
        digest = found["digest"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{record} is damaged: delete its folder to make the set anew") from error
    if digest == parameters.digest:
        return
    found = {**_ABSENT, **found}
    differ = [
        f"{name} = {found.get(name)!r} there, {value!r} asked"
        for name, value in asdict(parameters).items()
        if found.get(name) != value
    ]
    raise ValueError(
        f"out_dir = {str(record.parent)!r} holds a set of other parameters "
        f"({'; '.join(differ) or 'its digest fits none'}): choose another folder or delete this one"
    )


def _write_clips(
    out: Path, parameters: _Parameters, indices: list[int], workers: int
) -> Iterator[int]:
    """Write these clips, yielding the index of each when it is there."""
    workers = min(workers, len(indices))
    if workers <= 1:
        for index in indices:
            yield _write_clip(out, parameters, index)
        return
    # Spawned, not forked: the caller may run threads. Ctrl-C is the parent's to handle.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        jobs = [pool.submit(_write_clip, out, parameters, index) for index in indices]
        for job in as_completed(jobs):
            yield job.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write_clip(out: Path, parameters: _Parameters, index: int) -> int:
    scene = parameters.scene(index)
    path = out / _clip_path(index)
    partial = path.with_suffix(".mp4.partial")
    write_mp4(
        partial,
        _frames(parameters, index, scene),
        make_sound(parameters.seed, index, scene, parameters.end_s),
        fps=parameters.fps,
        sample_rate_hz=SAMPLE_RATE_HZ,
    )
    os.replace(partial, path)
    return index


def _frames(parameters: _Parameters, index: int, scene: Scene) -> Iterator[np.ndarray]:
    """The frames of a clip, rendered a second at a time to bound memory."""
    room = make_room(parameters.seed, index, parameters.size)
    times_s = np.arange(round(parameters.end_s * parameters.fps)) / parameters.fps
    for first in range(0, len(times_s), parameters.fps):
        yield from render(scene, room, times_s[first : first + parameters.fps])


def _write_lists(out: Path, parameters: _Parameters) -> None:
    """All that describes the clips; the manifest comes last, so it says that the set is whole."""
    names = [class_name(label) for label in range(parameters.classes)]
    _write_text(out / "classes.txt", "\n".join(names) + "\n")
    scenes = [json.dumps(_describe(parameters, i)) for i in range(parameters.clips)]
    _write_text(out / "scenes.jsonl", "\n".join(scenes) + "\n")
    rows = [
        (_clip_path(i), parameters.label(i), 0.0, parameters.end_s, parameters.split(i))
        for i in range(parameters.clips)
    ]
    header = ("path", "label", "start", "end", "split")
    for split in ("train", "val"):
        of_split = [row[:-1] for row in rows if row[-1] == split]
        _write_text(out / f"{split}.csv", _as_csv(header[:-1], of_split))
    _write_text(out / "manifest.csv", _as_csv(header, rows))


def _describe(parameters: _Parameters, index: int) -> dict[str, object]:
    """One line of scenes.jsonl: what is true of a clip. Lengths are in frame sides."""
    scene = parameters.scene(index)
    distractors = [
        {"time_s": other.time_s, "material": other.material.name, "loudness": other.loudness}
        for other in scene.distractors
    ]
    return {
        "path": _clip_path(index),
        "label": scene.label,
        "class": class_name(scene.label),
        "material": scene.material.name,
        "shape": scene.shape.name,
        "split": parameters.split(index),
        "bodies": [{"radius": body.radius, "hue": body.hue} for body in scene.bodies],
        "impacts": [asdict(impact) for impact in scene.impacts],
        **({"distractors": distractors} if distractors else {}),
    }


def _clip_path(index: int) -> str:
    return f"clips/clip-{index:05d}.mp4"


def _as_csv(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _require_int(name: str, value: int, low: int, high: int | None) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool)
    if not ok or value < low or (high is not None and value > high):
        valid = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} = {value!r} is not valid: it must be an integer {valid}")
