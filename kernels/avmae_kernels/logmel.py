"""Log-mel spectrogram of 16 kHz sound, with the arithmetic of Kaldi's `fbank`.

Windows of 25 ms every 10 ms that lie inside the signal (snip_edges); each window's mean removed,
pre-emphasis, Hann window, 512-point power spectrum, triangular mel filters over 20 Hz to 8 kHz on
the HTK mel scale, natural logarithm with a floor. Bit for bit the values of
`torchaudio.compliance.kaldi.fbank(htk_compat=True, sample_frequency=16000, use_energy=False,
window_type="hanning", num_mel_bins=128, dither=0.0, frame_shift=10)` where the FFT is the same.

Shape letters: B waveforms, S samples, F frames, M mel bins.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from avmae_kernels._check import wanted

SAMPLE_RATE_HZ = 16000
WINDOW_SAMPLES = 400
HOP_SAMPLES = 160
FFT_SIZE = 512
LOW_HZ, HIGH_HZ = 20.0, 8000.0
PREEMPHASIS = 0.97

# Values of one intermediate tensor at a time. On a CPU one 10 s clip already fills the cache; a
# GPU wants fewer, larger launches.
_CHUNK_CPU, _CHUNK_GPU = 2**19, 2**25


def log_mel_meaning(x_BS: Tensor, mel_bins: int) -> Tensor:
    """What `log_mel` computes, in the floating type of the waveform: [B, S] to [B, F, M]."""
    x_BFS = x_BS.unfold(1, WINDOW_SAMPLES, HOP_SAMPLES)
    x_BFS = x_BFS - x_BFS.mean(dim=2, keepdim=True)
    # The sample before a window's first is taken to be the first once more.
    before = torch.cat([x_BFS[..., :1], x_BFS[..., :-1]], dim=2)
    x_BFS = x_BFS - PREEMPHASIS * before
    x_BFS = x_BFS * torch.hann_window(
        WINDOW_SAMPLES, periodic=False, dtype=x_BFS.dtype, device=x_BFS.device
    )
    spectrum = torch.fft.rfft(pad(x_BFS, (0, FFT_SIZE - WINDOW_SAMPLES)))
    power = spectrum.abs().pow(2.0)
    mel_BFM = power @ _mel_filters(mel_bins, x_BFS.dtype, x_BFS.device)
    return mel_BFM.clamp(min=torch.finfo(torch.float32).eps).log()


def log_mel(waveform: Tensor, mel_bins: int = 128) -> Tensor:
    """Return the log-mel spectrogram of each waveform.

    Args:
        waveform: mono sound at 16 kHz, [B, S]: int16, taken as fractions of full scale in [-1, 1),
            or a floating type in that range. Not differentiable. S is at least 400.
        mel_bins: number of mel filters; the released models take 128.

    Returns:
        float32 [B, F, mel_bins] on the same device, F = 1 + (S - 400) // 160, of natural
        logarithms of power; at least log(2**-23) = -15.94. Computed in float32 (in float64 for a
        float64 waveform) even under autocast.

    Raises:
        ValueError: a shape or dtype is not as above. Values are not checked: that would stall a
            GPU.
    """
    ok = waveform.dtype == torch.int16 or waveform.dtype.is_floating_point
    if waveform.ndim != 2 or not len(waveform) or waveform.shape[1] < WINDOW_SAMPLES or not ok:
        want = f"waveform [B >= 1, S >= {WINDOW_SAMPLES}] as int16 or a floating type"
        raise wanted("log_mel", want, waveform=waveform)
    if mel_bins < 1:
        raise ValueError(f"log_mel wants mel_bins of at least 1; got {mel_bins}")
    frames = 1 + (waveform.shape[1] - WINDOW_SAMPLES) // HOP_SAMPLES
    limit = _CHUNK_CPU if waveform.device.type == "cpu" else _CHUNK_GPU
    with torch.no_grad(), torch.autocast(waveform.device.type, enabled=False):
        chunks = waveform.split(max(1, limit // (frames * FFT_SIZE)))
        rows = [log_mel_meaning(_as_fractions(chunk), mel_bins).float() for chunk in chunks]
    return torch.cat(rows)


def _as_fractions(waveform: Tensor) -> Tensor:
    if waveform.dtype == torch.int16:
        return waveform.float() / 32768.0
    return waveform if waveform.dtype == torch.float64 else waveform.float()


@lru_cache(maxsize=8)
def _mel_filters(mel_bins: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Triangles on the mel scale, evenly spaced and half overlapping: [FFT_SIZE / 2 + 1, M].

    The last row, the Nyquist frequency, is zero.
    """
    low, high = _mel(LOW_HZ), _mel(HIGH_HZ)
    step = (high - low) / (mel_bins + 1)
    left = low + torch.arange(mel_bins, dtype=dtype)[:, None] * step
    centre = low + (torch.arange(mel_bins, dtype=dtype)[:, None] + 1.0) * step
    right = low + (torch.arange(mel_bins, dtype=dtype)[:, None] + 2.0) * step
    hz = SAMPLE_RATE_HZ / FFT_SIZE * torch.arange(FFT_SIZE // 2, dtype=dtype)
    mel = 1127.0 * (1.0 + hz / 700.0).log()
    rising, falling = (mel - left) / (centre - left), (right - mel) / (right - centre)
    triangles = torch.minimum(rising, falling).clamp(min=0.0)
    return pad(triangles, (0, 1)).T.to(device)


def _mel(hz: float) -> float:
    return 1127.0 * math.log(1.0 + hz / 700.0)
