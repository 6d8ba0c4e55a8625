"""What is averaged, copied and tied, and that checkpoints fit together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import LinearTask, save_run, states_of
from safetensors.torch import load_file
from torch import nn

from twa_merge import average, merge
from twa_merge.checkpoints import open_checkpoints
from twa_merge.config import FitConfig, GuardConfig
from twa_merge.errors import CheckpointError, ConfigError
from twa_merge.layout import (
    blocks_from_members,
    global_block,
    grouped_blocks,
    make_layout,
    tensor_blocks,
)
from twa_merge.stream import blame, row_slices, stream
from twa_merge.task import split


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
def test_singular_vectors_of_spectral_norm_keep_unit_length(tmp_path, norm):
    """The layer divides by what they make of its weight: next to nothing, if they shrink."""
    torch.manual_seed(0)
    states = []
    for _ in range(3):
        model = nn.Sequential(norm(nn.Linear(6, 5)), nn.Linear(5, 2))
        model(torch.randn(4, 6))
        # A name alone says nothing: this one is an ordinary parameter.
        states.append(
            {k: v.clone() for k, v in model.state_dict().items()} | {"b_u": torch.rand(2)}
        )
    layout = make_layout(opened(tmp_path / "run", states))
    vectors = [name for name, entry in layout.entries.items() if entry.singular]
    assert len(vectors) == 2
    assert not set(vectors) & set(layout.in_subspace)
    assert "b_u" in layout.in_subspace

    average([tmp_path / "run"], tmp_path / "mean")
    average([tmp_path / "run"], tmp_path / "one", weights="0,1,0")
    mean, one = (load_file(tmp_path / k / "model.safetensors") for k in ("mean", "one"))
    for name in vectors:
        expected = sum(s[name].double() for s in states)
        torch.testing.assert_close(mean[name], (expected / expected.norm()).float())
        assert torch.equal(one[name], states[1][name])


def test_trained_merges_are_judged_by_the_singular_vectors_that_are_written(tmp_path):
    class Normed(LinearTask):
        def build_model(self):
            torch.manual_seed(0)
            layer = nn.Linear(self.inputs, self.outputs, bias=False)
            return nn.Sequential(nn.utils.parametrizations.spectral_norm(layer))

    task = Normed(examples=80)
    states = []
    for state in task.states(4):
        model = task.build_model()
        with torch.no_grad():
            model[0].parametrizations.weight.original.copy_(state["0.weight"])
        model.train()(torch.randn(3, task.inputs))
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    save_run(tmp_path / "run", states)
    fit, guard = FitConfig(blocks="global", ridge=0.1), GuardConfig(candidates="uniform")
    document = merge([tmp_path / "run"], task, tmp_path / "out", fit=fit, guard=guard)
    average([tmp_path / "run"], tmp_path / "mean")
    (row,) = [c for c in document["candidates"] if c["name"] == "uniform"]
    model = task.build_model().eval()
    model.load_state_dict(load_file(tmp_path / "mean" / "model.safetensors"))
    x, y = (torch.stack(column) for column in zip(*split(task, 0.25, 0).guard, strict=True))
    own = float(task.loss(model, (x, y)).detach().double().mean())
    assert row["guard_loss"] == pytest.approx(own, rel=1e-5)


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

        slices = row_slices(layout, layout.averaged, share=share, numel=numel)
        for cut, rows in stream(checkpoints, slices, ahead=4):
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
    for _ in stream(checkpoints, row_slices(layout, layout.averaged, numel=5), ahead=4):
        break
    assert not [t for t in threading.enumerate() if t.name.startswith("twa-merge")]
