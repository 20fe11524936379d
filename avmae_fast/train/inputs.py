"""From a batch on the host to the model's arguments on the device: log-mel, standardised, masks."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from avmae_fast.config import AudioConfig, Config
from avmae_fast.data.loader import Batch
from avmae_fast.models import TokenMask
from avmae_fast.train.recipe import mask_specs
from avmae_kernels.logmel import log_mel
from avmae_kernels.masking import sample_masks

Inputs = dict[str, Any]

# Batches whose copy may be under way at a time; the loader lends one more.
_MOST_IN_FLIGHT = 2


class Stage:
    """Makes the arguments of a model out of batches: `_make` says how."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = _Copies(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Inputs:
        """The inputs of one batch, ready to be used."""
        if self._copies is None:
            return self._make(batch)
        return self._copies.finish(*self._copies.begin(batch, self._make))

    def ahead(self, batches: Iterator[Batch]) -> Iterator[Inputs]:
        """The inputs of each batch; on a GPU the next batch travels while one is trained on."""
        if self._copies is None:
            yield from map(self._make, batches)
            return
        begun: deque[tuple[Inputs, torch.cuda.Event]] = deque()
        for batch in batches:
            begun.append(self._copies.begin(batch, self._make))
            if len(begun) == 2:
                yield self._copies.finish(*begun.popleft())
        while begun:
            yield self._copies.finish(*begun.popleft())

    def _make(self, batch: Batch) -> Inputs:
        """The inputs of one batch; their copies to the device need not be done yet."""
        raise NotImplementedError

    def _video(self, batch: Batch) -> Tensor | None:
        """uint8 [B, T, H, W, 3]."""
        return None if batch.video is None else batch.video.to(self.device, non_blocking=True)

    def _audio(self, batch: Batch, audio: AudioConfig | None) -> Tensor | None:
        """Standardised log-mel, float32 [B, frames, mel_bins]."""
        if batch.waveform is None or audio is None:
            return None
        waveform = batch.waveform.to(self.device, non_blocking=True)
        return (log_mel(waveform, audio.mel_bins) - audio.mean) / audio.std


class InputStage(Stage):
    """Makes the arguments of `AudiovisualMAE`: video, audio and masks by modality.

    Masks are drawn by (seed, position of the sample, modality): a sample is masked alike whatever
    the batch it is in.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(device)
        self.config = config
        self._specs = mask_specs(config)

    def _make(self, batch: Batch) -> Inputs:
        inputs: Inputs = {"masks": {}}
        seed = self.config.train.seed
        for m, spec in self._specs.items():
            masks = sample_masks(spec, batch.keys.numpy(), seed=seed, modality=m)
            inputs["masks"][m] = TokenMask.from_numpy(masks, self.device)
        sources = {
            "video": self._video(batch),
            "audio": self._audio(batch, self.config.model.audio),
        }
        return inputs | {name: x for name, x in sources.items() if x is not None}


class _Event(Protocol):
    """What is used of `torch.cuda.Event`."""

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class InFlight:
    """Batches that the GPU may still be reading from the host: kept until their copy is done.

    A batch that nobody keeps has its memory filled with other samples.
    """

    def __init__(self, most: int = _MOST_IN_FLIGHT) -> None:
        self._most = most
        self._flights: deque[tuple[_Event, Batch]] = deque()

    def __len__(self) -> int:
        return len(self._flights)

    def add(self, done: _Event, batch: Batch) -> None:
        """Keep `batch` until `done` has happened; waits where too many are under way."""
        self._flights.append((done, batch))
        while len(self._flights) > self._most:
            self._flights[0][0].synchronize()
            self._flights.popleft()
        # Copies end in the order in which they began.
        while self._flights and self._flights[0][0].query():
            self._flights.popleft()


class _Copies:
    """Copies to a GPU on a stream of their own, beside the training step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._in_flight = InFlight()

    def begin(
        self, batch: Batch, make: Callable[[Batch], Inputs]
    ) -> tuple[Inputs, torch.cuda.Event]:
        """Start making the inputs of a batch; they are ready once the event has happened."""
        with torch.cuda.stream(self._stream):
            inputs = make(batch)
            done = torch.cuda.Event()
            done.record(self._stream)
        self._in_flight.add(done, batch)
        return inputs, done

    def finish(self, inputs: Inputs, done: torch.cuda.Event) -> Inputs:
        """The inputs, for work that is put on the current stream from now on."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(done)
        for tensor in _tensors(inputs):
            # Their memory belongs to the copy stream, which would hand it out again as soon as
            # they are gone, and not when the work on this stream is done with them.
            tensor.record_stream(current)
        return inputs


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings, sequences and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        yield from _tensors(vars(value))
