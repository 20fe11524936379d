"""The picture of a synthetic clip: a lit room and plain solid bodies, in NumPy.

Shape letters: T frames, H = W side of the frame in pixels, S side of the window around a body.
"""

from dataclasses import dataclass

import numpy as np

from avmae_fast.data.synth_scene import Body, Scene, Shape, clip_rng

_AMBIENT, _DIFFUSE, _SPECULAR = 0.42, 0.72, 0.45


@dataclass(frozen=True)
class Room:
    """The surroundings of a clip: they vary from clip to clip and know nothing of its class."""

    picture: np.ndarray  # [H, W, 3] float32 in [0, 1], without bodies
    light: np.ndarray  # [3] float32, unit vector towards the light: right, down, to the viewer
    tint: np.ndarray  # [3] float32, colour of the light


def make_room(seed: int, index: int, size: int) -> Room:
    """A wall and a floor of some colour in light from some side."""
    rng = clip_rng(seed, index, "room")
    side, lift = rng.uniform(-0.8, 0.8), rng.uniform(0.5, 0.9)
    light = np.array([side, -lift, 0.9])
    warmth, exposure = rng.uniform(-0.08, 0.08), rng.uniform(0.8, 1.15)
    tint = exposure * np.array([1 + warmth, 1.0, 1 - warmth])

    wall = hsv_to_rgb(rng.uniform(), rng.uniform(0.1, 0.55), rng.uniform(0.4, 0.95))
    floor_value = rng.uniform(0.3, 0.85)
    floor = hsv_to_rgb(rng.uniform(), rng.uniform(0.05, 0.4), floor_value)
    horizon = rng.uniform(0.66, 0.76)
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    # The light pools on the wall on its own side, and the floor brightens towards the viewer.
    pool = np.exp(-((x - 0.5 - 0.4 * side) ** 2 + (y - 0.25) ** 2) / 0.3)
    wall_shade = 0.68 + 0.36 * pool
    floor_shade = 0.72 + 0.9 * (y - horizon)
    below = np.clip((y - horizon) * size / 2 + 0.5, 0, 1)
    picture = (1 - below)[..., None] * wall_shade[..., None] * wall
    picture = picture + below[..., None] * floor_shade[..., None] * floor
    # Grain that stands still: it hides the steps of 8-bit gradients and costs no bits over time.
    grain = rng.normal(0, 0.004, (size, size, 1))
    picture = np.clip(picture * tint + grain, 0, 1)
    light = light / np.linalg.norm(light)
    return Room(picture.astype(np.float32), light.astype(np.float32), tint.astype(np.float32))


def render(scene: Scene, room: Room, times_s: np.ndarray) -> np.ndarray:
    """The frames at `times_s` [T], uint8 [T, H, W, 3], back bodies first."""
    frames = np.repeat(room.picture[None], len(times_s), axis=0)
    for body in scene.bodies:
        _draw_shadow(frames, scene.shape, body, times_s)
    for body in scene.bodies:
        _draw_body(frames, scene.shape, body, room, times_s)
    return (frames * 255 + 0.5).astype(np.uint8)


def _draw_shadow(frames: np.ndarray, shape: Shape, body: Body, times_s: np.ndarray) -> None:
    x, height, _ = body.at(times_s)
    side = int(4.4 * body.radius * frames.shape[1])
    u, v, rows, columns = _window(x, np.full_like(x, body.floor), side, frames.shape[1])
    # Higher bodies throw a wider and fainter shadow.
    spread = (body.radius * (0.8 + 0.2 * shape.half_width) * (1 + 0.8 * height))[:, None, None]
    strength = (0.6 * np.exp(-height / 0.3))[:, None, None]
    across, along = np.exp(-1.2 * (u / spread) ** 2), np.exp(-1.2 * (v / (0.27 * spread)) ** 2)
    light_left = (1 - strength * across * along).astype(np.float32)[..., None]
    for t, (row, column) in enumerate(zip(rows, columns, strict=True)):
        frames[t, row : row + side, column : column + side] *= light_left[t]


def _draw_body(
    frames: np.ndarray, shape: Shape, body: Body, room: Room, times_s: np.ndarray
) -> None:
    size = frames.shape[1]
    x, height, angle = body.at(times_s)
    y = body.floor - shape.half_height * body.radius - height
    side = int(2 * shape.reach * body.radius * size) + 3
    u, v, rows, columns = _window(x, y, side, size)
    cos, sin = (f(angle)[:, None, None].astype(np.float32) for f in (np.cos, np.sin))
    distance, bevel = _distance(shape, (cos * u + sin * v), (cos * v - sin * u), body.radius)

    # The surface curves from facing the viewer to facing outwards over the bevel's width, which
    # makes an exact sphere of the ball and an exact torus of the ring.
    down, right = np.gradient(distance, axis=(1, 2))
    lean = np.clip(1 + distance / bevel, 0, 1) / np.maximum(np.hypot(down, right), 1e-9)
    normal = np.stack([right * lean, down * lean], axis=-1)
    facing = np.sqrt(np.maximum(1 - np.square(normal).sum(-1), 0))
    lambert = np.maximum(normal @ room.light[:2] + facing * room.light[2], 0)
    half = room.light + np.array([0, 0, 1], np.float32)
    half /= np.linalg.norm(half)
    gloss = np.maximum(normal @ half[:2] + facing * half[2], 0) ** 32

    paint = hsv_to_rgb(body.hue, body.saturation, 0.95).astype(np.float32)
    colour = (_AMBIENT + _DIFFUSE * lambert)[..., None] * paint + _SPECULAR * gloss[..., None]
    colour = np.minimum(colour * room.tint, 1)
    cover = np.clip(0.5 - distance * size, 0, 1)[..., None]
    for t, (row, column) in enumerate(zip(rows, columns, strict=True)):
        window = frames[t, row : row + side, column : column + side]
        window += cover[t] * (colour[t] - window)


def _window(
    x: np.ndarray, y: np.ndarray, side: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pixel positions right of x, [T, 1, S], and below y, [T, S, 1], float32; each window's corner.

    A window that would leave the frame is moved back inside.
    """
    columns = np.clip(np.rint(x * size - side / 2), 0, size - side).astype(int)
    rows = np.clip(np.rint(y * size - side / 2), 0, size - side).astype(int)
    step = np.arange(side) + 0.5
    u = ((columns[:, None] + step) / size - x[:, None])[:, None, :]
    v = ((rows[:, None] + step) / size - y[:, None])[:, :, None]
    return u.astype(np.float32), v.astype(np.float32), rows, columns


def _distance(
    shape: Shape, u: np.ndarray, v: np.ndarray, radius: float
) -> tuple[np.ndarray, float]:
    """Signed distance to the outline (negative inside) and the width over which it is rounded."""
    if shape.name == "ball":
        return np.hypot(u, v) - radius, radius
    if shape.name == "ring":
        tube = 0.3 * radius
        return np.abs(np.hypot(u, v) - (radius - tube)) - tube, tube
    corner = 0.2 * radius
    across = np.abs(u) - (shape.half_width * radius - corner)
    along = np.abs(v) - (shape.half_height * radius - corner)
    outside = np.hypot(np.maximum(across, 0), np.maximum(along, 0))
    return outside + np.minimum(np.maximum(across, along), 0) - corner, 0.32 * radius


def hsv_to_rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Red, green and blue in [0, 1], [3] float64; hue in turns."""
    k = (np.array([5.0, 3.0, 1.0]) + 6 * hue) % 6
    return value * (1 - saturation * np.clip(np.minimum(k, 4 - k), 0, 1))
