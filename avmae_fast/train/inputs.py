"""From a batch on the host to the model's arguments on the device: log-mel, standardised, masks."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from avmae_fast.config import Config
from avmae_fast.data.loader import Batch
from avmae_fast.models import TokenMask
from avmae_fast.train.recipe import mask_specs
from avmae_kernels.logmel import log_mel
from avmae_kernels.masking import sample_masks

Inputs = dict[str, Any]

# Batches whose copy may be under way at a time; the loader lends one more.
_MOST_IN_FLIGHT = 2


class InputStage:
    """Makes the arguments of `AudiovisualMAE` out of batches.

    Masks are drawn by (seed, position of the sample, modality): a sample is masked alike whatever
    the batch it is in.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        self.device = device
        self._specs = mask_specs(config)
        self._copies = _Copies(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Inputs:
        """video [B, T, H, W, 3] uint8, audio [B, frames, mel_bins] float32, masks by modality."""
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
        inputs: Inputs = {"masks": {}}
        seed = self.config.train.seed
        for m, spec in self._specs.items():
            masks = sample_masks(spec, batch.keys.numpy(), seed=seed, modality=m)
            inputs["masks"][m] = TokenMask.from_numpy(masks, self.device)
        if batch.video is not None:
            inputs["video"] = batch.video.to(self.device, non_blocking=True)
        audio = self.config.model.audio
        if batch.waveform is not None and audio is not None:
            waveform = batch.waveform.to(self.device, non_blocking=True)
            inputs["audio"] = (log_mel(waveform, audio.mel_bins) - audio.mean) / audio.std
        return inputs


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


def _tensors(inputs: Inputs) -> Iterator[Tensor]:
    for value in inputs.values():
        if isinstance(value, Tensor):
            yield value
    for mask in inputs["masks"].values():
        yield mask.visible
        yield mask.masked
