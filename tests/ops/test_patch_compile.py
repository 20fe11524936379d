"""Embedding, assembly and loss in a row under torch.compile, with and without autocast."""

import torch
from torch import Tensor
from torch.nn import functional as F

from avmae_kernels.assemble import assemble_decoder
from avmae_kernels.patch_embed import patch_embed_visible
from avmae_kernels.reconstruction_loss import reconstruction_loss

WIDTH, TOKENS, PATCH = 24, 48, (2, 4, 4)


def test_full_graph_for_any_number_of_clips_and_tokens() -> None:
    torch._dynamo.reset()
    graphs = 0
    shapes = [(WIDTH, 96), (WIDTH,), (TOKENS, WIDTH), (WIDTH,), (96, WIDTH)]
    leaves = [torch.randn(shape).requires_grad_() for shape in shapes]

    def step(video: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        weight, bias, pos, mask_token, head = leaves
        x = patch_embed_visible(video, visible, weight, bias, pos, PATCH)
        x = assemble_decoder(x, visible, pos, mask_token, masked, pos)
        pred = F.linear(x[:, visible.shape[1] :], head)
        return reconstruction_loss(pred, video, masked, PATCH, "patch", torch.ones(len(video)))

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(step, fullgraph=True, backend=count)
    for batch, visible in ((2, 7), (3, 9), (4, 12), (5, 13)):
        video = torch.randint(0, 256, (batch, 4, 16, 24, 3), dtype=torch.uint8)
        place = torch.stack([torch.randperm(TOKENS) for _ in range(batch)])
        given = video, place[:, :visible].contiguous(), place[:, visible:].contiguous()
        for autocast in (False, True):
            results = []
            for run in (step, compiled):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = run(*given)
                results.append([loss, *torch.autograd.grad(loss, leaves)])
            torch.testing.assert_close(*results, rtol=0, atol=0)
    # With and without autocast: one for the first sizes, one for all others.
    assert graphs == 4
