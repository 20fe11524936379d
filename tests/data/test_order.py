"""The sequence of samples: records, windows, views and substitutes by position."""

import numpy as np
import pytest

from avmae_fast.data.order import MAX_SUBSTITUTES, Group, Order
from avmae_kernels.masking import keyed_uniform, permute


def _records(order, first, count):
    return [g.record for g in order.groups(first, count) for _ in range(g.count)]


def test_each_record_once_a_pass():
    order = Order(7, seed=3, shuffle=True)
    passes = np.array(_records(order, 0, 21)).reshape(3, 7)
    assert all(sorted(records) == list(range(7)) for records in passes.tolist())
    assert len({tuple(records) for records in passes.tolist()}) == 3
    assert passes[1, 2] == permute(2, 7, key=1, seed=3)
    assert _records(Order(7, seed=3, shuffle=False), 5, 5) == [5, 6, 0, 1, 2]


@pytest.mark.parametrize(("windows", "views"), [(1, 1), (3, 1), (1, 2), (2, 3)])
def test_any_stretch_is_part_of_the_sequence(windows, views):
    order = Order(5, seed=1, shuffle=True, windows=windows, views=views)
    whole = _records(order, 0, 90)
    for first, count in ((0, 1), (4, 17), (29, 2), (31, 30), (59, 31)):
        assert _records(order, first, count) == whole[first : first + count]
        groups = order.groups(first, count)
        assert [g.first for g in groups] == [
            first + sum(g.count for g in groups[:i]) for i in range(len(groups))
        ]
        draws = np.concatenate([order.draws(group) for group in groups])
        every = np.concatenate([order.draws(group) for group in order.groups(0, 90)])
        np.testing.assert_array_equal(draws, every[first : first + count])
    # A record gives its samples in a row.
    assert all(len(set(whole[i : i + order.repeat])) == 1 for i in range(0, 90, order.repeat))


def test_views_share_the_start_of_their_window():
    draws = Order(5, seed=1, shuffle=True, windows=2, views=3).draws(Group(12, 6, 0))
    assert len(set(draws[:3, 0])) == len(set(draws[3:, 0])) == 1 and draws[0, 0] != draws[3, 0]
    for column in (1, 2, 3):  # top, left, flip
        assert len(set(draws[:, column])) == 6
    # Without views a window's draws are its own position's.
    alone = Order(5, seed=1, shuffle=True, windows=2).draws(Group(12, 2, 0))
    np.testing.assert_array_equal(alone, keyed_uniform(1, np.array([12, 13]), 2, 4))


def test_substitutes():
    order = Order(40, seed=1, shuffle=True, windows=4)
    group = order.groups(8, 4)[0]
    candidates = list(order.candidates(group))
    assert candidates[0] == group.record and len(set(candidates)) == 1 + MAX_SUBSTITUTES
    # Part of a record's samples have the substitutes of all.
    assert list(order.candidates(order.groups(10, 2)[0])) == candidates
    assert sorted(Order(3, 1, True).candidates(Group(5, 1, 2))) == [0, 1, 2]
    assert list(Order(1, 1, True).candidates(Group(5, 1, 0))) == [0]
    chosen = [list(Order(4, 1, True).candidates(Group(i, 1, 2)))[1] for i in range(600)]
    counts = np.bincount(chosen, minlength=4)
    assert counts[2] == 0 and (abs(counts[[0, 1, 3]] - 200) < 60).all()


def test_validation_is_not_drawn():
    assert Order(5, 1, shuffle=False).draws(Group(0, 2, 0)) is None
