"""`log_mel` against stored values of Kaldi's recipe, and against torchaudio where it imports.

`python tests/ops/test_logmel.py` writes the stored values anew (it needs torchaudio).
"""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from budgets import assert_within_budget

from avmae_kernels import logmel
from avmae_kernels.logmel import log_mel, log_mel_meaning

STORED = Path(__file__).with_name("logmel_reference.npz")
MEL_BINS = (128, 40)
SAMPLES = 400 + 6 * 160 + 100  # seven windows, and a rest that belongs to none


def _signals() -> np.ndarray:
    """int16 [6, SAMPLES]: noise loud and faint, a tone, an impulse, silence, full scale."""
    rng = np.random.default_rng(0)
    t = np.arange(SAMPLES) / 16000
    impulse = np.zeros(SAMPLES)
    impulse[700] = 30000
    rows = [
        rng.normal(0, 8000, SAMPLES),
        rng.normal(0, 2, SAMPLES),
        10000 * np.sin(2 * np.pi * 1000 * t) + 50,
        impulse,
        np.zeros(SAMPLES),
        np.where(np.sin(2 * np.pi * 300 * t) > 0, 32767, -32768),
    ]
    return np.clip(np.rint(rows), -32768, 32767).astype(np.int16)


def _torchaudio_fbank(waveform: torch.Tensor, mel_bins: int) -> torch.Tensor:
    """Kaldi's fbank of int16 [B, S]; skips where torchaudio is not installed."""
    try:
        import torchaudio  # noqa: F401
    except ImportError:
        pytest.skip("torchaudio is not installed")
    except OSError:
        # Built for CUDA, it does not load on CPU-only torch: none of its compiled parts is needed.
        for name in [name for name in sys.modules if name.startswith("torchaudio")]:
            del sys.modules[name]
        stub = types.ModuleType("torchaudio._extension")
        stub._IS_TORCHAUDIO_EXT_AVAILABLE = stub._IS_ALIGN_AVAILABLE = False
        stub.fail_if_no_align = lambda function: function
        stub._check_cuda_version = lambda: None
        sys.modules["torchaudio._extension"] = stub
    from torchaudio.compliance.kaldi import fbank

    rows = [
        fbank(
            row[None].float() / 32768,
            htk_compat=True,
            sample_frequency=16000,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=mel_bins,
            dither=0.0,
            frame_shift=10,
        )
        for row in waveform
    ]
    return torch.stack(rows)


def _assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the rounding of a float32 FFT.

    Its values are off by at most eps log2(512) of the window's norm, which is no more than the
    largest of them (Parseval). A filter of weights w adds them up to sqrt(sum w) of that, 5 for
    the widest of 40, and shows the largest by sqrt(1/2) or more: 64 eps of the loudest bin's
    amplitude (square root of power). Pre-emphasis amplifies earlier rounding a little: 100 eps.
    The logarithm alone would compare the rounding noise of bins that are 100 dB down.
    """
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    ours, theirs = (0.5 * actual.double()).exp(), (0.5 * expected.double()).exp()
    error = (ours - theirs).abs() / theirs.amax(dim=2, keepdim=True)
    assert error.max().item() <= 100 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("mel_bins", MEL_BINS)
def test_stored_values(mel_bins):
    with np.load(STORED) as stored:
        waveform, expected = stored["waveform"], stored[f"log_mel_{mel_bins}"]
    np.testing.assert_array_equal(waveform, _signals())
    _assert_close(log_mel(torch.from_numpy(waveform), mel_bins), torch.from_numpy(expected))


def test_noise_to_the_last_bits():
    """Noise fills every bin, so here the logarithms themselves are as near as torchaudio's."""
    with np.load(STORED) as stored:
        waveform = torch.from_numpy(stored["waveform"][:2])
        expected = torch.from_numpy(stored["log_mel_128"][:2])
    exact = log_mel_meaning(waveform.double() / 32768, 128)
    assert_within_budget(log_mel(waveform), expected, exact, "log-mel of noise")


@pytest.mark.parametrize("mel_bins", MEL_BINS)
def test_equals_torchaudio(mel_bins):
    waveform = torch.from_numpy(_signals())
    _assert_close(log_mel(waveform, mel_bins), _torchaudio_fbank(waveform, mel_bins))


def test_float64_meaning():
    """The float32 arithmetic agrees with the same formula in float64, written out anew."""
    x = torch.from_numpy(_signals()).double() / 32768
    frames = x.unfold(1, 400, 160)
    frames = frames - frames.mean(-1, keepdim=True)
    frames = torch.cat([frames[..., :1] * 0.03, frames[..., 1:] - 0.97 * frames[..., :-1]], -1)
    n = torch.arange(400, dtype=torch.float64)
    frames = frames * (0.5 - 0.5 * torch.cos(2 * torch.pi * n / 399))
    k = torch.arange(257, dtype=torch.float64)
    power = (
        frames.to(torch.complex128) @ torch.exp(-2j * torch.pi * n[:, None] * k / 512)
    ).abs() ** 2

    def mel(hz):
        return 1127 * torch.log1p(torch.as_tensor(hz, dtype=torch.float64) / 700)

    edges = torch.linspace(float(mel(20.0)), float(mel(8000.0)), 130, dtype=torch.float64)
    at = mel(k * 16000 / 512)[:, None]
    up = (at - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - at) / (edges[2:] - edges[1:-1])
    energy = power @ torch.minimum(up, down).clamp(min=0)
    expected = energy.clamp(min=2.0**-23).log()
    torch.testing.assert_close(log_mel_meaning(x, 128), expected, rtol=0, atol=1e-9)
    _assert_close(log_mel(x.float()), expected.float())


def test_int16_is_a_fraction_of_full_scale():
    waveform = torch.from_numpy(_signals())
    assert torch.equal(log_mel(waveform), log_mel(waveform.float() / 32768))
    assert log_mel(waveform.double() / 32768).dtype == torch.float32


def test_silence_is_the_floor():
    floor = torch.full((1, 1, 128), 2.0**-23).log()
    assert torch.equal(log_mel(torch.zeros(1, 400, dtype=torch.int16)), floor)


def test_one_row_at_a_time_gives_the_same(monkeypatch):
    waveform = torch.from_numpy(_signals())
    together = log_mel(waveform)
    monkeypatch.setattr(logmel, "_CHUNK_CPU", 1)
    torch.testing.assert_close(log_mel(waveform), together, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("samples", "frames"), [(400, 1), (559, 1), (560, 2), (160240, 1000)])
def test_rows(samples, frames):
    assert log_mel(torch.zeros(1, samples, dtype=torch.int16)).shape == (1, frames, 128)


def test_autocast_is_left_out():
    waveform = torch.from_numpy(_signals())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = log_mel(waveform)
    assert inside.dtype == torch.float32 and torch.equal(inside, log_mel(waveform))


@pytest.mark.parametrize(
    "waveform",
    [torch.zeros(1000), torch.zeros(1, 399), torch.zeros(0, 1000), torch.zeros(1, 1000).int()],
    ids=["1-D", "short", "empty", "int32"],
)
def test_bad_waveform(waveform):
    with pytest.raises(ValueError, match=r"log_mel wants waveform \[B >= 1, S >= 400\].*got"):
        log_mel(waveform)


def test_bad_mel_bins():
    with pytest.raises(ValueError, match="mel_bins of at least 1; got 0"):
        log_mel(torch.zeros(1, 1000), 0)


if __name__ == "__main__":
    signals = _signals()
    values = {f"log_mel_{n}": _torchaudio_fbank(torch.from_numpy(signals), n) for n in MEL_BINS}
    np.savez_compressed(STORED, waveform=signals, **{k: v.numpy() for k, v in values.items()})
