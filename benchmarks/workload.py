"""What a step benchmark works on: the paper's shapes, random host batches, weights to start from.

A batch has two forms that hold the same clips: as this project's loader gives it (uint8 frames,
int16 sound) and as an ordinary float pipeline does (frames in [-1, 1], log-mel).
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from avmae_fast.config import (
    DECODER_SIZES,
    ENCODER_SIZES,
    AudioConfig,
    Config,
    DataConfig,
    Modality,
    ModelConfig,
    StackConfig,
    TrainConfig,
    VideoConfig,
)
from avmae_fast.config_file import load_config
from avmae_fast.data.loader import Batch
from avmae_fast.data.windows import waveform_samples
from avmae_fast.models import TokenMask
from avmae_fast.reference import ReferenceMAE
from avmae_fast.train.recipe import mask_specs
from avmae_kernels.logmel import log_mel
from avmae_kernels.masking import sample_masks
from benchmarks.harness import BenchmarkError

DATASETS = ("audioset", "vggsound")
SIZES = ("B", "L", "H")
_HEAD_STD = 0.02

Masks = dict[Modality, TokenMask]


def model_config(size: str, dataset: str, tiny: bool = False) -> ModelConfig:
    """The preset of a data set at a size; `tiny` keeps its structure and shrinks every number.

    Raises:
        BenchmarkError: no such size or data set.
    """
    if size not in SIZES or dataset not in DATASETS:
        raise BenchmarkError(
            f"size {size!r} and data set {dataset!r} are not valid: they must be among "
            f"{', '.join(SIZES)} and {', '.join(DATASETS)}"
        )
    preset = load_config(f"{dataset}-L", ["data.manifest=unused.csv"]).model
    if not tiny:
        return replace(preset, encoder=ENCODER_SIZES[size], decoder=DECODER_SIZES[size])
    layers = {"B": 3, "L": 4, "H": 5}[size]
    assert preset.video is not None and preset.audio is not None
    return replace(
        preset,
        encoder=StackConfig(width=32, layers=layers, heads=2, mlp=64),
        decoder=StackConfig(width=24, layers=2, heads=2, mlp=48),
        video=VideoConfig(
            frames=4, height=32, width=32, tubelet=(2, 8, 8), mask_ratio=preset.video.mask_ratio
        ),
        audio=AudioConfig(
            frames=50,
            mel_bins=32,
            patch=(8, 8),
            mask_ratio=preset.audio.mask_ratio,
            mean=preset.audio.mean,
            std=preset.audio.std,
        ),
    )


@dataclass(frozen=True)
class HostBatch:
    """Clips in the host's memory, page-locked where a GPU is to read them.

    clips: as `ClipLoader` gives them.
    """

    clips: Batch
    model: ModelConfig

    @cached_property
    def mel(self) -> Tensor:
        """The sound as standardised log-mel, float32 [B, rows, bins]."""
        audio, waveform = self.model.audio, self.clips.waveform
        assert audio is not None and waveform is not None
        mel = (log_mel(waveform, audio.mel_bins) - audio.mean) / audio.std
        return mel.pin_memory() if waveform.is_pinned() else mel

    @cached_property
    def frames(self) -> Tensor:
        """The video as float32 in [-1, 1], [B, T, H, W, 3]."""
        video = self.clips.video
        assert video is not None
        frames = video.float().mul_(2.0 / 255.0).sub_(1.0)
        return frames.pin_memory() if video.is_pinned() else frames


@dataclass(frozen=True)
class Workload:
    """One shape of the step: a model, a batch size and where it runs.

    compiler: the back end of torch.compile in the compiled rows.
    """

    size: str
    dataset: str
    batch: int
    device: torch.device
    tiny: bool = False
    seed: int = 0
    compiler: str = "inductor"

    @cached_property
    def model(self) -> ModelConfig:
        return model_config(self.size, self.dataset, self.tiny)

    @cached_property
    def config(self) -> Config:
        """A whole configuration, as the engine's input stage wants it."""
        train = TrainConfig(out=Path("unused"), batch=self.batch, steps=1, seed=self.seed)
        return Config(model=self.model, data=DataConfig(manifest=Path("unused.csv")), train=train)

    def host_batches(self, count: int) -> list[HostBatch]:
        """Random clips: uniform bytes and white noise, which no compression shortens."""
        return [self._host_batch(i) for i in range(count)]

    def _host_batch(self, number: int) -> HostBatch:
        video, audio, B = self.model.video, self.model.audio, self.batch
        assert video is not None and audio is not None
        generator = np.random.default_rng(self.seed + number)
        frames = generator.bytes(B * video.frames * video.height * video.width * 3)
        sound = generator.integers(-(2**13), 2**13, (B, waveform_samples(audio.frames)), np.int16)
        shape = (B, video.frames, video.height, video.width, 3)
        clips = Batch(
            video=torch.frombuffer(bytearray(frames), dtype=torch.uint8).view(shape),
            waveform=torch.from_numpy(sound),
            keys=torch.arange(B) + number * B,
            labels=torch.full((B,), -1),
            has_audio=torch.ones(B, dtype=torch.bool),
        )
        if self.device.type == "cuda":
            # Page-locked, as the loader's are.
            pinned = {n: getattr(clips, n).pin_memory() for n in ("video", "waveform", "keys")}
            clips = replace(clips, **pinned)
        return HostBatch(clips, self.model)

    def masks(self, keys: Tensor) -> Masks:
        """The engine's masks of the clips with these keys, on the device."""
        return {
            m: TokenMask.from_numpy(
                sample_masks(spec, np.asarray(keys), seed=self.seed, modality=m), self.device
            )
            for m, spec in mask_specs(self.config).items()
        }

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Weights to start every row from, in the host's memory.

        The released initialisation, but with random heads and mask tokens: zeros would hide a
        wrong gradient from the check that precedes every timing.
        """
        torch.manual_seed(self.seed)
        with torch.device(self.device):
            model = ReferenceMAE(self.model)
        for name, parameter in model.named_parameters():
            if name.startswith(("head", "mask_token")):
                torch.nn.init.normal_(parameter, std=_HEAD_STD)
        return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def chunk_size(clips: int, most: int = 8) -> int:
    """The largest divisor of `clips` up to `most`."""
    return max(size for size in range(1, most + 1) if clips % size == 0)
