"""Batches in memory that is used again and again: workers fill a slot, training reads it there.

A slot goes through four states. `free`: nobody uses it. `filling`: workers write samples into it.
`filled`: it waits for its turn. `lent`: a batch that training holds looks into it. It is free again
when nothing refers to the batch any more; who copies a batch to a GPU without waiting keeps the
batch until the copy is done.
"""

import logging
import math
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avmae_fast.data.shared import SharedBlock, aligned

State = Literal["free", "filling", "filled", "lent"]


class Slots:
    """The states of a ring's slots. Any thread may give a slot back; one thread does the rest."""

    def __init__(self, count: int) -> None:
        self._states: list[State] = ["free"] * count
        self._returned: deque[int] = deque()

    def state(self, slot: int) -> State:
        self._settle()
        return self._states[slot]

    def count(self, state: State) -> int:
        """How many slots are in a state."""
        self._settle()
        return self._states.count(state)

    def take(self) -> int | None:
        """A free slot, to be filled; None where there is none."""
        self._settle()
        if "free" not in self._states:
            return None
        slot = self._states.index("free")
        self._move(slot, "free", "filling")
        return slot

    def filled(self, slot: int) -> None:
        self._move(slot, "filling", "filled")

    def lend(self, slot: int) -> None:
        self._move(slot, "filled", "lent")

    def drop(self, slot: int) -> None:
        """Free a slot whose content nobody wants any more; no worker may be writing to it."""
        self._settle()
        if self._states[slot] not in ("filling", "filled"):
            raise ValueError(f"slot {slot} is {self._states[slot]}: only one in filling is dropped")
        self._states[slot] = "free"

    def give_back(self, slot: int) -> None:
        """Free a lent slot. Called wherever the last reference to a batch goes."""
        self._returned.append(slot)

    def _settle(self) -> None:
        while self._returned:
            self._move(self._returned.popleft(), "lent", "free")

    def _move(self, slot: int, old: State, new: State) -> None:
        if self._states[slot] != old:
            raise ValueError(f"slot {slot} is {self._states[slot]}: {new} follows {old}")
        self._states[slot] = new


@dataclass(frozen=True)
class Layout:
    """Where the arrays of a batch of `batch` samples lie in a slot.

    frames is 0 without video, samples is 0 without audio; picture is the shape of one: (H, W, 3),
    or (3H/2, W) of planes.
    """

    batch: int
    frames: int
    picture: tuple[int, ...]
    samples: int

    @property
    def video_shape(self) -> tuple[int, ...]:
        return (self.batch, self.frames, *self.picture)

    @property
    def waveform_at(self) -> int:
        return aligned(math.prod(self.video_shape))

    @property
    def labels_at(self) -> int:
        return aligned(self.waveform_at + self.batch * self.samples * 2)

    @property
    def records_at(self) -> int:
        return self.labels_at + self.batch * 8

    @property
    def has_audio_at(self) -> int:
        return self.records_at + self.batch * 8

    @property
    def size(self) -> int:
        """Bytes of a slot. Slots are whole pages, which is what can be page-locked."""
        return -(-(self.has_audio_at + self.batch) // 4096) * 4096


@dataclass(frozen=True)
class SlotArrays:
    """A slot as workers see it: video uint8 [B, T, *picture], waveform int16 [B, S], labels and
    records int64 [B], has_audio uint8 [B]."""

    video: NDArray[np.uint8]
    waveform: NDArray[np.int16]
    labels: NDArray[np.int64]
    records: NDArray[np.int64]
    has_audio: NDArray[np.uint8]


class Ring:
    """`slots` batches of one layout in memory shared with the workers."""

    def __init__(self, layout: Layout, slots: int) -> None:
        self.layout = layout
        self.slots = slots
        self._block = SharedBlock("batches", slots * layout.size)

    @property
    def size(self) -> int:
        return self._block.size

    def arrays(self, slot: int) -> SlotArrays:
        """The arrays of a slot, writable."""
        layout, block, start = self.layout, self._block, slot * self.layout.size
        waveform_shape = (layout.batch, layout.samples)
        return SlotArrays(
            video=block.array(np.uint8, layout.video_shape, start),
            waveform=block.array(np.int16, waveform_shape, start + layout.waveform_at),
            labels=block.array(np.int64, (layout.batch,), start + layout.labels_at),
            records=block.array(np.int64, (layout.batch,), start + layout.records_at),
            has_audio=block.array(np.uint8, (layout.batch,), start + layout.has_audio_at),
        )

    def tensors(self, slot: int, slots: Slots) -> tuple[Tensor, Tensor]:
        """Video and waveform of a lent slot, which is given back once both are gone.

        They share one storage, as does every tensor that looks into them.
        """
        layout = self.layout
        whole = self._block.array(np.uint8, (layout.size,), slot * layout.size)
        weakref.finalize(whole, slots.give_back, slot).atexit = False
        storage = torch.from_numpy(whole)
        video = storage[: math.prod(layout.video_shape)].view(layout.video_shape)
        sound = storage[layout.waveform_at :][: layout.batch * layout.samples * 2]
        return video, sound.view(torch.int16).view(layout.batch, layout.samples)

    def pin(self) -> None:
        """Page-lock the ring, so that copies to the GPU run beside everything else.

        Where CUDA refuses, copies wait for the host, which is said once.
        """
        address = np.frombuffer(self._block.memory, np.uint8).ctypes.data
        cudart: Any = torch.cuda.cudart()
        status = cudart.cudaHostRegister(address, self.size, 0)
        if int(status) != 0:
            log = logging.getLogger(__name__)
            log.warning(
                "CUDA does not page-lock the %.0f MiB of the batches (error %d): copies to the "
                "GPU will not overlap with training",
                self.size / 2**20,
                int(status),
            )
            return
        # The memory is unmapped with the block, which must not happen while it is registered.
        weakref.finalize(self._block, _unpin, cudart, address, self._block.memory)


def _unpin(cudart: Any, address: int, memory: object) -> None:
    cudart.cudaHostUnregister(address)
