"""How layers are grouped."""

from __future__ import annotations

import pytest

from sagellm.errors import InvalidArgumentError
from sagellm.kv import KvGroup, plan_kv_groups


def sizes(groups: tuple[KvGroup, ...]) -> list[tuple[int, int]]:
    return [(group.window, len(group.layers)) for group in groups]


@pytest.mark.parametrize("window", [0, 4096])
def test_equal_layers_share_one_group(window: int) -> None:
    assert plan_kv_groups((window,) * 30) == (KvGroup(window=window, layers=tuple(range(30))),)


def test_gemma3_has_five_sliding_groups_and_a_full_one() -> None:
    windows = ((512,) * 5 + (0,)) * 3
    groups = plan_kv_groups(windows)
    assert sizes(groups) == [(0, 3)] + [(512, 3)] * 5
    assert groups[0].layers == (5, 11, 17)
    assert groups[1].layers == (0, 1, 2)


def test_gemma2_has_two_groups_of_half_the_layers() -> None:
    assert sizes(plan_kv_groups((4096, 0) * 13)) == [(0, 13), (4096, 13)]


def test_kinds_that_do_not_divide_leave_the_fewest_slots_unused() -> None:
    assert sizes(plan_kv_groups((0,) * 5 + (8,) * 6)) == [(0, 5), (8, 6)]  # 6 slots: 1 of 12 unused
    assert sizes(plan_kv_groups((0,) * 4 + (8,) * 26)) == [(0, 4)] + [(8, 4)] * 6 + [(8, 2)]


@pytest.mark.parametrize("windows", [(0,) * 7, (0, 4, 4, 9, 4, 0), (3, 0, 0, 0, 0, 5, 5)])
def test_every_layer_is_in_exactly_one_group_of_its_window(windows: tuple[int, ...]) -> None:
    groups = plan_kv_groups(windows)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(windows)))
    assert all(windows[layer] == group.window for group in groups for layer in group.layers)


@pytest.mark.parametrize("windows", [(), (0, -1)])
def test_no_layers_and_negative_windows_are_refused(windows: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgumentError):
        plan_kv_groups(windows)
