"""The patch embedding on a CPU: its meaning, its gradients, what it keeps and what it refuses."""

from functools import partial

import pytest
import torch
from patch_cases import CASES, PatchCase, dense_patches, token_index
from torch import Tensor
from torch.nn import functional as F

from avmae_kernels.patch_embed import patch_embed_visible, patch_embed_visible_reference
from avmae_kernels.patches import view_clips

WIDTH = 24


def parameters(case: PatchCase, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    N, P = dense_patches(case).shape[1:]
    shapes = {"weight": (WIDTH, P), "bias": (WIDTH,), "pos": (N, WIDTH)}
    return {
        name: torch.randn(shape, dtype=dtype, generator=generator).requires_grad_()
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_equals_the_embedding_of_dense_patches(name: str) -> None:
    """Forward and every gradient in float64, against patches read a second way."""
    case = CASES[name]().to(torch.float64)
    index, leaves = token_index(case, min(5, dense_patches(case).shape[1])), parameters(case)
    got = patch_embed_visible(case.source, index, **leaves, patch=case.patch, **case.view)
    dense = dense_patches(case).double()
    if case.source.dtype == torch.uint8:
        dense = dense * (2 / 255) - 1
    picked = dense.gather(1, index[..., None].expand(-1, -1, dense.shape[2]))
    expected = F.linear(picked, leaves["weight"], leaves["bias"]) + leaves["pos"][index]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    grad_out = torch.randn_like(got)
    grads = torch.autograd.grad(got, list(leaves.values()), grad_out)
    expected_grads = torch.autograd.grad(expected, list(leaves.values()), grad_out)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-12, atol=1e-12)


def test_reference_is_the_same_function() -> None:
    case = CASES["crop-flip"]()
    index, leaves = token_index(case, 5), parameters(case)
    arguments = {
        "source": case.source,
        "visible": index,
        **leaves,
        "patch": case.patch,
        **case.view,
    }
    got, expected = patch_embed_visible(**arguments), patch_embed_visible_reference(**arguments)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    case = CASES["flip"]()
    embed = partial(patch_embed_visible, case.source, token_index(case, 3), patch=case.patch)
    leaves = parameters(case).values()
    assert torch.autograd.gradcheck(
        lambda *p: embed(*p, **case.view), tuple(leaves), fast_mode=True
    )


def test_patches_are_not_kept_for_the_backward_pass() -> None:
    case = CASES["THWC"]()
    index, leaves = token_index(case, 5), parameters(case)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        patch_embed_visible(case.source, index, **leaves, patch=case.patch)
    given = {case.source.data_ptr(), index.data_ptr()}
    assert kept and {tensor.data_ptr() for tensor in kept} == given


def test_fixed_positions_get_no_gradient() -> None:
    case = CASES["THWC"]()
    index, leaves = token_index(case, 5), parameters(case)
    leaves["pos"].requires_grad_(False)
    patch_embed_visible(case.source, index, **leaves, patch=case.patch).sum().backward()
    assert leaves["pos"].grad is None
    # The gradient of a sum is one number expanded to a tensor without memory of its own.
    assert torch.equal(leaves["bias"].grad, torch.full((WIDTH,), 15.0).double())


def test_unseen_patches_do_not_matter() -> None:
    """NaN in every patch that is not visible, in the neighbours of those that are."""
    case = CASES["floating-video"]()
    index, leaves = token_index(case, 2), parameters(case, torch.float32)
    seen = torch.zeros(dense_patches(case).shape[:2], dtype=torch.bool).scatter_(1, index, True)
    poison = torch.where(seen, 0.0, float("nan")).view(3, 2, 2, 2)
    poison = poison.repeat_interleave(8, dim=2).repeat_interleave(16, dim=3)
    source = case.source + poison[..., None]
    assert source.isnan().any()
    got = patch_embed_visible(source, index, **leaves, patch=case.patch)
    assert torch.equal(got, patch_embed_visible(case.source, index, **leaves, patch=case.patch))


@pytest.mark.parametrize(
    ("weight", "pos", "autocast", "out"),
    [
        (torch.float32, torch.float32, False, torch.float32),
        (torch.bfloat16, torch.bfloat16, False, torch.bfloat16),
        (torch.bfloat16, torch.float32, False, torch.float32),
        (torch.float32, torch.float32, True, torch.float32),
        (torch.float32, torch.bfloat16, True, torch.bfloat16),
        (torch.float64, torch.float64, True, torch.float64),
    ],
    ids=str,
)
def test_dtypes(weight: torch.dtype, pos: torch.dtype, autocast: bool, out: torch.dtype) -> None:
    """Product in the weight's dtype or autocast's, sum in the wider of that and the position's."""
    case = CASES["THWC"]()
    index, exact = token_index(case, 5), parameters(case)
    leaves = {
        name: value.detach().to(pos if name == "pos" else weight).requires_grad_()
        for name, value in exact.items()
    }
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = patch_embed_visible(case.source, index, **leaves, patch=case.patch)
    assert got.dtype == out
    got.float().sum().backward()
    assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves.values())
    expected = patch_embed_visible_reference(case.source, index, **exact, patch=case.patch)
    # Inputs, sum and result each rounded once; a sum of 96 products of size 1 is about 10.
    narrow = torch.bfloat16 in (weight, pos) or (autocast and weight != torch.float64)
    error = (got.double() - expected).abs().max()
    assert error <= 0.25 if narrow else error <= 1e-4
    if narrow:
        assert error > 1e-4, "the product was not taken in bf16"


def test_compiled_whole() -> None:
    case = CASES["crop-flip"]()
    index, leaves = token_index(case, 5), parameters(case, torch.float32)

    def step(source: Tensor, index: Tensor, *leaves: Tensor) -> Tensor:
        return patch_embed_visible(source, index, *leaves, case.patch, **case.view).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for run in (step, compiled):
        for leaf in leaves.values():
            leaf.grad = None
        loss = run(case.source, index, *leaves.values())
        loss.backward()
        grads = [leaf.grad for leaf in leaves.values()]
        if run is step:
            expected = [loss, *grads]
    torch.testing.assert_close([loss, *grads], expected)


@pytest.mark.parametrize("name", ["THWC", "crop-flip", "I420", "spectrogram"])
def test_operator_contract(name: str) -> None:
    case = CASES[name]()
    index, leaves = token_index(case, 3), parameters(case, torch.float32)
    view = view_clips("test", case.source, case.patch, **case.view)
    ops = torch.ops.avmae
    arguments = (*view, index, *leaves.values(), torch.float32)
    torch.library.opcheck(ops.patch_embed_visible.default, arguments)
    arguments = (torch.randn(3, 3, WIDTH), *view, index, torch.float32, leaves["pos"].shape[0])
    torch.library.opcheck(ops.patch_embed_visible_backward.default, arguments)


def test_meta_tensors() -> None:
    with torch.device("meta"):
        source = torch.empty(2, 16, 224, 224, 3, dtype=torch.uint8)
        index = torch.empty(2, 157, dtype=torch.int64)
        weight, bias, pos = torch.empty(768, 1536), torch.empty(768), torch.empty(1568, 768)
    assert patch_embed_visible(source, index, weight, bias, pos, (2, 16, 16)).shape == (2, 157, 768)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=["no-clip", "no-token"])
def test_nothing_to_embed(shape: tuple[int, int]) -> None:
    source = torch.zeros(shape[0], 4, 16, 24, 3, dtype=torch.uint8)
    index, leaves = torch.zeros(shape, dtype=torch.int64), parameters(CASES["THWC"]())
    got = patch_embed_visible(source, index, **leaves, patch=(2, 4, 4))
    assert got.shape == (*shape, WIDTH)
    got.sum().backward()
    assert all(leaf.grad.abs().max() == 0 for leaf in leaves.values())


def test_double_backward_is_refused() -> None:
    case = CASES["THWC"]()
    index, leaves = token_index(case, 5), parameters(case)
    out = patch_embed_visible(case.source, index, **leaves, patch=case.patch)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves["weight"], create_graph=True)
    with pytest.raises(NotImplementedError, match="patch_embed_visible has no second derivative"):
        grad.sum().backward()


VIDEO = torch.zeros(2, 4, 8, 8, 3, dtype=torch.uint8)
ARGUMENTS = {
    "source": VIDEO,
    "visible": torch.zeros(2, 3, dtype=torch.int64),
    "weight": torch.zeros(5, 96),
    "bias": torch.zeros(5),
    "pos": torch.zeros(8, 5),
    "patch": (2, 4, 4),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 95)}, "P = 96 columns of weight for patch"),
        ({"weight": torch.zeros(96)}, r"weight \[D, P\], bias \[D\], pos \[N, D\]"),
        ({"bias": torch.zeros(6)}, r"weight \[D, P\], bias \[D\], pos .*bias float32 \[6\]"),
        ({"pos": torch.zeros(8, 6)}, r"pos \[N, D\].*pos float32 \[8, 6\]"),
        ({"pos": torch.zeros(5, 8).T}, "bias and pos contiguous"),
        ({"visible": torch.zeros(2, 3)}, r"visible int64 \[B, count\].*visible float32"),
        ({"source": VIDEO.int()}, "uint8 or floating video or a floating spectrogram"),
        (
            {
                "source": torch.zeros(2, 8, 8, dtype=torch.uint8),
                "weight": torch.zeros(5, 16),
                "patch": (4, 4),
            },
            "uint8 or floating video or a floating spectrogram",
        ),
        ({"source": VIDEO.float().requires_grad_()}, "a source without requires_grad"),
        ({"source": VIDEO[..., :1]}, "3 colour channels"),
        ({"flip": torch.zeros(3, dtype=torch.bool)}, r"flip bool \[2\]"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"patch_embed_visible wants.*{message}"):
        patch_embed_visible(**{**ARGUMENTS, **change})
