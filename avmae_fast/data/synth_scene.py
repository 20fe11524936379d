"""What happens in a synthetic clip: which bodies fall, how they move, when they strike what.

A class is two words, "glass ring": the shape is seen and the material is heard, so neither the
picture nor the sound alone names the class once there are more than four of them.

Lengths are in frame sides (the frame is the unit square, x to the right), heights grow upwards
from the floor, times are in seconds. Bodies move in lanes of different depth and do not meet, so
every flight is a parabola and every impact time is exact.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

# Slower than life: a fall through half the frame lasts 0.8 s, so 6 frames a second can follow it.
GRAVITY = 1.6

# A bounce lower than this share of the free height is followed by a kick from below.
_LOWEST_BOUNCE = 0.15


@dataclass(frozen=True)
class Material:
    """What a body is made of: it decides the sound, and how much of its speed a bounce keeps."""

    name: str
    restitution: float
    base_hz: float  # lowest mode of a body of radius `REFERENCE_RADIUS`
    ratios: tuple[float, ...]  # modes over the lowest mode
    gains: tuple[float, ...]  # amplitude of each mode
    decay_s: float  # the lowest mode falls to 1/e in this time
    click: float  # amplitude of the noise at contact, beside modes of amplitude 1


@dataclass(frozen=True)
class Shape:
    """What a body looks like; extents are in radii."""

    name: str
    hue: float  # centre of its range of hues, in turns
    half_width: float  # also how near its centre comes to a wall
    half_height: float
    turn: float  # radians after which it lies flat again; 0 for a round one

    @property
    def reach(self) -> float:
        """Farthest that it extends from its centre."""
        return math.hypot(self.half_width, self.half_height) if self.turn else 1.0


REFERENCE_RADIUS = 0.16
# By which a distracted scene's hue is off at most: those of two shapes are then mistaken.
_HUE_SHIFT = 0.12
# About that of an impact after a fall through half the frame.
REFERENCE_LOUDNESS = 0.3

# Ratios: free-free bar (wood, steel), wine glass (glass), damped membrane (rubber).
MATERIALS = (
    Material("rubber", 0.82, 150, (1, 1.59, 2.14, 2.65), (1, 0.6, 0.35, 0.2), 0.22, 0.10),
    Material("wooden", 0.60, 420, (1, 2.76, 5.40, 8.93), (1, 0.7, 0.4, 0.2), 0.18, 0.35),
    Material("glass", 0.66, 1250, (1, 2.32, 4.25), (1, 0.6, 0.3), 0.40, 0.30),
    Material("steel", 0.72, 560, (1, 2.76, 5.40, 8.93), (0.8, 1, 0.7, 0.4), 0.90, 0.25),
)
SHAPES = (
    Shape("ball", 0.00, 1.0, 1.0, 0.0),
    Shape("cube", 0.10, 0.9, 0.9, math.pi / 2),
    Shape("ring", 0.45, 1.0, 1.0, 0.0),
    Shape("bar", 0.60, 1.3, 0.5, math.pi),
)
MAX_CLASSES = len(MATERIALS) * len(SHAPES)


@dataclass(frozen=True)
class Impact:
    """One contact. `impulse` is the change of speed off the surface, in frame sides per second."""

    time_s: float
    body: int
    against: Literal["floor", "wall"]
    impulse: float
    loudness: float  # amplitude it adds to the sound, full scale = 1


@dataclass(frozen=True)
class Body:
    """A body and its motion: row s of `flights` holds from its time until that of row s + 1."""

    radius: float
    hue: float
    saturation: float
    floor: float  # where its lane's floor is drawn, from the top of the frame
    flights: np.ndarray  # [S, 7] float64: time, x, height, speed in x, speed up, angle, spin

    def at(self, times_s: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Centre x, height over the floor and angle (radians) at each time, [T] float64 each."""
        row = np.searchsorted(self.flights[:, 0], times_s, side="right") - 1
        start, x, height, speed_x, speed_up, angle, spin = self.flights[row].T
        t = times_s - start
        return x + speed_x * t, height + (speed_up - GRAVITY / 2 * t) * t, angle + spin * t


@dataclass(frozen=True)
class Distractor:
    """An impact outside the picture, of some other material."""

    time_s: float
    material: Material
    radius: float
    loudness: float


@dataclass(frozen=True)
class Scene:
    """Everything that decides a clip's picture and sound, but for the surroundings of both."""

    label: int
    material: Material
    shape: Shape
    bodies: tuple[Body, ...]
    impacts: tuple[Impact, ...]  # by time
    distractors: tuple[Distractor, ...] = ()


def class_of(label: int) -> tuple[Material, Shape]:
    """Material and shape of a class: classes 0..3 share neither, 0..7 share each with one other."""
    m, shift = label % len(MATERIALS), label // len(MATERIALS)
    return MATERIALS[m], SHAPES[(m + shift) % len(SHAPES)]


def class_name(label: int) -> str:
    material, shape = class_of(label)
    return f"{material.name} {shape.name}"


def clip_rng(seed: int, index: int, stream: str) -> np.random.Generator:
    """The random numbers of one aspect of one clip; they depend on nothing else."""
    return np.random.default_rng([seed, index, *stream.encode()])


def make_scene(seed: int, index: int, label: int, seconds: float) -> Scene:
    """The scene of a clip; a longer clip of the same seed and index begins with a shorter one."""
    rng = clip_rng(seed, index, "scene")
    material, shape = class_of(label)
    gain = 0.22 * 0.4 ** rng.uniform()
    n_bodies = int(rng.choice((1, 2, 3), p=(0.45, 0.4, 0.15)))
    floors = np.sort(rng.uniform(0.82, 0.94, n_bodies))
    hue = shape.hue + rng.uniform(-0.06, 0.06)
    bodies: list[Body] = []
    impacts: list[Impact] = []
    for b in range(n_bodies):
        radius = rng.uniform(0.13, 0.2)
        body_hue, saturation = hue + rng.uniform(-0.02, 0.02), rng.uniform(0.65, 0.95)
        # A generator per body, because the number of draws of a body grows with the seconds.
        (fly_rng,) = rng.spawn(1)
        flights, hits = _fly(fly_rng, material, shape, radius, float(floors[b]), seconds)
        bodies.append(Body(radius, body_hue % 1.0, saturation, float(floors[b]), flights))
        impacts += [Impact(t, b, against, dv, gain * dv) for t, against, dv in hits]
    impacts.sort(key=lambda impact: impact.time_s)
    return Scene(label, material, shape, tuple(bodies), tuple(impacts))


def distracted(scene: Scene, seed: int, index: int, seconds: float, count: int) -> Scene:
    """The scene with `count` sounds from outside it, its shape less surely told by its colour."""
    rng = clip_rng(seed, index, "distractors")
    turn = rng.uniform(-_HUE_SHIFT, _HUE_SHIFT)
    bodies = tuple(replace(body, hue=(body.hue + turn) % 1.0) for body in scene.bodies)
    others = [material for material in MATERIALS if material is not scene.material]
    sounds = []
    for _ in range(count):
        material = others[int(rng.integers(len(others)))]
        loudness = 0.3 * 0.3 ** rng.uniform() * REFERENCE_LOUDNESS
        sounds.append(
            Distractor(rng.uniform(0, seconds), material, rng.uniform(0.13, 0.2), loudness)
        )
    return replace(scene, bodies=bodies, distractors=tuple(sounds))


def _fly(
    rng: np.random.Generator,
    material: Material,
    shape: Shape,
    radius: float,
    floor: float,
    seconds: float,
) -> tuple[np.ndarray, list[tuple[float, Literal["floor", "wall"], float]]]:
    """Flights [S, 7] (see `Body`) and impacts (time, against, impulse) from 0 to `seconds`."""
    free_height = floor - (shape.half_height + shape.reach) * radius - 0.03
    wall = shape.half_width * radius + 0.01  # least distance of the centre from either side
    # It comes in falling, so that a clip is not silent for long, each body from its own height.
    launch = _kick(rng, free_height)
    since = rng.uniform(1, 2) * launch / GRAVITY
    height, speed_up = (launch - GRAVITY / 2 * since) * since, launch - GRAVITY * since
    t, x, speed_x = 0.0, rng.uniform(wall, 1 - wall), _sideways(rng)
    spin = _tumble(shape, radius, speed_x, launch)
    angle = -spin * _time_to_floor(height, speed_up)  # it lands flat
    flights: list[tuple[float, ...]] = []
    hits: list[tuple[float, Literal["floor", "wall"], float]] = []
    while t < seconds:
        flights.append((t, x, height, speed_x, speed_up, angle, spin))
        to_floor = _time_to_floor(height, speed_up)
        to_wall = ((1 - wall if speed_x > 0 else wall) - x) / speed_x
        dt = min(to_floor, to_wall)
        t, x, angle = t + dt, x + speed_x * dt, angle + spin * dt
        height, speed_up = height + (speed_up - GRAVITY / 2 * dt) * dt, speed_up - GRAVITY * dt
        if to_wall < to_floor:
            # At least 0.08: a body that has lost its speed sideways would hang at the wall.
            speed_out = max(material.restitution * abs(speed_x), 0.08)
            hits.append((t, "wall", abs(speed_x) + speed_out))
            speed_x = -math.copysign(speed_out, speed_x)
            continue
        speed_in, speed_up, height = -speed_up, -material.restitution * speed_up, 0.0
        if speed_up**2 < 2 * GRAVITY * _LOWEST_BOUNCE * free_height:
            speed_up, speed_x = _kick(rng, free_height), _sideways(rng)
        hits.append((t, "floor", speed_in + speed_up))
        angle, spin = 0.0, _tumble(shape, radius, speed_x, speed_up)
    return np.array(flights), [hit for hit in hits if hit[0] < seconds]


def _tumble(shape: Shape, radius: float, speed_x: float, speed_up: float) -> float:
    """Spin that lets a body land flat at the end of a flight; 0 if a corner would dip."""
    spin = shape.turn / (2 * speed_up / GRAVITY)
    dips = 1.3 * spin * shape.half_width * radius > speed_up
    return 0.0 if dips else math.copysign(spin, speed_x)


def _kick(rng: np.random.Generator, free_height: float) -> float:
    """Speed that carries a body to between half the free height and all of it."""
    return math.sqrt(2 * GRAVITY * free_height * rng.uniform(0.5, 1.0))


def _sideways(rng: np.random.Generator) -> float:
    return float(rng.choice((-1, 1)) * rng.uniform(0.1, 0.35))


def _time_to_floor(height: float, speed_up: float) -> float:
    return (speed_up + math.sqrt(speed_up**2 + 2 * GRAVITY * height)) / GRAVITY
