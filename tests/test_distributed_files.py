"""Distributed checkpoints, as FSDP2, accelerate, torchtitan and Lightning leave them behind."""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import launches
import numpy as np
import pytest
import torch
from dcp_folders import STATE, converted, edit, one, refused, save
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from twa_merge import average
from twa_merge.checkpoints import Checkpoint, open_checkpoints, open_files, sidecars
from twa_merge.checkpoints.open_files import OpenFiles
from twa_merge.errors import CheckpointError
from twa_merge.tensors import dtype_of, tensor_rows

SHARDED = ("fsdp2/step_1", "fsdp2/step_2", "replicas", "fsdp1", "cut")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have saved together."""
    folder = tmp_path_factory.mktemp("sharded")
    done = launches.run(2, folder, module="sharded_run")
    assert done.returncode == 0, done.stderr
    return folder


def same(checkpoint: Checkpoint, state: dict[str, Tensor]) -> None:
    assert list(checkpoint.tensors) == list(state)
    for name, tensor in state.items():
        info = checkpoint.tensors[name]
        assert (info.shape, info.dtype) == (tuple(tensor.shape), dtype_of(tensor.dtype))
        assert torch.equal(tensor_rows(checkpoint, name), tensor), name
        for first in range(tensor.shape[0] if tensor.dim() else 0):
            stop = min(first + 2, tensor.shape[0])
            assert torch.equal(tensor_rows(checkpoint, name, first, stop), tensor[first:stop])


def item_of(folder: Path, name: str) -> Any:
    document = pickle.loads((folder / ".metadata").read_bytes())
    return next(place for index, place in document.storage_data.items() if index.fqn == name)


@pytest.mark.parametrize("name", SHARDED)
def test_what_two_processes_saved_is_what_torch_reads(
    sharded: Path, tmp_path: Path, name: str
) -> None:
    checkpoint = one(sharded / name)
    assert checkpoint.format == "distributed"
    assert {f.path.name for f in checkpoint.files} == {"__0_0.distcp", "__1_0.distcp"}
    oracle = one(converted(sharded / name, tmp_path / "x.pt"))
    assert checkpoint.tensors == oracle.tensors
    assert list(checkpoint.tensors) == list(oracle.tensors)
    rng = random.Random(0)
    for tensor, info in checkpoint.tensors.items():
        assert np.array_equal(
            checkpoint.rows(tensor, 0, info.rows), oracle.rows(tensor, 0, info.rows)
        )
        # Any run of numbers, as workers ask for them.
        for _ in range(20):
            first = rng.randrange(info.numel)
            parts = [np.empty(rng.randrange(info.numel - first + 1), info.dtype.array)]
            parts.append(np.empty_like(parts[0]))
            checkpoint.read(tensor, first, parts[0])
            oracle.read(tensor, first, parts[1])
            assert np.array_equal(*parts)


def test_tensors_really_are_cut_as_the_test_needs_them(sharded: Path) -> None:
    def corners(folder: str, name: str) -> list[tuple[int, ...]]:
        document = pickle.loads((sharded / folder / ".metadata").read_bytes())
        return sorted(tuple(c.offsets) for c in document.state_dict_metadata[name].chunks)

    assert corners("fsdp2/step_1", "model.layers.1.weight") == [(0, 0), (0, 2)]
    assert corners("fsdp2/step_1", "model.embed.weight") == [(0, 0), (4, 0)]
    assert corners("cut", "app.net.last") == [(0, 0, 0), (0, 0, 3)]


def test_flat_parameters_are_no_models(sharded: Path) -> None:
    error = refused(sharded / "flat")
    assert "flat parameters" in error.message
    assert "SHARDED_STATE_DICT" in error.details["what to do"]


def test_a_merge_of_shards_is_that_of_converted_files(sharded: Path, tmp_path: Path) -> None:
    for step in (1, 2):
        converted(sharded / f"fsdp2/step_{step}", tmp_path / f"pt/step_{step}.pt")
    pairs = [(sharded / "fsdp2", "one"), (tmp_path / "pt", "other")]
    for run, name in pairs:
        launches.here("average", run, "-o", tmp_path / name)
    one_, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "other"))
    assert one_ == other
    documents = [
        json.loads(launches.here("inspect", run, "--geometry", "--json")) for run, _ in pairs
    ]
    for document in documents:
        for row in document["checkpoints"]:
            assert row.pop("format") in ("distributed", "pickle")
            row.pop("path")
    assert documents[0]["geometry"] == documents[1]["geometry"]
    assert documents[0]["tensors"] == documents[1]["tensors"]
    assert documents[0]["checkpoints"] == documents[1]["checkpoints"]
    merged = load_file(tmp_path / "one" / "model.safetensors")
    states = [torch.load(tmp_path / f"pt/step_{k}.pt", weights_only=False)["model"] for k in (1, 2)]
    mean = (states[0]["embed.weight"].double() + states[1]["embed.weight"]) / 2
    torch.testing.assert_close(merged["embed.weight"], mean.float(), rtol=0, atol=0)
    assert torch.equal(merged["norm.num_batches_tracked"], states[1]["norm.num_batches_tracked"])


MOMENTS = {"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.ones(4, 3)}}}
FLAT_MOMENTS = {"state.a.weight.exp_avg": torch.ones(4, 3), "param_groups.a.weight.lr": 0.1}


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"model": STATE, "optimizer": MOMENTS, "epoch": 3, "args": {"lr": torch.ones(9)}},
        {"state_dict": STATE, "optimizer_0": MOMENTS},
        {"app": {"model": STATE, "optim": MOMENTS}},
        {"module": STATE, "lr_scheduler": {"last_epoch": 3, "lrs": [0.1]}},
        {**STATE, "optimizer": FLAT_MOMENTS, "train_state": {"step": torch.tensor(5)}},
        {"model": {f"_orig_mod.module.{k}": v for k, v in STATE.items()}, "step": 5},
        {f"module._fsdp_wrapped_module.{k}": v for k, v in STATE.items()},
        {"model": STATE, "ema": {k: v * 0 for k, v in STATE.items()}},
        {"classifier": STATE, "extra": 1},
        {"model": {**STATE, "a._extra_state": None}},
        {"model": STATE, "parts": [torch.ones(3), {"x": torch.ones(2)}]},
    ],
)
def test_the_model_is_found_in_its_container(tmp_path: Path, content: dict[str, Any]) -> None:
    folder = save(tmp_path / "x", content)
    checkpoint = one(folder)
    oracle = one(converted(folder, tmp_path / "beside" / "x.pt"))
    same(checkpoint, STATE)
    same(oracle, STATE)
    for attribute in ("epoch", "entry", "left_out", "extra_states", "aliases", "step"):
        assert getattr(checkpoint, attribute) == getattr(oracle, attribute), attribute


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"encoder": STATE, "decoder": dict(STATE)}, "encoder, decoder"),
        ({"optimizer": MOMENTS}, "a dict of optimizer"),
        ({"optim": MOMENTS, "step": 5}, "a dict of optim, step"),
        ({"epoch": 3}, "a dict of epoch"),
    ],
)
def test_what_is_no_state_dict(tmp_path: Path, content: dict[str, Any], says: str) -> None:
    error = refused(save(tmp_path / "x", content))
    assert says in str(error)
    assert "get_model_state_dict" in error.details["what to do"]


def test_steps_and_epochs_are_taken_from_what_was_saved(tmp_path: Path) -> None:
    for name, content in (
        ("first", {"global_step": 900, "epoch": torch.tensor(2)}),
        ("second", {"step": torch.tensor(300)}),
        ("step_30", {"global_step": 7}),
        ("third", {"epoch": 3}),
        # Of a class that is not read: no reason to refuse the weights.
        ("fourth", {"step": np.int64(5)}),
    ):
        state = {k: v + len(name) for k, v in STATE.items()}
        save(tmp_path / name, {"model": state, **content})
    found = open_checkpoints([tmp_path])
    known = [(c.path.name, c.step, c.epoch) for c in found]
    assert known[:3] == [("step_30", 30, None), ("second", 300, None), ("first", 900, 2)]
    assert sorted(known[3:]) == [("fourth", None, None), ("third", None, 3)]


def test_extra_states_are_told(tmp_path: Path) -> None:
    for name, state, kind in (
        ("a", {"a.weight": torch.ones(2), "m._extra_state": {"scale": 1}}, "dict"),
        ("b", {"a.weight": torch.ones(2), "m._extra_state": "text"}, "str"),
        ("c", {"a.weight": torch.ones(2), "m._extra_state": [torch.ones(2)]}, "list"),
    ):
        assert one(save(tmp_path / name, {"model": state})).extra_states == {"m._extra_state": kind}
    state = {"a.weight": torch.ones(2), "m._extra_state": torch.arange(3)}
    checkpoint = one(save(tmp_path / "d", {"model": state}))
    assert not checkpoint.extra_states
    same(checkpoint, state)


def test_every_dtype_and_memory_format(tmp_path: Path) -> None:
    embed, wide = torch.randn(5, 4), torch.randn(6, 5)
    state = {
        "scalar": torch.tensor(3.5),
        "no rows": torch.zeros(0, 4),
        "empty rows": torch.zeros(3, 0),
        "f64": torch.randn(4, 3, dtype=torch.float64),
        "f16": torch.randn(4).half(),
        "f8": torch.randn(4, 3).to(torch.float8_e4m3fn),
        "u8": torch.arange(4).to(torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "complex": torch.randn(2, 2, dtype=torch.complex64),
        "turned": torch.randn(4, 6).t(),
        "turned bf16": torch.randn(3, 2, 4).bfloat16().permute(2, 0, 1),
        "channels last": torch.randn(6, 3, 2, 2).to(memory_format=torch.channels_last),
        # Parts of one shape are not all alike.
        "square": torch.randn(3, 3),
        "square turned": torch.randn(3, 3).t(),
        "square again": torch.randn(3, 3),
        "row": torch.ones(1, 3).expand(4, 3),
        "part": wide[1:4, 1:],
        "parameter": nn.Parameter(embed),
        "tied": embed,
    }
    checkpoint = one(save(tmp_path / "x", {"model": state}))
    same(checkpoint, {name: tensor.detach() for name, tensor in state.items()})
    assert checkpoint.aliases == {}
    assert checkpoint.rows("scalar", 0, 1).shape == ()
    assert checkpoint.rows("scalar", 1, 1).size == 0


def test_files_of_several_threads_and_a_file_a_tensor(tmp_path: Path) -> None:
    same(one(save(tmp_path / "threads", {"model": STATE}, thread_count=2)), STATE)
    checkpoint = one(save(tmp_path / "files", {"model": STATE}, single_file_per_rank=False))
    assert len(checkpoint.files) == len(STATE)
    same(checkpoint, STATE)
    assert {f.names for f in checkpoint.files} == {(name,) for name in STATE}


def test_conjugates_are_to_be_converted(tmp_path: Path) -> None:
    folder = save(tmp_path / "x", {"w": torch.randn(2, 2, dtype=torch.complex64).conj()})
    error = refused(folder, read=True)
    assert "dcp_to_torch" in error.details["what to do"]
    assert error.details["tensor"] == "w"


# Layouts of folders.


def accelerate(home: Path, step: int) -> dict[str, Tensor]:
    """As the Trainer with FSDP and sharded state dicts saves a step."""
    state = {name: tensor + step for name, tensor in STATE.items()}
    save(home / "pytorch_model_fsdp_0", {"model": state})
    save(home / "optimizer_0", {"optimizer": MOMENTS})
    for name in ("config.json", "tokenizer.json"):
        (home / name).write_text("{}")
    (home / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    for name in ("scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        torch.save({"x": 1}, home / name)
    return state


def test_the_folders_of_the_trainer(tmp_path: Path) -> None:
    run = tmp_path / "out"
    states = [accelerate(run / f"checkpoint-{step}", step) for step in (100, 20)]
    found = open_checkpoints([run])
    assert [(c.path, c.step) for c in found] == [
        (run / "checkpoint-20", 20),
        (run / "checkpoint-100", 100),
    ]
    same(found[1], states[0])
    assert list(sidecars(found[1])) == ["config.json", "tokenizer.json"]
    for parts in (
        [run / f"checkpoint-{step}" for step in (100, 20)],
        [run / f"checkpoint-{step}/pytorch_model_fsdp_0" for step in (100, 20)],
        [file for step in (100, 20) for file in run.glob(f"checkpoint-{step}/*_0/__0_0.distcp")
         if "optim" not in str(file)],
    ):  # fmt: skip
        assert [(c.path, c.step) for c in open_checkpoints(parts)] == [
            (c.path, c.step) for c in found
        ]
    average([run], tmp_path / "merged")
    written = {p.name for p in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= written
    assert not any("distcp" in name or "fsdp" in name for name in written)


def test_any_name_of_a_checkpoint_around_accelerates(tmp_path: Path) -> None:
    state = accelerate(tmp_path / "saved state", 5)
    (checkpoint,) = open_checkpoints([tmp_path / "saved state"])
    assert (checkpoint.path, checkpoint.step) == (tmp_path / "saved state", 5)
    same(checkpoint, state)
    assert open_checkpoints([tmp_path])[0].path == checkpoint.path
    shutil.copytree(
        checkpoint.path / "pytorch_model_fsdp_0", checkpoint.path / "pytorch_model_fsdp_1"
    )
    for path in (tmp_path, checkpoint.path):
        error = refused(path)
        assert "not clear" in error.message
        assert "pytorch_model_fsdp_1" in error.details["found"]


def test_optimizers_alone_are_no_checkpoint(tmp_path: Path) -> None:
    accelerate(tmp_path / "checkpoint-1", 1)
    assert "no named tensors" in refused(tmp_path / "checkpoint-1" / "optimizer_0").message
    shutil.rmtree(tmp_path / "checkpoint-1" / "pytorch_model_fsdp_0")
    for path, says in (
        (tmp_path, "holds no weights"),
        (tmp_path / "checkpoint-1", "no checkpoint"),
    ):
        error = refused(path)
        assert says in error.message
        assert "optimizer_0" in error.details["found"]


def test_the_folders_of_torchtitan_and_plain_ones(tmp_path: Path) -> None:
    for step in (100, 9):
        for folder in ("outputs/checkpoint/step-", "plain/step_"):
            save(tmp_path / f"{folder}{step}", {**STATE, "b": torch.full((3,), float(step))})
    titan = tmp_path / "outputs" / "checkpoint"
    for run in (titan, tmp_path / "plain"):
        assert [c.step for c in open_checkpoints([run])] == [9, 100]
    assert open_checkpoints([titan / "step-9"])[0].step == 9
    # Not the first step for the whole run.
    assert str(titan) in refused(tmp_path / "outputs").details["what to do"]


def test_the_folders_of_lightning(tmp_path: Path) -> None:
    for name, step in (("epoch=0-step=10", 10), ("epoch=1-step=20", 20), ("last", 20)):
        state = {k: v + step for k, v in STATE.items()}
        folder = save(tmp_path / f"{name}.ckpt", {"state_dict": state, "optimizer_0": MOMENTS})
        torch.save({"global_step": step, "callbacks": {}}, folder / "meta.pt")
    found = open_checkpoints([tmp_path])
    assert [(c.path.name, c.step) for c in found] == [
        ("epoch=0-step=10.ckpt", 10),
        ("epoch=1-step=20.ckpt", 20),
    ]
    assert list(sidecars(found[1])) == []


def test_what_is_given_by_its_files_is_its_folder(tmp_path: Path) -> None:
    folder = save(tmp_path / "x", STATE)
    for name in (".metadata", "__0_0.distcp"):
        assert one(folder / name).path == folder
    assert len(open_checkpoints(list(folder.iterdir()))) == 1


def test_without_metadata(tmp_path: Path) -> None:
    folder = save(tmp_path / "step_1", STATE)
    (folder / ".metadata").unlink()
    for path in (folder, tmp_path, folder / "__0_0.distcp"):
        error = refused(path)
        assert "without its file .metadata" in error.message
        assert "hidden files too" in error.details["what to do"]


# Damage.


def test_a_missing_file_is_named(sharded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded / "fsdp2/step_1", tmp_path / "step_1")
    (folder / "__1_0.distcp").unlink()
    error = refused(folder)
    assert "not complete" in error.message
    assert "__1_0.distcp" in error.details["found"]
    (folder / "__0_0.distcp").unlink()
    assert "__0_0.distcp, __1_0.distcp" in refused(folder).details["found"]
    (folder / "__0_0.distcp").mkdir()
    assert "__1_0.distcp" in refused(folder).details["found"]


def test_a_file_cut_short_is_named_with_a_tensor(sharded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded / "cut", tmp_path / "x")
    file = folder / "__1_0.distcp"
    os.truncate(file, file.stat().st_size // 2)
    error = refused(folder)
    assert "cut short" in error.message
    assert error.details["checkpoint"] == str(file)
    assert set(error.details) == {"checkpoint", "tensor", "expected", "found", "what to do"}
    os.truncate(file, 0)
    assert "cut short" in refused(folder).message


@pytest.mark.parametrize("by", [1, 64, -1])
def test_places_that_are_not_where_the_items_are(tmp_path: Path, by: int) -> None:
    folder = save(tmp_path / "x", {"v": torch.ones(99), "w": torch.ones(3, 99), "z": torch.ones(9)})

    def change(document: Metadata) -> None:
        place = document.storage_data[MetadataIndex("w", (0, 0))]
        place.offset += by

    edit(folder, change)
    error = refused(folder, read=True)
    assert error.details["tensor"] == "w"
    assert "damaged" in error.message or "not what" in error.message


def test_an_item_of_another_tensor(tmp_path: Path) -> None:
    folder = save(tmp_path / "x", {"v": torch.ones(4), "w": torch.ones(4, 1), "i": torch.arange(4)})
    for wrong, found in (("w", "[4, 1]"), ("i", "int64")):

        def change(document: Metadata, wrong: str = wrong) -> None:
            places = {index.fqn: place for index, place in document.storage_data.items()}
            document.storage_data[MetadataIndex("v", (0,))] = places[wrong]

        edit(folder, change)
        error = refused(folder, read=True)
        assert "not what the metadata" in error.message
        assert found in error.details["found"]
        assert "float32 of shape [4]" in error.details["expected"]


def replace_item(folder: Path, name: str, content: bytes) -> None:
    """Puts another item in the place of one, at the end of its file."""
    place = item_of(folder, name)
    file = folder / place.relative_path
    begin = file.stat().st_size

    def change(document: Metadata) -> None:
        found = next(p for index, p in document.storage_data.items() if index.fqn == name)
        found.offset, found.length = begin, len(content)

    with file.open("ab") as out:
        out.write(content)
    edit(folder, change)


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def rezipped(content: bytes, change: Callable[[str, bytes], bytes], method: int = 0) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(out, "w", method) as into:
        for entry in source.infolist():
            into.writestr(entry.filename, change(entry.filename, source.read(entry)))
    return out.getvalue()


class RunsCode:
    """Unpickled without care, makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_items_run_no_code(tmp_path: Path) -> None:
    made = tmp_path / "made"
    evil = saved(RunsCode(made))
    for name, asked in (("w", True), ("m._extra_state", False), ("step", False)):
        content = {"w": torch.ones(999), "m._extra_state": "x", "step": 3}
        folder = save(tmp_path / str(name), content)
        replace_item(folder, name, evil + b"\0" * 4096)
        if name == "step":
            assert one(folder).step is None
        else:
            error = refused(folder, read=asked)
            assert "mkdir" in error.details["found"] or "damaged" in error.message
        replace_item(folder, name, b"\0" * 4096 + evil)
        if name != "step":
            error = refused(folder, read=asked)
            assert error.details["checkpoint"] == str(folder / "__0_0.distcp")
        assert not made.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (saved({"w": torch.ones(4)}), "dict"),
        (saved(torch.ones(4).to_sparse()), "sparse"),
        (saved("text"), "data/0"),
        (b"PK\x03\x04" + b"\0" * 99, "BadZipFile"),
        (b"hello" * 99, "BadZipFile"),
        (rezipped(saved(torch.ones(4)), lambda n, d: d[1:] if "data.pkl" in n else d), ""),
        (rezipped(saved(torch.ones(4)), lambda n, d: d[:8] if "data/0" in n else d), "8 bytes"),
        (rezipped(saved(torch.ones(4)), lambda n, d: b"" if "data.pkl" in n else d), ""),
    ],
)
def test_items_that_are_no_such_tensor(tmp_path: Path, content: bytes, says: str) -> None:
    folder = save(tmp_path / "x", {"like it": torch.ones(4), "w": torch.ones(4)})
    replace_item(folder, "w", content)
    error = refused(folder, read=True)
    assert says in str(error)
    assert error.details["tensor"] == "w"
    assert error.details["checkpoint"] == str(folder / "__0_0.distcp")


@pytest.mark.parametrize(
    "content",
    [
        rezipped(saved(torch.ones(4)), lambda name, data: b"big" if "byteorder" in name else data),
        rezipped(saved(torch.ones(4)), lambda _, data: data, zipfile.ZIP_DEFLATED),
    ],
)
def test_items_that_torch_reads_and_this_does_not(tmp_path: Path, content: bytes) -> None:
    """With another byte order, torch.load to the device meta ends the process."""
    folder = save(tmp_path / "x", {"like it": torch.ones(4), "w": torch.ones(4)})
    replace_item(folder, "w", content)
    error = refused(folder, read=True)
    assert "cannot be read directly" in error.message
    assert "dcp_to_torch" in error.details["what to do"]


def test_an_item_that_is_the_end_of_a_larger_storage(tmp_path: Path) -> None:
    folder = save(tmp_path / "x", {"like it": torch.ones(4), "w": torch.ones(4)})
    replace_item(folder, "w", saved(torch.arange(8.0)[4:]))
    same(one(folder), {"like it": torch.ones(4), "w": torch.arange(4.0, 8.0)})


def test_quantised_weights_beside_their_configuration(tmp_path: Path) -> None:
    """The configuration of a checkpoint of accelerate's lies a folder above its files."""
    home = tmp_path / "checkpoint-1"
    save(home / "pytorch_model_fsdp_0", {"model": {"l.weight": torch.ones(4, 4).int()}})
    (home / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    assert "quantised" in refused(home).message


# Files.


def test_files_that_change_while_they_are_read(tmp_path: Path) -> None:
    state = {"w": torch.ones(50, 3), "turned": torch.ones(3, 50).t()}
    folder = save(tmp_path / "x", state)
    file = folder / "__0_0.distcp"
    for k, name in enumerate(state):
        checkpoint = one(folder)
        os.utime(file, (k, k))
        with pytest.raises(CheckpointError, match="changed") as caught:
            checkpoint.rows(name, 0, 50)
        assert caught.value.details["tensor"] == name
        assert caught.value.details["checkpoint"] == str(file)
    # Another file of the same size, while the one before is still open.
    checkpoint = one(folder)
    checkpoint.rows("w", 0, 1)
    shutil.copy(file, tmp_path / "new")
    (tmp_path / "new").rename(file)
    assert checkpoint.rows("w", 0, 50).sum() == 150
    with pytest.raises(CheckpointError, match="changed"):
        checkpoint.rows("turned", 0, 50)
    checkpoint = one(folder)
    checkpoint.rows("w", 0, 1)
    os.truncate(file, 1000)
    with pytest.raises(CheckpointError, match="changed"):
        checkpoint.rows("w", 40, 50)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files cannot be counted here")
def test_many_files_read_from_many_threads_and_closed(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_files, "FILES", OpenFiles(most=3))
    for k in range(20):
        shutil.copytree(sharded / "cut", tmp_path / "run" / f"step_{k}")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    checkpoints = open_checkpoints([tmp_path / "run"])
    oracle = one(converted(sharded / "cut", tmp_path / "x.pt"))
    jobs = [(c, name) for name in checkpoints[0].tensors for c in checkpoints] * 3
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda j: tensor_rows(j[0], j[1]), jobs))
    for (_, name), tensor in zip(jobs, found, strict=True):
        assert torch.equal(tensor, tensor_rows(oracle, name))
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    for checkpoint in checkpoints:
        checkpoint.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_only_the_rows_in_question_are_read(tmp_path: Path, monkeypatch) -> None:
    folder = save(tmp_path / "x", {"w": torch.zeros(1000, 1000), "v": torch.zeros(1000, 1000)})
    read: list[int] = []
    original = open_files.OpenFile.read

    def counting(self: open_files.OpenFile, position: int, out: memoryview) -> bool:
        read.append(len(out))
        return original(self, position, out)

    monkeypatch.setattr(open_files.OpenFile, "read", counting)
    checkpoint = one(folder)
    assert not read
    checkpoint.rows("w", 10, 20)
    assert 40_000 <= sum(read) < 100_000
