"""The decoder's sequences on a CPU: both orders, gradients, and what is refused."""

from typing import Any

import pytest
import torch
from assemble_cases import LEAVES, problem
from torch import Tensor

from avmae_kernels.assemble import assemble_decoder, assemble_decoder_reference

B, V, M, D = 3, 5, 11, 24
N = V + M


def arguments(dtype: torch.dtype = torch.float64, *, batch: int = B) -> dict[str, Tensor]:
    return problem(batch, V, M, D, dtype)


def expected_rows(given: dict[str, Tensor], order: str) -> Tensor:
    """The sequence, row by row."""
    clips = []
    for b in range(len(given["tokens"])):
        rows: dict[int, Tensor] = {}
        for k, place in enumerate(given["token_index"][b].tolist()):
            key = place if order == "grid" else k
            rows[key] = given["tokens"][b, k] + given["token_pos"][place]
        for k, place in enumerate(given["mask_index"][b].tolist()):
            key = place if order == "grid" else V + k
            rows[key] = given["mask_token"] + given["mask_pos"][place]
        clips.append(torch.stack([rows[n] for n in range(len(rows))]))
    return torch.stack(clips)


@pytest.mark.parametrize("order", ["grouped", "grid"])
def test_rows_and_gradients(order: Any) -> None:
    given = arguments()
    leaves = [given[name] for name in LEAVES]
    expected = expected_rows(given, order)
    grad_out = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, leaves, grad_out)
    for function in (assemble_decoder, assemble_decoder_reference):
        got = function(**given, order=order)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)
        grads = torch.autograd.grad(got, leaves, grad_out)
        torch.testing.assert_close(grads, expected_grads, rtol=0, atol=1e-14)


def test_grouped_order_needs_no_partition() -> None:
    """As in released inpainting: every clip the same positions, tokens and masks overlapping."""
    given = arguments()
    first = torch.arange(V).expand(B, -1)
    given |= {"token_index": first, "mask_index": torch.arange(M).expand(B, -1)}
    torch.testing.assert_close(assemble_decoder(**given), expected_rows(given, "grouped"))
    got = torch.autograd.grad(assemble_decoder(**given).sum(), [given["token_pos"]])
    # Each of the first V positions was read once in every clip.
    assert torch.equal(got[0], torch.where(torch.arange(N) < V, B, 0)[:, None].expand(-1, D) * 1.0)


@pytest.mark.parametrize("order", ["grouped", "grid"])
@pytest.mark.parametrize(
    "fixed", [LEAVES[:1], LEAVES[1:], ("token_pos", "mask_pos"), ("mask_token",)]
)
def test_only_wanted_gradients(fixed: tuple[str, ...], order: Any) -> None:
    given = arguments()
    for name in fixed:
        given[name].requires_grad_(False)
    assemble_decoder(**given, order=order).square().sum().backward()
    assert all((given[name].grad is None) == (name in fixed) for name in LEAVES)


@pytest.mark.parametrize("order", ["grouped", "grid"])
def test_gradcheck(order: Any) -> None:
    given = arguments()
    index, mask_index = given.pop("token_index"), given.pop("mask_index")

    def assemble(tokens: Tensor, token_pos: Tensor, mask_token: Tensor, mask_pos: Tensor) -> Tensor:
        return assemble_decoder(
            tokens, index, token_pos, mask_token, mask_index, mask_pos, order=order
        )

    assert torch.autograd.gradcheck(assemble, tuple(given[name] for name in LEAVES), fast_mode=True)


@pytest.mark.parametrize("order", ["grouped", "grid"])
@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize(("shown", "hidden"), [(0, N), (N, 0), (1, N - 1)])
def test_empty_parts(shown: int, hidden: int, batch: int, order: Any) -> None:
    given = arguments(batch=batch)
    place = torch.cat([given["token_index"], given["mask_index"]], dim=1)
    given["tokens"] = torch.randn(batch, shown, D).double().requires_grad_()
    given |= {"token_index": place[:, :shown], "mask_index": place[:, shown:]}
    got = assemble_decoder(**given, order=order)
    assert got.shape == (batch, N, D) and not got.isnan().any()
    torch.testing.assert_close(got, assemble_decoder_reference(**given, order=order))
    got.sum().backward()
    # The gradient of a sum is one number expanded to a tensor without memory of its own.
    assert torch.equal(given["mask_token"].grad, torch.full((D,), 1.0 * batch * hidden).double())


@pytest.mark.parametrize(
    ("tokens", "table", "out"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["grouped", "grid"])
def test_dtypes(tokens: torch.dtype, table: torch.dtype, out: torch.dtype, order: Any) -> None:
    given = arguments(torch.float32)
    for name in LEAVES:
        dtype = {"tokens": tokens, "mask_token": torch.float32}.get(name, table)
        given[name] = given[name].detach().to(dtype).requires_grad_()
    got = assemble_decoder(**given, order=order)
    assert got.dtype == out
    torch.testing.assert_close(got, assemble_decoder_reference(**given, order=order))
    got.float().sum().backward()
    assert all(given[name].grad.dtype == given[name].dtype for name in LEAVES)


def test_compiled_whole() -> None:
    for order in ("grouped", "grid"):
        given = arguments(torch.float32)
        compiled = torch.compile(assemble_decoder, fullgraph=True, backend="aot_eager")
        leaves = [given[name] for name in LEAVES]
        results = []
        for run in (assemble_decoder, compiled):
            out = run(**given, order=order)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("in_grid", [False, True], ids=["grouped", "grid"])
def test_operator_contract(in_grid: bool) -> None:
    given = arguments(torch.float32)
    names = ("tokens", "token_index", "token_pos", "mask_token", "mask_index", "mask_pos")
    ops = torch.ops.avmae
    values = [given[name] for name in names]
    torch.library.opcheck(ops.assemble_decoder.default, (*values, in_grid))
    grad = torch.randn(B, N, D)
    values = [grad, given["token_index"], given["mask_index"], in_grid]
    for rows in ((N, N), (0, N), (0, 0)):
        torch.library.opcheck(ops.assemble_decoder_backward.default, (*values, *rows))


def test_double_backward_is_refused() -> None:
    given = arguments()
    out = assemble_decoder(**given)
    (grad,) = torch.autograd.grad(out.square().sum(), given["mask_token"], create_graph=True)
    with pytest.raises(NotImplementedError, match="assemble_decoder has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": "mixed"}, "order 'grouped' or 'grid', got 'mixed'"),
        ({"tokens": torch.zeros(B, D)}, r"tokens \[B, V, D\] and mask_token \[D\]"),
        ({"mask_token": torch.zeros(D + 1)}, r"mask_token \[D\].*mask_token float32 \[25\]"),
        ({"mask_token": torch.zeros(2 * D)[::2]}, "mask_token contiguous"),
        ({"token_index": torch.zeros(B, V)}, r"token_index int64 \[B, count\].*float32"),
        ({"mask_index": torch.zeros(1, M).long()}, r"mask_index int64 \[B, count\].*\[1, 11\]"),
        ({"token_index": torch.zeros(B, V + 1).long()}, "one position for each token"),
        ({"token_pos": torch.zeros(N, D + 1)}, r"token_pos \[N, D\], contiguous"),
        ({"mask_pos": torch.zeros(D, N).T}, r"mask_pos \[N, D\], contiguous"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"assemble_decoder wants.*{message}"):
        assemble_decoder(**{**arguments(), **change})
