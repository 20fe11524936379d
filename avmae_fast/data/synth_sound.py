"""The sound of a synthetic clip: every impact rings the modes of the body that it struck."""

import numpy as np

from avmae_fast.data.synth_scene import REFERENCE_RADIUS, Material, Scene, clip_rng

SAMPLE_RATE_HZ = 16_000


def make_sound(seed: int, index: int, scene: Scene, seconds: float) -> np.ndarray:
    """Mono sound of a clip, int16 [round(seconds * 16000)].

    A body's impacts differ only in loudness, so its response is made once and added at the sample
    nearest to each impact time.
    """
    rng = clip_rng(seed, index, "sound")
    sound = _room_noise(rng, round(seconds * SAMPLE_RATE_HZ))
    responses = [impact_response(scene.material, b.radius, rng) for b in scene.bodies]
    for impact in scene.impacts:
        start = round(impact.time_s * SAMPLE_RATE_HZ)
        response = responses[impact.body][: len(sound) - start]
        sound[start : start + len(response)] += impact.loudness * response
    for other in scene.distractors:
        start = round(other.time_s * SAMPLE_RATE_HZ)
        response = impact_response(other.material, other.radius, rng)[: len(sound) - start]
        sound[start : start + len(response)] += other.loudness * response
    return (np.clip(sound, -1, 1) * 32767).astype(np.int16)


def impact_response(material: Material, radius: float, rng: np.random.Generator) -> np.ndarray:
    """What one impact of loudness 1 sounds like: damped modes and a click, peak 1, float64 [L].

    A body half as large sounds an octave higher; higher modes die away sooner.
    """
    base_hz = material.base_hz * REFERENCE_RADIUS / radius * rng.uniform(0.97, 1.03)
    t = np.arange(int(7 * material.decay_s * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    response = np.zeros_like(t)
    for ratio, gain in zip(material.ratios, material.gains, strict=True):
        hz = base_hz * ratio
        if hz < 0.45 * SAMPLE_RATE_HZ:
            decay_s = material.decay_s / (1 + 0.15 * (ratio - 1))
            response += gain * np.exp(-t / decay_s) * np.sin(2 * np.pi * hz * t)
    response += material.click * rng.normal(size=len(t)) * np.exp(-t / 0.004)
    return response / np.abs(response).max()


def _room_noise(rng: np.random.Generator, n: int) -> np.ndarray:
    """Quiet noise of a level and a spectral slope that differ between clips, float64 [n]."""
    level = 10 ** (rng.uniform(-62, -48) / 20)
    spectrum = np.fft.rfft(rng.normal(size=n))
    hz = np.fft.rfftfreq(n, 1 / SAMPLE_RATE_HZ)
    spectrum *= np.maximum(hz, 50.0) ** -rng.uniform(0.2, 0.8)
    noise = np.fft.irfft(spectrum, n)
    return level * noise / noise.std()
