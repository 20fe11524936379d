"""The rows of the step benchmark: how each implementation gets from a host batch to new weights.

A   the reference in eager PyTorch: float inputs copied as they come, SDPA as torch chooses it.
B   the same under torch.compile.
B+  `benchmarks.rival`, compiled with autotuning; see there.
C   the engine through its public parts: `InputStage.ahead`, `AudiovisualMAE`, `ReleasedAdamW`.

Every row starts from the same weights, works under bf16 autocast on a GPU and float32 on a CPU, and
takes a plain step: no gradient norm, no value read back.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from avmae_fast.config import Modality
from avmae_fast.data.loader import Batch
from avmae_fast.models import AudiovisualMAE, TokenMask
from avmae_fast.models.blocks import set_checkpoint
from avmae_fast.models.memory import Checkpoint
from avmae_fast.reference import ReferenceMAE
from avmae_fast.reference.masking import masked_count
from avmae_fast.train.inputs import InputStage
from avmae_fast.train.optim import ReleasedAdamW, parameter_groups
from avmae_fast.train.step import CapturedStep
from benchmarks.harness import BenchmarkError
from benchmarks.put_back import Part
from benchmarks.rival import Prefetcher, RivalMAE
from benchmarks.workload import HostBatch, Masks, Workload

ROWS = ("A", "B", "B+", "C")
_RATE = 1e-4  # of every optimiser; its value costs nothing

# cuDNN's attention asks for its own plan a shape, so shapes are compiled as they are.
RIVAL_MODES = ("max-autotune-no-cudagraphs", "max-autotune", "default")


class Row:
    """One implementation, ready to step. Not to be used after `close`.

    model: holds the parameters, under the reference's names. note: what is worth knowing of it.
    """

    note = ""

    def __init__(self, work: Workload, model: nn.Module) -> None:
        self.work = work
        self.device = work.device
        model.load_state_dict(work.weights)
        self.model = model.to(work.device)
        self.optimizer: torch.optim.Optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        kernels, others = (group["params"] for group in parameter_groups(self.model))
        groups = [{"params": kernels}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=_RATE, betas=(0.9, 0.95), weight_decay=0.05)

    def autocast(self) -> AbstractContextManager[object]:
        return autocast(self.device)

    def loss(self, host: HostBatch, coming: HostBatch, masks: Masks | None = None) -> Tensor:
        """From the host's memory to the loss; `coming` is the batch of the step after."""
        raise NotImplementedError

    def backward(self, host: HostBatch, coming: HostBatch, masks: Masks | None = None) -> Tensor:
        """The loss, and its gradient in every parameter."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(host, coming, masks)
        loss.backward()
        return loss.detach()

    def step(self, host: HostBatch, coming: HostBatch) -> Tensor:
        loss = self.backward(host, coming)
        self.optimizer.step()
        return loss

    def park(self, device: torch.device) -> None:
        """Move weights and optimiser state, so that another row has the card to itself."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.to(device)
        for state in self.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.ndim:
                    state[name] = value.to(device)

    def close(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        del self.model, self.optimizer


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 on a GPU; nothing on a CPU, where the rows are tried for their results."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def random_masks(work: Workload) -> Masks:
    """Masks by a sort of random numbers on the device, as everybody draws them.

    Of one type and layout with those of the check, so that nothing is compiled a second time.
    """
    masks: Masks = {}
    for m in work.model.modalities:
        spec = work.model.input(m)
        order = torch.rand(work.batch, spec.tokens, device=work.device).argsort(dim=1)
        count = masked_count(spec.tokens, spec.mask_ratio)
        visible, masked = order[:, count:].contiguous(), order[:, :count].contiguous()
        masks[m] = TokenMask(visible, masked)
    return masks


class ReferenceRow(Row):
    """A, and under torch.compile B."""

    def __init__(self, work: Workload, compiled: bool = False) -> None:
        with torch.device(work.device):
            model = ReferenceMAE(work.model)
        super().__init__(work, model)

        def loss(video: Tensor, audio: Tensor, masks: Mapping[Modality, Any]) -> Tensor:
            return model(video, audio, masks=masks).loss

        self._loss = _compiled(loss, work) if compiled else loss

    def loss(self, host: HostBatch, coming: HostBatch, masks: Masks | None = None) -> Tensor:
        video = host.frames.to(self.device, non_blocking=True)
        audio = host.mel.to(self.device, non_blocking=True)
        with self.autocast():
            return self._loss(video, audio, masks or random_masks(self.work))


class RivalRow(Row):
    """B+, compiled in one of `RIVAL_MODES`."""

    def __init__(self, work: Workload, mode: str = RIVAL_MODES[0]) -> None:
        with torch.device(work.device):
            model = RivalMAE(work.model)
        super().__init__(work, model)
        self.note = f"torch.compile mode {mode}"
        # Only where graphs are captured do last step's outputs live in memory that is taken anew.
        self._graphs = mode == "max-autotune" and work.device.type == "cuda"
        self._loss: Callable[..., Tensor] = _compiled(model, work, mode)
        self._prefetcher = Prefetcher(work.device)

    def _optimizer(self) -> torch.optim.Optimizer:
        kernels, others = (group["params"] for group in parameter_groups(self.model))
        groups = [{"params": kernels}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=_RATE, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def loss(self, host: HostBatch, coming: HostBatch, masks: Masks | None = None) -> Tensor:
        video, audio = self._prefetcher.take(_uint8(host), _uint8(coming))
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with self.autocast():
            return self._loss(video, audio, masks or random_masks(self.work))


def _compiled(call: Any, work: Workload, mode: str | None = None) -> Any:
    """`call` under torch.compile for this one shape; a mode is the default compiler's alone."""
    mode = mode if work.compiler == "inductor" else None
    return torch.compile(call, dynamic=False, backend=work.compiler, mode=mode)


def _uint8(host: HostBatch) -> tuple[Tensor, Tensor]:
    assert host.clips.video is not None
    return host.clips.video, host.mel


class EngineRow(Row):
    """C, with what memory policy, parts and surroundings a variant asks for."""

    def __init__(
        self,
        work: Workload,
        part: Part = nullcontext,
        checkpoint: Checkpoint = "selective",
        compiled: bool = False,
        float_frames: bool = False,
        foreach: bool = False,
    ) -> None:
        self._foreach = foreach
        with torch.device(work.device):
            model = AudiovisualMAE(work.model)
        super().__init__(work, model)
        set_checkpoint(model, checkpoint)
        self._part, self._float = part, float_frames
        self._stage = InputStage(work.config, work.device)
        self._queue: deque[Batch] = deque()
        self._inputs: Iterator[dict[str, Any]] = iter(())
        self._expected: Batch | None = None

        def loss(**inputs: Any) -> Tensor:
            return model(**inputs).loss

        self._loss = _compiled(loss, work) if compiled else loss

    def _optimizer(self) -> torch.optim.Optimizer:
        if self._foreach:
            return super()._optimizer()
        return ReleasedAdamW(parameter_groups(self.model), lr=_RATE)

    def loss(self, host: HostBatch, coming: HostBatch, masks: Masks | None = None) -> Tensor:
        inputs = self._ahead(host.clips, coming.clips)
        if self._float:
            inputs["video"] = host.frames.to(self.device, non_blocking=True)
        if masks is not None:
            inputs["masks"] = masks
        with self.autocast():
            return self._loss(**inputs)

    def _ahead(self, batch: Batch, coming: Batch) -> dict[str, Any]:
        """The inputs of `batch`, while those of `coming` travel: as the training loop has them."""
        if self._expected is not batch:
            self._queue = deque([batch])
            self._inputs = self._stage.ahead(self._batches(self._queue))
        self._queue.append(coming)
        self._expected = coming
        return next(self._inputs)

    @staticmethod
    def _batches(queue: deque[Batch]) -> Iterator[Batch]:
        while queue:
            yield queue.popleft()

    def backward(self, host: HostBatch, coming: HostBatch, masks: Masks | None = None) -> Tensor:
        # Parts are called again in the backward pass, where something is computed a second time.
        with self._part():
            return super().backward(host, coming, masks)


class GraphRow(EngineRow):
    """C with its steps launched as CUDA graphs, as `train.cuda_graph` has them."""

    def __init__(self, work: Workload) -> None:
        if work.device.type != "cuda":
            raise BenchmarkError("CUDA graphs want a GPU")
        self._captured: CapturedStep | None = None
        super().__init__(work)

    def _optimizer(self) -> torch.optim.Optimizer:
        return ReleasedAdamW(parameter_groups(self.model), lr=_RATE, capturable=True)

    def step(self, host: HostBatch, coming: HostBatch) -> Tensor:
        inputs = self._ahead(host.clips, coming.clips)
        if self._captured is None:
            assert isinstance(self.optimizer, ReleasedAdamW)
            assert isinstance(self.model, AudiovisualMAE)
            self._captured = CapturedStep(self.model, self.optimizer, self.autocast)
            for _ in range(CapturedStep.EAGER_STEPS):
                self._captured(iter([inputs]), _RATE)
        return self._captured(iter([inputs]), _RATE)[0]

    def park(self, device: torch.device) -> None:
        # A graph knows where weights were.
        self._captured = None
        super().park(device)

    def close(self) -> None:
        self._captured = None
        super().close()


def build(name: str, work: Workload, rival_mode: str = RIVAL_MODES[0]) -> Row:
    """The row A, B, B+ or C."""
    if name == "B+":
        return RivalRow(work, rival_mode)
    return EngineRow(work) if name == "C" else ReferenceRow(work, compiled=name == "B")


def sdpa_choice(work: Workload, length: int, head_dim: int) -> str | None:
    """Which back end torch's SDPA takes by itself for the rows' attention; None on a CPU."""
    if work.device.type != "cuda":
        return None
    q = torch.empty(2, 8, length, head_dim, dtype=torch.bfloat16, device=work.device)
    q.requires_grad_()
    number = torch._fused_sdp_choice(q, q, q)
    names = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
    return names.get(number, str(number))
