"""Packing and unpacking token sets; the layouts behind the fusion strategies."""

import pytest
import torch

from avmae_fast.models.layout import TokenLayout, pack, unpack

LENGTHS = {"video": 5, "audio": 3}


def _tokens(batch: int) -> dict[str, torch.Tensor]:
    """Every value names its modality, clip and place."""
    return {
        m: (1000 * (i + 1) + 100 * torch.arange(batch)[:, None] + torch.arange(length))[..., None]
        for i, (m, length) in enumerate(LENGTHS.items())
    }


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("batch", [1, 4])
def test_round_trip(joint: bool, batch: int) -> None:
    tokens = _tokens(batch)
    packed, _, tail = pack(tokens, joint)
    assert tail is None
    back = unpack(packed, batch, LENGTHS, joint)
    for m, x in tokens.items():
        assert torch.equal(back[m], x)


def test_joint_layout_is_one_sequence_a_clip() -> None:
    packed, layout, _ = pack(_tokens(3), joint=True)
    assert layout.fixed_length == 8
    assert layout.cu_seqlens.tolist() == [0, 8, 16, 24]
    assert packed[:8, 0].tolist() == [1000, 1001, 1002, 1003, 1004, 2000, 2001, 2002]


def test_shared_layout_is_one_sequence_for_each_modality() -> None:
    packed, layout, _ = pack(_tokens(2), joint=False)
    assert layout.fixed_length is None
    assert layout.cu_seqlens.tolist() == [0, 5, 10, 13, 16]
    assert layout.cu_seqlens.dtype == torch.int32
    assert packed[10:13, 0].tolist() == [2000, 2001, 2002]


@pytest.mark.parametrize("joint", [True, False])
def test_tail_rows_point_at_the_last_tokens(joint: bool) -> None:
    tokens, tails = _tokens(3), {"video": 2, "audio": 3}
    packed, _, tail = pack(tokens, joint, tails)
    assert tail is not None
    kept = unpack(packed[tail.rows], 3, tails, joint)
    for m, count in tails.items():
        assert torch.equal(kept[m], tokens[m][:, -count:])
    assert int(tail.layout.cu_seqlens[-1]) == len(tail.rows)


def test_equal_lengths_give_a_fixed_layout() -> None:
    layout = TokenLayout.end_to_end(2, [4, 4], "cpu")
    assert layout.fixed_length == 4
    assert layout.cu_seqlens.tolist() == [0, 4, 8, 12, 16]


def test_empty_tail_is_allowed() -> None:
    _, _, tail = pack(_tokens(2), joint=False, tails={"video": 0, "audio": 3})
    assert tail is not None
    assert tail.layout.cu_seqlens.tolist() == [0, 0, 0, 3, 6]
