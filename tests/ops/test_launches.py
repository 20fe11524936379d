"""LayerNorm and GELU launched for GPUs that are not here: what compiles, and how often."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (Linux: pip install triton)")

from launches import compile_only  # noqa: E402

from avmae_kernels import gelu, norm, norm_kernels  # noqa: E402
from avmae_kernels._resources import CompileCase, compile_kernel  # noqa: E402

TOTALS = [*range(38), 48, 64, 100, 127, 128, 157, 306, 999, 1024, 1568, 2064, 4096]


def _launch_all(tokens: int, width: int = 384) -> None:
    x, weight = torch.empty(tokens, width), torch.empty(width)
    update, scale = x.bfloat16(), torch.empty(tokens)
    arguments = (x, update, weight, scale, weight, weight, 1e-6, torch.bfloat16)
    total, y, mean, rstd = norm._by_kernel(*arguments)
    saved = (total, mean, rstd, weight, scale)
    norm._backward_by_kernel(x, y, *saved, torch.float32, torch.bfloat16, True)
    z = gelu._launch_forward(x, weight, "tanh")
    gelu._launch_backward(z, x, weight, "tanh")


@pytest.mark.parametrize("arch", [80, 90])
def test_the_number_of_tokens_compiles_nothing_anew(arch: int) -> None:
    assert len(set(TOTALS)) == 50
    with compile_only(arch) as compiled:
        for tokens in TOTALS:
            _launch_all(tokens)
    # Two kernels of each operation; the sum of partials, once for each width.
    assert len(compiled) == 5, compiled


@pytest.mark.parametrize(
    "case",
    [case for case in norm_kernels.compile_cases() + gelu.compile_cases() if case.arch == 90][::9],
    ids=lambda case: case.name,
)
def test_rows_are_addressed_in_64_bits(case: CompileCase) -> None:
    """T * D passes 2**31: at 4096 hidden channels from 524288 tokens on."""
    ttir = compile_kernel(case).asm["ttir"]
    addresses = re.findall(
        r"tt\.addptr .* : tensor<(\d+)x(\d+)x!tt\.ptr<\w+>>, tensor<.*x(i\d+)>", ttir
    )
    rows, columns = (
        case.constexprs["ROWS"],
        case.constexprs.get("BLOCK_D", case.constexprs.get("BLOCK_M")),
    )
    widths = {width for R, C, width in addresses if (int(R), int(C)) == (rows, columns)}
    assert widths == {"i64"} if rows > 1 else "i64" in widths
