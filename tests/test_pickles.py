"""Pickles: containers, prefixes, ties, and files that want more than to be read."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

import launches
import pytest
import torch
from torch import Tensor, nn

from twa_merge.checkpoints import Checkpoint, open_checkpoints
from twa_merge.errors import CheckpointError
from twa_merge.tensors import dtype_of, tensor_rows

STATE = {"a.weight": torch.arange(12.0).reshape(4, 3), "a.bias": torch.ones(4).bfloat16()}
MOMENTS = {"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.ones(4, 3)}}}


class RunsCode:
    """Unpickled without care, makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def one(path: Path) -> Checkpoint:
    (checkpoint,) = open_checkpoints([path])
    return checkpoint


def refused(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoints([path])
    assert caught.value.details["checkpoint"] == str(path)
    assert "\033" not in str(caught.value)
    assert len(str(caught.value)) < 1500
    return caught.value


def save(path: Path, content: object, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def same(checkpoint: Checkpoint, state: dict[str, Tensor]) -> None:
    assert list(checkpoint.tensors) == list(state)
    for name, tensor in state.items():
        info = checkpoint.tensors[name]
        assert (info.shape, info.dtype) == (tuple(tensor.shape), dtype_of(tensor.dtype))
        assert torch.equal(tensor_rows(checkpoint, name), tensor)


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        OrderedDict(STATE),
        {k: nn.Parameter(v) for k, v in STATE.items()},
        {"model": STATE, "optimizer": MOMENTS, "epoch": 3, "args": {"lr": torch.ones(9)}},
        {"state_dict": STATE, "optimizer_states": [MOMENTS], "callbacks": {"x": {"y": [1]}}},
        {"module": STATE},
        {"model_state_dict": STATE, "optimizer_state_dict": MOMENTS, "loss": torch.tensor(0.5)},
        {"model": {"state_dict": STATE, "config": {"width": 3}}},
        {"model": STATE, "ema": {k: v * 0 for k, v in STATE.items()}},
        {"ema": {"more": torch.ones(1), **STATE}, "model": STATE},
        {"state_dict": {k: v * 0 for k, v in STATE.items()}, "model": STATE},
        {"classifier": STATE, "extra": 1},
        {"classifier_ema": {k: v * 0 for k, v in STATE.items()}, "classifier": STATE},
        {"ema": STATE, "epoch": 2},
        {**STATE, "a._extra_state": None},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_the_model_is_found_in_its_container(tmp_path: Path, content: Any, zipped: bool) -> None:
    path = save(tmp_path / "x.pt", content, _use_new_zipfile_serialization=zipped)
    checkpoint = one(path)
    assert checkpoint.format == "pickle"
    same(checkpoint, STATE)
    checkpoint.close()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"encoder": STATE, "decoder": dict(STATE)}, "encoder, decoder"),
        ({"generator": dict(STATE), **STATE}, "the file itself"),
        (MOMENTS, "a dict of state"),
        ({"epoch": 3}, "a dict of epoch"),
        ({}, "a dict of"),
        ([torch.ones(2)], "list"),
        (torch.ones(2), "Tensor"),
        ({"w": torch.eye(3).to_sparse()}, "sparse"),
        ({"w": torch.empty(3, device="meta")}, "meta"),
    ],
)
def test_what_is_no_state_dict(tmp_path: Path, content: object, says: str) -> None:
    assert says in str(refused(save(tmp_path / "x.pt", content)))


BACKBONE = {f"layers.{k}.weight": torch.full((2, 2), float(k)) for k in range(60)}
HEAD = {"w": torch.ones(2), "b": torch.ones(2)}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"backbone": BACKBONE, "head": HEAD}, "backbone, head"),
        ({"parts": {"backbone": BACKBONE, "head": HEAD}}, "parts.backbone, parts.head"),
        ({"backbone": BACKBONE, "normaliser": {"mean": torch.ones(3)}}, "backbone, normaliser"),
        ({"backbone": BACKBONE, "loss": {"centres": torch.ones(9, 2)}}, "backbone, loss"),
        ({"backbone": BACKBONE, "head.weight": torch.ones(2)}, "backbone, the file itself"),
        ({"backbone": BACKBONE, "centres": torch.ones(9, 2)}, "backbone, the file itself"),
    ],
)
def test_a_small_network_is_not_dropped(tmp_path: Path, content: object, says: str) -> None:
    found = refused(save(tmp_path / "x.pt", content))
    assert "several sets of weights" in found.message
    assert says in found.details["found"]


@pytest.mark.parametrize(
    "beside",
    [
        {"history": {"train": torch.ones(9), "val": torch.ones(9, 2)}},
        {"meta": {"class_weights": torch.ones(3)}},
        {"metrics": {"confusion": torch.ones(9, 9)}},
        {"train_losses": torch.ones(9), "best": torch.tensor(0.5)},
        {"extra": {"loss_history": torch.ones(9), "lr": torch.tensor(0.1)}},
        {"progress": {"seen": torch.tensor(9), "best": torch.tensor(0.5)}},
        {"cuda": {"generator": torch.zeros(99, dtype=torch.uint8)}},
        {"rng_state": torch.zeros(99, dtype=torch.uint8)},
        {"scaler": {"scale": torch.ones(3)}, "lr_scheduler": {"last": torch.ones(3)}},
        {"adam": {"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.ones(4, 3)}}}},
        {"adafactor": {"state": {0: {"exp_avg_sq_row": torch.ones(4)}}}},
        {"adagrad": {"state": {0: {"step": torch.tensor(5.0), "sum": torch.ones(4, 3)}}}},
        {"backbone_ema": BACKBONE, "ema_decay": torch.tensor(0.9)},
    ],
)
def test_what_is_no_network_is_left_out(tmp_path: Path, beside: dict[str, Any]) -> None:
    for state in (BACKBONE, STATE):
        path = save(tmp_path / "x.pt", {"backbone": state, **beside})
        same(one(path), state)


def test_weights_that_are_left_out_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = {"optimizer": {"state": {0: {"exp_avg": torch.ones(2, 2)}}}, "losses": torch.ones(9)}
    ema = {name: tensor + 1 for name, tensor in BACKBONE.items()}
    (tmp_path / "run").mkdir()
    save(tmp_path / "run/step_1.pt", {"model": BACKBONE, "head": HEAD, **beside})
    save(tmp_path / "run/step_2.pt", {"model": BACKBONE, "model_ema": ema, **beside})
    launches.here("inspect", tmp_path / "run")
    said = " ".join(capsys.readouterr().err.split())
    assert "other weights beside the model's, under head, model_ema: they are left out" in said
    launches.here("inspect", save(tmp_path / "plain.pt", {"model": BACKBONE, **beside}))
    assert not capsys.readouterr().err


def test_an_unusual_entry_is_told(tmp_path: Path) -> None:
    for name, content, entry in (
        ("a.pt", {"parts": {"backbone": STATE}}, "parts.backbone"),
        ("b.pt", {"ema": STATE}, "ema"),
        ("c.pt", {"epoch": 1, "state_dict": STATE}, None),
        ("d.pt", STATE, None),
    ):
        assert one(save(tmp_path / name, content)).entry == entry
    assert "read from the entry parts.backbone" in launches.here("inspect", tmp_path / "a.pt")
    said = " ".join(launches.here("inspect", tmp_path).split())
    assert "read from the entry parts.backbone in a.pt" in said
    assert "read from the entry ema in b.pt" in said
    assert "the entry" not in launches.here("inspect", tmp_path / "c.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_and_named(tmp_path: Path, zipped: bool) -> None:
    made = tmp_path / "made"
    content = {"model": STATE, "evil": RunsCode(made)}
    path = save(tmp_path / "x.pt", content, _use_new_zipfile_serialization=zipped)
    error = refused(path)
    assert "mkdir" in error.details["found"]
    assert "torch.save(model.state_dict()" in error.details["what to do"]
    assert not made.exists()
    bare = tmp_path / "bare.pt"
    bare.write_bytes(pickle.dumps({"evil": RunsCode(made)}, protocol=2))
    assert "mkdir" in refused(bare).details["found"]
    assert not made.exists()


def test_harmless_extras_are_named_too(tmp_path: Path) -> None:
    content = {"model": STATE, "args": argparse.Namespace(lr=1, out=PurePosixPath("x")),
               "when": argparse.ArgumentError}  # fmt: skip
    found = refused(save(tmp_path / "x.pt", content)).details["found"]
    assert "argparse.Namespace" not in found
    assert "PurePosixPath" in found
    assert "argparse.ArgumentError" in found
    model = refused(save(tmp_path / "y.pt", nn.Linear(2, 2))).details["found"]
    assert "torch.nn.modules.linear.Linear" in model


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"PK\x03\x04zzzz",
        b"\x80\x02}q",
        b"\x80\x04.",
        b"\x80\x02\x8a\x0a",
        b"\0" * 99,
    ],
)
def test_no_pickle(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(content)
    assert "damaged" in refused(path).message


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated(tmp_path: Path, zipped: bool) -> None:
    path = save(tmp_path / "x.pt", STATE, _use_new_zipfile_serialization=zipped)
    for size in (path.stat().st_size - 7, path.stat().st_size // 2, 3):
        os.truncate(path, size)
        assert "damaged" in refused(path).message


def rezip(path: Path, method: int, edit: tuple[bytes, bytes] = (b"", b"")) -> None:
    with zipfile.ZipFile(path) as archive:
        files = {e.filename: archive.read(e) for e in archive.infolist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data.replace(*edit) if name.endswith("data.pkl") else data)


def test_a_compressed_archive_is_unpacked(tmp_path: Path) -> None:
    state = {"w": torch.zeros(1000), "v": torch.ones(1000)}
    path = save(tmp_path / "x.pt", state)
    rezip(path, zipfile.ZIP_DEFLATED)
    same(one(path), state)


def test_a_pickle_that_lies_about_lengths(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"w": torch.arange(4.0), "v": torch.ones(64)})
    with zipfile.ZipFile(path) as archive:
        program = archive.read("x/data.pkl")
    assert program.count(b"K\x04tq") == 1
    assert program.count(b"K\x04\x85") == 1
    rezip(path, zipfile.ZIP_STORED, (b"K\x04tq", b"K\x40tq"))
    rezip(path, zipfile.ZIP_STORED, (b"K\x04\x85", b"K\x40\x85"))
    assert "not as long" in refused(path).message
    rezip(path, zipfile.ZIP_STORED, (b"K\x40", struct.pack("<BI", ord("J"), 10**6)))
    refused(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    assert "TorchScript" in refused(path).message


@pytest.mark.parametrize("zipped", [True, False])
def test_tied_views_and_strided_tensors(tmp_path: Path, zipped: bool) -> None:
    embed, flat, square = torch.randn(5, 4), torch.randn(8), torch.randn(3, 3)
    state = {
        "embed": embed,
        "head": embed,
        "again": embed,
        "turned": embed.t(),
        "part": embed[1:],
        "square": square,
        "square turned": square.t(),
        "flat.a": flat[:4],
        "flat.b": flat[4:],
        "row": torch.ones(1, 3).expand(4, 3),
        "none": torch.zeros(0, 2),
        "nothing": torch.zeros(0, 2),
        "scalar": torch.tensor(2.0),
    }
    path = save(tmp_path / "x.pt", state, _use_new_zipfile_serialization=zipped)
    checkpoint = one(path)
    assert checkpoint.aliases == {"head": "embed", "again": "embed"}
    same(checkpoint, state)
    assert checkpoint.rows("turned", 1, 3).tolist() == embed.t()[1:3].tolist()
    assert checkpoint.rows("scalar", 0, 1).shape == ()
    assert checkpoint.rows("scalar", 1, 1).size == 0


def test_shards_of_a_pickle(tmp_path: Path) -> None:
    names = {k: f"pytorch_model-0000{i}-of-00002.bin" for i, k in enumerate(STATE, 1)}
    for key, name in names.items():
        torch.save({key: STATE[key]}, tmp_path / name)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    checkpoint = one(tmp_path)
    assert checkpoint.path == tmp_path
    same(checkpoint, STATE)
    assert [f.raw_names for f in checkpoint.files] == [("a.weight",), ("a.bias",)]
    index.write_text(json.dumps({"weight_map": {**names, "b": "../x.bin"}}))
    with pytest.raises(CheckpointError, match="outside"):
        one(tmp_path)
    index.write_text(json.dumps({"weight_map": {**names, "b": names["a.bias"]}}))
    with pytest.raises(CheckpointError, match="lacks"):
        one(tmp_path)


def test_files_are_mapped_and_hold_no_descriptors(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"w": torch.zeros(1000)})
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    checkpoints = [one(path) for _ in range(10)]
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 1
        assert str(path) in Path("/proc/self/maps").read_text()
    assert checkpoints[0].rows("w", 10, 20).size == 10
