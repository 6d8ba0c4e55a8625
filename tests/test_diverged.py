"""Checkpoints that are left out because their training had diverged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import save_run, states_of

from twa_merge.checkpoints import open_checkpoints
from twa_merge.diverged import without_diverged
from twa_merge.layout import make_layout
from twa_merge.progress import Noted


def kept(folder: Path, sizes: list[float]) -> tuple[list[int], list[str]]:
    """Which checkpoints stay, from 1 on, of weights so many times as large; and what was said."""
    states = states_of(len(sizes))
    save_run(
        folder, [{k: v * size for k, v in s.items()} for s, size in zip(states, sizes, strict=True)]
    )
    found, said = open_checkpoints([folder]), []
    left = without_diverged(found, make_layout(found), said.append)
    return [c.step // 100 for c in left], [e.text for e in said if isinstance(e, Noted)]


@pytest.mark.parametrize(
    ("sizes", "left"),
    [
        ([1, 1, 1, 1e4, 1e9], [1, 2, 3]),
        ([1e4, 1, 1], [2, 3]),
        ([1, 500, 1], [1, 2, 3]),  # may be a training that is still growing
        ([1, 1e9], [1, 2]),  # there would be nothing to average
        ([1, 1, 1e9, 1e9, 1e9], [1, 2, 3, 4, 5]),  # most are like that
        ([0, 1, 1], [1, 2, 3]),
        ([0, 0, 1], [1, 2, 3]),  # many times nothing is no size
        ([1, torch.nan, 1], [1, 3]),
        ([1, torch.inf, 1], [1, 3]),
        ([1, torch.nan, torch.nan, 2, torch.nan], [1, 4]),
        ([1, torch.nan], [1, 2]),  # refused where it is read, by name
    ],
)
def test_what_is_far_larger_than_most_is_left_out(tmp_path, sizes, left):
    found, notes = kept(tmp_path / "run", sizes)
    assert found == left
    assert len(notes) == (len(left) < len(sizes))
    for step in set(range(1, len(sizes) + 1)) - set(left):
        assert f"checkpoint-{100 * step}" in notes[0]


def test_a_part_that_diverged_is_enough(tmp_path):
    states = states_of(3)
    states[1]["b.weight"] = states[1]["b.weight"] * 1e6
    save_run(tmp_path, states)
    found = open_checkpoints([tmp_path])
    assert len(without_diverged(found, make_layout(found), lambda event: None)) == 2


def test_infinities_of_a_mask_are_no_divergence(tmp_path):
    states = [s | {"mask": torch.tensor([0.0, -torch.inf])} for s in states_of(4)]
    states[2]["a.weight"][0, 0] = torch.nan
    save_run(tmp_path, states)
    found = open_checkpoints([tmp_path])
    left = without_diverged(found, make_layout(found), lambda event: None)
    assert [c.step for c in left] == [100, 200, 400]
