"""Patches, sequences and the loss launched for GPUs that are not here: what compiles, how often."""

import re
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (Linux: pip install triton)")

from launches import compile_only  # noqa: E402

from avmae_kernels import (  # noqa: E402
    assemble,
    patch_embed,
    patch_gather,
    reconstruction_loss,
    reconstruction_loss_kernels,
    row_sums,
)
from avmae_kernels._resources import CompileCase, compile_kernel  # noqa: E402
from avmae_kernels.patches import view_clips  # noqa: E402

VIDEO = torch.empty(8, 4, 64, 64, 3, dtype=torch.uint8)
PLANES = torch.empty(8, 4, 96, 64, dtype=torch.uint8)
PATCH, TOKENS, VALUES = (2, 16, 16), 32, 1536


def _launch_all(batch: int, visible: int, width: int = 384) -> None:
    view = view_clips("test", VIDEO[:batch], PATCH)
    # As in released inpainting, whose indices are slices of one, with any alignment.
    every = torch.arange(TOKENS).expand(batch, -1)
    index, rest = every[:, :visible], every[:, visible:]
    weight, bias, pos = torch.empty(width, VALUES), torch.empty(width), torch.empty(TOKENS, width)
    for place in (rest, index):
        tokens = patch_embed._by_kernel(*view, place, weight, bias, pos, torch.bfloat16)
        patch_embed._backward_by_kernel(tokens, *view, place, torch.bfloat16, TOKENS)
    for in_grid in (False, True):
        sequence = assemble._by_kernel(tokens, index, pos, bias, rest, pos, in_grid)
        assemble._backward_by_kernel(sequence, index, rest, in_grid, TOKENS, TOKENS)
    pred, valid = torch.empty(batch, TOKENS - visible, VALUES), torch.empty(batch)
    arguments = (rest, "patch", valid, True, True)
    _, difference, factor = reconstruction_loss._by_kernel(pred, *view, *arguments)
    # The gradients of both modalities' losses lie side by side: the second is not aligned.
    for grad in torch.empty(2).unbind():
        reconstruction_loss_kernels.launch_scale(difference, factor, grad)
    planes = view_clips("test", PLANES[:batch], PATCH, "I420")
    patch_gather.launch_gather(planes, index, torch.bfloat16)
    reconstruction_loss._by_kernel(pred, *planes, *arguments)


@pytest.mark.parametrize("arch", [80, 90])
def test_counts_compile_nothing_anew(arch: int) -> None:
    counts = [
        (batch, visible) for batch in (0, 1, 2, 3, 8) for visible in (*range(1, 32, 4), 0, 32)
    ]
    assert len(counts) == 50
    with compile_only(arch) as compiled:
        for batch, visible in counts:
            _launch_all(batch, visible)
    names = sorted(name.split()[0] for name in compiled)
    # The sum of rows with and without an index, pixels and planes; every other kernel once.
    assert names == [
        "_add_position_kernel",
        "_assemble_kernel",
        "_assemble_kernel",
        "_column_sums_kernel",
        "_difference_kernel",
        "_difference_kernel",
        "_gather_kernel",
        "_gather_kernel",
        "_partial_sums_kernel",
        "_partial_sums_kernel",
        "_scale_kernel",
        "_sum_by_position_kernel",
        "_total_kernel",
    ], compiled


def test_released_shapes_are_launched_with_wide_accesses() -> None:
    """What the compile cases assume of alignments is what a launch finds out about its tensors."""
    with compile_only(90):
        _launch_all(2, 5)
    for kernel, width in (
        (patch_gather._gather_kernel, "ld.global.v4.b32"),
        (patch_embed._add_position_kernel, "ld.global.v4.b32"),
        (assemble._assemble_kernel, "ld.global.v4.b32"),
        (row_sums._partial_sums_kernel, "ld.global.v4.b32"),
        (row_sums._sum_by_position_kernel, "ld.global.v4.b32"),
        (reconstruction_loss_kernels._difference_kernel, "ld.global.v4.b32"),
        (reconstruction_loss_kernels._scale_kernel, "ld.global.v4.b32"),
    ):
        compiled = kernel.device_caches[max(kernel.device_caches)][0].values()
        wide = [binary for binary in compiled if width in binary.asm["ptx"]]
        # Planes are gathered a byte at a time.
        assert len(wide) == len(compiled) - (kernel is patch_gather._gather_kernel), kernel


MODULES = (patch_gather, patch_embed, assemble, row_sums, reconstruction_loss_kernels)
CASES = [case for module in MODULES for case in module.compile_cases() if case.arch == 90]


@pytest.mark.parametrize(
    "case",
    {
        (case.kernel, "crop" in case.config, "planes" in case.config): case for case in CASES
    }.values(),
    ids=lambda case: case.name,
)
def test_rows_are_addressed_in_64_bits(case: CompileCase) -> None:
    """Every access to a tensor of rows: B * T * H * W * 3 passes 2**31 at 892 released clips."""
    text = compile_kernel(case).asm["ttir"]
    assert list(_narrow_accesses(text)) == []


def _narrow_accesses(text: str) -> Iterator[str]:
    """Two-dimensional loads and stores on whose way from a pointer no offset has 64 bits."""
    defined = dict(re.findall(r"(%\w+) = (tt\.(?:addptr|broadcast|splat|expand_dims) .*)", text))
    for kind, pointer in re.findall(r"tt\.(load|store) (%\w+),.*tensor<\d+x\d+x!tt\.ptr", text):
        widths, at = set(), pointer
        while at in defined:
            widths |= set(re.findall(r"x(i\d+)> loc", defined[at]))
            at = re.search(r"%\w+", defined[at])[0]
        if "i64" not in widths and widths:
            yield f"{kind} {pointer} from {at}"
