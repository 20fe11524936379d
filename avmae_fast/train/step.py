"""One optimiser step: forward and backward of its micro-batches, clipping, update.

A step whose losses or gradient are not finite changes neither weights nor moments, nor what a
BatchNorm keeps of its inputs. That is found and heeded on the device, so the host need not wait for
a step before it launches the next.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from avmae_fast.models import AudiovisualMAE, TokenMask, TrainedClassifier
from avmae_fast.train.distributed import average, gradients_stay, has_peers, like, whole
from avmae_fast.train.optim import ReleasedAdamW, set_learning_rate
from avmae_fast.train.sgd import ReleasedSGD, clip_to_norm

Autocast = Callable[[], AbstractContextManager[object]]
Inputs = Mapping[str, Any]


class TrainStep:
    """Takes micro-batches, leaves updated weights and what the step came to.

    Args:
        accumulate: micro-batches a step; their gradients are averaged.
        clip_grad: largest norm of the gradient, None for no limit.
        called: what is called in place of the model where several processes train it.

    names: what the values of a step are: `loss`, `loss_<name>` of each of the model's
        `loss_names`, `grad_norm` before clipping; two flags follow them, see `Read`.
    """

    def __init__(
        self,
        model: AudiovisualMAE | TrainedClassifier,
        optimizer: ReleasedAdamW | ReleasedSGD,
        autocast: Autocast,
        accumulate: int = 1,
        clip_grad: float | None = None,
        called: nn.Module | None = None,
    ) -> None:
        self.model, self.optimizer, self.autocast = model, optimizer, autocast
        self.called = model if called is None else called
        self.accumulate = accumulate
        self.clip_limit = math.inf if clip_grad is None else clip_grad
        self.names = ("loss", *(f"loss_{name}" for name in model.loss_names), "grad_norm")
        device = next(model.parameters()).device
        # Means over micro-batches, then the two flags.
        self._tally = torch.zeros(len(self.names) + 1, dtype=torch.float64, device=device)
        self._last: Inputs | None = None
        # The forward pass changes them; of the models here a linear probe alone has any.
        self._statistics = [
            buffer
            for module in self.model.modules()
            if isinstance(module, nn.BatchNorm1d)
            for buffer in module.buffers()
        ]
        self._statistics_before = [buffer.clone() for buffer in self._statistics]

    def __call__(
        self, micro_batches: Iterator[Inputs], lr: float, stop_asked: bool = False
    ) -> Tensor:
        """Do one step over `accumulate` micro-batches, arguments of the model each.

        Where the batches of one of several processes end in an error, its step is done with what
        it had before, so that the others do not wait for it for ever, and changes nothing anywhere;
        they see the flag, and the error goes on its way here.

        Returns:
            The values of the step, float64, in the order of `names`, and the flags, on the model's
            device: means over all processes.
        """
        set_learning_rate(self.optimizer, lr)
        error = None
        for number in range(self.accumulate):
            try:
                inputs = next(micro_batches)
            except Exception as raised:
                if self._last is None:
                    raise
                error, inputs = raised, self._last
            self._backward(inputs, number == 0, number == self.accumulate - 1)
            # Kept for the others' sake alone.
            self._last = inputs if has_peers() else None
        self._tally[-2].fill_(float(stop_asked))
        self._tally[-1].fill_(float(error is not None))
        values = self._update()
        if error is not None:
            raise error
        return values

    def _backward(self, inputs: Inputs, first: bool, last: bool) -> None:
        """Add a micro-batch's gradient and losses to those of the step."""
        if first:
            self.optimizer.zero_grad()
            self._tally.zero_()
            for kept, buffer in zip(self._statistics_before, self._statistics, strict=True):
                kept.copy_(buffer)
        with gradients_stay(self.called, not last):
            with self.autocast():
                out = self.called(**inputs)
            (out.loss / self.accumulate).backward()
        losses = torch.stack([out.loss, *(out.losses[name] for name in self.model.loss_names)])
        self._tally[:-2].add_(losses.detach(), alpha=1 / self.accumulate)

    def _update(self) -> Tensor:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.clip_limit < math.inf:
            sharded_norm = clip_to_norm(parameters, self.clip_limit)
        else:
            sharded_norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        average(self._tally)
        norm = whole(sharded_norm).double()
        values = torch.cat([self._tally[:-2], norm[None], self._tally[-2:]])
        wrong = values.isfinite().all().logical_not() | (values[-1] > 0)
        self.optimizer.step(found_inf=like(parameters[0], wrong.float()))
        for kept, buffer in zip(self._statistics_before, self._statistics, strict=True):
            buffer.copy_(torch.where(wrong, kept, buffer))
        return values


class CapturedStep(TrainStep):
    """The same step as CUDA graphs: the host launches two or three of them, and no kernel.

    The first steps run as they are, so that kernels are compiled, library handles made and the
    optimiser's state is there. Then the forward and backward pass, and the update, are captured
    once, and every step replays them on inputs copied to where the capture found them: all
    micro-batches must have the shapes of the first. The optimiser must be `capturable`.
    """

    EAGER_STEPS = 3

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._eager_left = self.EAGER_STEPS
        self._stream = torch.cuda.Stream()
        self._inputs: Inputs = {}
        self._replays: list[Callable[[], None]] = []

    def __call__(
        self, micro_batches: Iterator[Inputs], lr: float, stop_asked: bool = False
    ) -> Tensor:
        if self._eager_left:
            self._eager_left -= 1
            # Where the capture will be, or autograd would order two streams inside of it.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                values = super().__call__(micro_batches, lr, stop_asked)
            torch.cuda.current_stream().wait_stream(self._stream)
            return values
        set_learning_rate(self.optimizer, lr)
        for number in range(self.accumulate):
            inputs = next(micro_batches)
            if not self._replays:
                self._capture(inputs)
            _overwrite(self._inputs, inputs)
            self._replays[min(number, 1)]()
        self._replays[2]()
        return self._values

    def _capture(self, inputs: Inputs) -> None:
        """Record the first micro-batch, any other one, and the update; nothing is computed."""
        self._inputs = _copies(inputs)
        pool = torch.cuda.graph_pool_handle()

        def update() -> None:
            self._values = self._update()

        first = _record(lambda: self._backward(self._inputs, True, True), pool, self._stream)
        again = first
        if self.accumulate > 1:
            again = _record(lambda: self._backward(self._inputs, False, True), pool, self._stream)
        self._replays = [first, again, _record(update, pool, self._stream)]


def _record(function: Callable[[], None], pool: Any, stream: Any) -> Callable[[], None]:
    """Capture what `function` launches; the result launches it again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        function()
    return graph.replay


def _copies(inputs: Inputs) -> Inputs:
    masks = {
        m: replace(mask, visible=mask.visible.clone(), masked=mask.masked.clone())
        for m, mask in inputs["masks"].items()
    }
    sources = {name: x.clone() for name, x in inputs.items() if isinstance(x, Tensor)}
    return {**sources, "masks": masks}


def _overwrite(kept: Inputs, inputs: Inputs) -> None:
    """Copy every tensor of `inputs` into that of `kept`."""
    ours, theirs = _tensors(kept), _tensors(inputs)
    shapes = {name: x.shape for name, x in ours.items()}
    got = {name: x.shape for name, x in theirs.items()}
    if shapes != got:
        wrong = {
            n: (shapes.get(n), got.get(n)) for n in shapes | got if shapes.get(n) != got.get(n)
        }
        raise ValueError(
            f"a captured step wants micro-batches of one shape; captured, got: {wrong}"
        )
    for name, x in ours.items():
        x.copy_(theirs[name], non_blocking=True)


def _tensors(inputs: Inputs) -> dict[str, Tensor]:
    found = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    masks: Mapping[str, TokenMask] = inputs["masks"]
    for m, mask in masks.items():
        found |= {f"masks.{m}.visible": mask.visible, f"masks.{m}.masked": mask.masked}
    return found
