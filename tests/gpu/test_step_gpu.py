"""The captured step on a GPU: the same bits as the step launched kernel by kernel."""

import pytest
import torch
from tiny import tiny_batch, tiny_config

from avmae_fast.models import AudiovisualMAE
from avmae_fast.models.blocks import set_checkpoint
from avmae_fast.models.layout import TokenMask
from avmae_fast.train.optim import ReleasedAdamW, parameter_groups
from avmae_fast.train.readback import Readback
from avmae_fast.train.step import CapturedStep, TrainStep

STEPS = 8


def _batch(config, seed: int) -> dict:
    batch = tiny_batch(config, batch=4, seed=seed)
    masks = {
        m: TokenMask(mask.visible.cuda(), mask.masked.cuda()) for m, mask in batch["masks"].items()
    }
    return {"video": batch["video"].cuda(), "audio": batch["audio"].float().cuda(), "masks": masks}


def _train(step_type: type[TrainStep], accumulate: int, checkpoint: str, decoding: str) -> tuple:
    torch.manual_seed(0)
    config = tiny_config(decoding=decoding)
    model = AudiovisualMAE(config).cuda()
    set_checkpoint(model, checkpoint)
    step = step_type(
        model,
        ReleasedAdamW(parameter_groups(model), capturable=True),
        lambda: torch.autocast("cuda", torch.bfloat16),
        accumulate,
        clip_grad=1.0,
    )
    readback, reads = Readback(), []
    for number in range(STEPS):
        batches = [_batch(config, accumulate * number + i) for i in range(accumulate)]
        if number == STEPS - 2:
            batches[-1]["audio"][0] = float("nan")
        reads += readback.push(number, step(iter(batches), 1e-3 * (number + 1)))
    return reads + readback.drain(), model.state_dict()


@pytest.mark.parametrize("decoding", ["joint", "shared"])
@pytest.mark.parametrize("checkpoint", ["none", "selective", "full"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_captured_equals_launched(accumulate: int, checkpoint: str, decoding: str) -> None:
    reads, weights = _train(TrainStep, accumulate, checkpoint, decoding)
    captured_reads, captured_weights = _train(CapturedStep, accumulate, checkpoint, decoding)
    assert [read.step for read in captured_reads] == list(range(STEPS))
    torch.testing.assert_close(
        [torch.tensor(read.values) for read in captured_reads],
        [torch.tensor(read.values) for read in reads],
        rtol=0, atol=0, equal_nan=True,
    )  # fmt: skip
    torch.testing.assert_close(captured_weights, weights, rtol=0, atol=0)
