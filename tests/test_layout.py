"""What is averaged, copied and tied, and that checkpoints fit together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import save_run, states_of
from torch import nn

from twa_merge.checkpoints import open_checkpoints
from twa_merge.errors import CheckpointError, ConfigError
from twa_merge.layout import (
    blocks_from_members,
    global_block,
    grouped_blocks,
    make_layout,
    tensor_blocks,
)
from twa_merge.stream import blame, row_slices, stream


def opened(folder: Path, states):
    save_run(folder, states)
    return open_checkpoints([folder])


def test_floats_are_averaged_and_the_rest_is_copied(tmp_path):
    states = states_of(2)
    for i, state in enumerate(states):
        state["bn.running_mean"] = torch.rand(3)
        state["bn.num_batches_tracked"] = torch.tensor(i)
        state["mask"] = torch.tensor([True, False])
    layout = make_layout(opened(tmp_path, states))
    assert set(layout.copied) == {"bn.num_batches_tracked", "mask"}
    assert layout["bn.running_mean"].statistic
    assert "bn.running_mean" in layout.averaged
    assert "bn.running_mean" not in layout.in_subspace


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_singular_vectors_of_spectral_norm_are_copied(tmp_path, norm):
    """Their mean is no unit vector, and the layer divides by what they make of its weight."""
    torch.manual_seed(0)
    models = []
    for _ in range(3):
        model = nn.Sequential(norm(nn.Linear(6, 5)), nn.Linear(5, 2))
        model(torch.randn(4, 6))
        models.append(model)
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in models]
    # A name alone is none: this one is an ordinary parameter.
    for state in states:
        state["bias_u"] = torch.rand(2)
    layout = make_layout(opened(tmp_path, states))
    assert len(layout.copied) == 2
    assert all(
        torch.equal(states[0][name].norm().round(), torch.tensor(1.0)) for name in layout.copied
    )
    assert "bias_u" in layout.in_subspace


def broken(kind: str):
    states = states_of(3)
    if kind == "missing":
        del states[1]["a.bias"]
    elif kind == "added":
        states[1]["extra"] = torch.zeros(2)
    elif kind == "shape":
        states[1]["a.bias"] = torch.zeros(8)
    else:
        states[1]["a.bias"] = states[1]["a.bias"].bfloat16()
    return states


@pytest.mark.parametrize(
    ("kind", "tensor"),
    [("missing", "a.bias"), ("added", "extra"), ("shape", "a.bias"), ("dtype", "a.bias")],
)
def test_an_odd_checkpoint_is_named_with_tensor_and_remedy(tmp_path, kind, tensor):
    checkpoints = opened(tmp_path, broken(kind))
    with pytest.raises(CheckpointError) as caught:
        make_layout(checkpoints)
    text = str(caught.value)
    for part in ("checkpoint-200", tensor, "expected", "found", "what to do"):
        assert part in text


def test_nothing_to_average_is_an_error(tmp_path):
    states = [{"count": torch.tensor([i])} for i in range(2)]
    with pytest.raises(CheckpointError, match="no float tensor"):
        make_layout(opened(tmp_path, states))


def test_weights_tied_in_all_checkpoints_stay_tied(tmp_path):
    for i, state in enumerate(states_of(2)):
        state["head"] = state["b.weight"]
        torch.save(state, tmp_path / f"step_{i}.pt")
    layout = make_layout(open_checkpoints([tmp_path]))
    assert layout["head"].tied_to == "b.weight"
    assert not layout["head"].in_subspace
    blocks = tensor_blocks(layout)
    assert blocks.index["head"] == blocks.index["b.weight"]


def test_weights_untied_later_are_no_longer_tied(tmp_path):
    first, second = states_of(2)
    first["head"] = first["b.weight"]
    second["head"] = second["b.weight"] + 1
    torch.save(first, tmp_path / "step_1.pt")
    torch.save(second, tmp_path / "step_2.pt")
    layout = make_layout(open_checkpoints([tmp_path]))
    assert layout["head"].tied_to is None


def test_blocks_partition_the_averaged_tensors(tmp_path):
    layout = make_layout(opened(tmp_path, states_of(2)))
    by_letter = grouped_blocks("layers", {n: n[0] for n in layout.averaged})
    for blocks in (global_block(layout), tensor_blocks(layout), by_letter):
        assert sorted(n for group in blocks.members() for n in group) == sorted(layout.averaged)
    again = blocks_from_members(
        "layers", dict(zip(by_letter.names, by_letter.members(), strict=True)), layout
    )
    assert again == by_letter
    with pytest.raises(ConfigError, match="do not fit"):
        blocks_from_members("layers", {"a": ["a.weight"]}, layout)


@pytest.mark.parametrize("numel", [1, 7, 1000])
@pytest.mark.parametrize("size", [1, 3])
def test_slices_cover_every_number_once(tmp_path, numel, size):
    states = states_of(3)
    checkpoints = opened(tmp_path, states)
    layout = make_layout(checkpoints)
    seen = {name: torch.zeros(3, layout[name].info.numel) for name in layout.averaged}
    for rank in range(size):

        def share(rows: int, rank: int = rank) -> tuple[int, int]:
            step = -(-rows // size)
            return min(rank * step, rows), min((rank + 1) * step, rows)

        for cut, rows in stream(
            checkpoints, row_slices(layout, layout.averaged, share=share, numel=numel)
        ):
            per = layout[cut.name].info.row_numel
            for i, row in enumerate(rows):
                seen[cut.name][i, cut.start * per : cut.stop * per] += torch.from_numpy(row)
    for name, found in seen.items():
        expected = torch.stack([s[name].reshape(-1) for s in states])
        assert torch.equal(found, expected)


def test_a_nan_is_traced_to_checkpoint_tensor_and_index(tmp_path):
    states = states_of(3)
    states[2]["a.weight"][4, 1] = float("nan")
    checkpoints = opened(tmp_path, states)
    layout = make_layout(checkpoints)
    cut = row_slices(layout, ["a.weight"], numel=10)[2]
    text = str(blame(checkpoints, cut))
    assert "checkpoint-300" in text
    assert "a.weight" in text
    assert "nan at index [4, 1]" in text


def test_leaving_the_stream_early_leaves_no_thread(tmp_path):
    import threading

    checkpoints = opened(tmp_path, states_of(2))
    layout = make_layout(checkpoints)
    for _ in stream(checkpoints, row_slices(layout, layout.averaged, numel=5)):
        break
    assert not [t for t in threading.enumerate() if t.name.startswith("twa-merge")]
