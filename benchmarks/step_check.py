"""Does a row compute what the reference does? Asked before every timing, on the timed batch."""

import torch
from torch import Tensor

from avmae_fast.models import TokenMask
from avmae_fast.reference import ReferenceMAE
from benchmarks.step_rows import Row, autocast
from benchmarks.workload import HostBatch, Masks, Workload, chunk_size

Gradient = dict[str, Tensor]


class Truth:
    """Loss and gradient of one batch: the reference in more precision than any row works in.

    float32 without TF32 on a GPU, where rows work in bf16; float64 on a CPU, where they do in
    float32. The yardstick is how far the same reference in the rows' own precision is away.
    """

    def __init__(self, work: Workload, host: HostBatch) -> None:
        self.work, self.host = work, host
        self.masks = work.masks(host.clips.keys)
        dtype = torch.float32 if work.device.type == "cuda" else torch.float64
        self.ulp = torch.finfo(torch.bfloat16 if work.device.type == "cuda" else torch.float32).eps
        tf32 = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            self.loss, self._exact = self._chunked(dtype, wide=True)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = tf32
        loss, plain = self._chunked(torch.float32, wide=False)
        self.allowed_gradient = 2 * self.distance(plain) + self.ulp
        self.allowed_loss = 2 * abs(loss - self.loss) + 4 * self.ulp * abs(self.loss)

    def _chunked(self, dtype: torch.dtype, wide: bool) -> tuple[float, Gradient]:
        """Loss and gradient, clips in equal parts: the mean of theirs."""
        work, host = self.work, self.host
        with torch.device(work.device):
            model = ReferenceMAE(work.model)
        model.load_state_dict(work.weights)
        model = model.to(work.device, dtype)
        size, total = chunk_size(work.batch), 0.0
        assert host.clips.video is not None
        for start in range(0, work.batch, size):
            rows = slice(start, start + size)
            masks: Masks = {
                m: TokenMask(mask.visible[rows], mask.masked[rows])
                for m, mask in self.masks.items()
            }
            video = host.clips.video[rows].to(work.device)
            audio = host.mel[rows].to(work.device)
            if wide:
                loss = model(video, audio, masks=masks).loss
            else:
                with autocast(work.device):
                    loss = model(video, audio, masks=masks).loss
            share = size / work.batch
            (loss * share).backward()
            total += share * loss.item()
        gradient = {name: _host(p.grad) for name, p in model.named_parameters()}
        return total, gradient

    def distance(self, gradient: Gradient) -> float:
        """|gradient - exact| / |exact| over all parameters."""
        error = size = 0.0
        for name, exact in self._exact.items():
            wide = exact.to(self.work.device, torch.float64)
            error += float((gradient[name].to(wide) - wide).square().sum())
            size += float(wide.square().sum())
        return (error / size) ** 0.5

    def check(self, row: Row) -> dict[str, float]:
        """The row's errors and what is allowed.

        Raises:
            AssertionError: its loss or gradient is too far off to be timed.
        """
        loss = float(row.backward(self.host, self.host, self.masks))
        gradient = {n: p.grad for n, p in row.model.named_parameters() if p.grad is not None}
        found = {
            "loss_error": abs(loss - self.loss),
            "loss_allowed": self.allowed_loss,
            "gradient_error": self.distance(gradient),
            "gradient_allowed": self.allowed_gradient,
        }
        # Written so that a NaN fails.
        if not found["loss_error"] <= found["loss_allowed"]:
            raise AssertionError(f"loss {loss} is not the reference's {self.loss}: {found}")
        if not found["gradient_error"] <= found["gradient_allowed"]:
            raise AssertionError(f"the gradient is not the reference's: {found}")
        return found


def _host(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.detach().cpu()
