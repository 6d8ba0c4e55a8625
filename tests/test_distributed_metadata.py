"""``.metadata`` of distributed checkpoints: nothing of it is run, and nothing of it is believed."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pytest
import torch
from dcp_folders import STATE, edit, one, refused, save
from torch.distributed._shard.sharded_tensor import metadata as old
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from twa_merge.checkpoints.distributed_metadata import DistributedMetadata


class Calls:
    """Unpickled without care, calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "step_1", {"model": STATE, "step": 1})


def tensor(document: Metadata) -> TensorStorageMetadata:
    found = document.state_dict_metadata["model.a.weight"]
    assert isinstance(found, TensorStorageMetadata)
    return found


def test_what_is_in_it(folder: Path) -> None:
    found = DistributedMetadata(folder, folder)
    assert {n: i.shape for n, i in found.tensors.items()} == {
        f"model.{name}": tuple(t.shape) for name, t in STATE.items()
    }
    assert found.values == ["step"]
    assert found.keys("model.a.weight") == ("model", "a.weight")
    (box,) = found.boxes("model.a.weight")
    assert (box.corner, box.sizes, box.item.path.name) == ((0, 0), (4, 3), "__0_0.distcp")


@pytest.mark.parametrize(
    "function", [os.mkdir, eval, getattr, torch.load, torch.hub.load, pickle.loads]
)
@pytest.mark.parametrize("place", ["planner_data", "whole", "storage_meta", "key"])
def test_code_is_refused_and_named(
    folder: Path, function: Callable[..., Any], place: str, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    evil = Calls(function, str(made))

    def change(document: Metadata) -> Any:
        if place == "whole":
            return evil
        if place == "key":
            document.state_dict_metadata["x"] = evil  # type: ignore[assignment]
        else:
            setattr(document, place, evil)

    edit(folder, change)
    error = refused(folder)
    assert "could run code" in error.message
    assert function.__name__ in error.details["found"]
    assert "do not trust it" in error.details["what to do"]
    assert error.details["checkpoint"] == str(folder / ".metadata")
    assert not made.exists()


def test_a_pickle_that_runs_a_command(tmp_path: Path, folder: Path) -> None:
    made = tmp_path / "made"
    (folder / ".metadata").write_bytes(
        b"cposix\nsystem\n(S'touch " + str(made).encode() + b"'\ntR."
    )
    assert "posix.system" in refused(folder).details["found"]
    assert not made.exists()
    # It would have.
    pickle.loads((folder / ".metadata").read_bytes())
    assert made.exists()


@pytest.mark.parametrize(
    "program",
    [
        # Attributes of what is allowed: names with dots, those of modules, those of functions.
        b"\x80\x04\x8c\x05torch\x8c\x09Size.mro\x93)R.",
        b"\x80\x04\x8c\x05torch\x8c\x04load\x93)R.",
        b"\x80\x04\x8c\x05torch\x8c\x02os\x93)R.",
        b"\x80\x04\x8c\x2atorch.distributed.checkpoint.metadata\x8c\x02os\x93)R.",
        b"ctorch\n_dynamo\n.",
        b"\x80\x04\x8c\x13torch.serialization\x8c\x04load\x93)R.",
    ],
)
def test_what_stands_beside_what_is_allowed(folder: Path, program: bytes) -> None:
    (folder / ".metadata").write_bytes(program)
    error = refused(folder)
    assert "could run code" in error.message or "damaged" in error.message


def test_torchs_own_classes_stay_as_they_are(folder: Path) -> None:
    """BUILD with a state of two parts sets attributes, of classes as of their instances."""
    before = {kind: dict(vars(kind)) for kind in (Metadata, MetadataIndex, filesystem._StorageInfo)}
    for kind, module in (
        (Metadata, b"torch.distributed.checkpoint.metadata"),
        (MetadataIndex, b"torch.distributed.checkpoint.metadata"),
        (filesystem._StorageInfo, b"torch.distributed.checkpoint.filesystem"),
    ):
        name = kind.__name__.encode()
        program = b"c" + module + b"\n" + name + b"\n(N(dX\x05\x00\x00\x00ownedctorch\nSize\nstb."
        (folder / ".metadata").write_bytes(program)
        refused(folder)
        assert vars(kind) == before[kind]
        # It would have set one.
        pickle.loads(program)
        assert kind.owned is torch.Size  # type: ignore[union-attr]
        del kind.owned  # type: ignore[union-attr]


def test_members_of_torchs_enumerations_stay_as_they_are(folder: Path) -> None:
    member = metadata._MEM_FORMAT_ENCODING(0)
    program = (
        b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n(I0\ntR"
        b"(dX\x05\x00\x00\x00ownedI1\nsb."
    )
    (folder / ".metadata").write_bytes(program)
    refused(folder)
    assert not hasattr(member, "owned")
    pickle.loads(program)
    assert member.owned == 1  # type: ignore[attr-defined]
    del member.owned  # type: ignore[attr-defined]


def test_what_older_versions_and_other_systems_have_saved(folder: Path) -> None:
    """Properties were a class of sharded tensors then, and pathlib a single module."""

    def change(document: Metadata) -> None:
        for saved in document.state_dict_metadata.values():
            if isinstance(saved, TensorStorageMetadata):
                saved.properties = old.TensorProperties(saved.properties.dtype)  # type: ignore
        assert document.storage_meta
        document.storage_meta.checkpoint_id = [  # type: ignore[assignment]
            PurePosixPath("/a"),
            PureWindowsPath("c:/a"),
            Path("a"),
        ]
        for place in document.storage_data.values():
            place.__dict__.pop("transform_descriptors", None)

    edit(folder, change)
    content = (folder / ".metadata").read_bytes()
    assert b"_shard.sharded_tensor.metadata" in content
    assert one(folder).tensors["a.weight"].shape == (4, 3)
    assert b"\x13MEM_FORMAT_ENCODING" in content
    (folder / ".metadata").write_bytes(b"cpathlib._local\nPosixPath\n(S'/a'\ntR.")
    assert "NoneType" in refused(folder).details["found"]


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\x80\x04.", b"\x80\x04}.", b"\x80\x04\x95", b"\0" * 99, b"I1\n."]
)
def test_no_metadata(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    error = refused(folder)
    assert "damaged" in error.message
    assert error.details["checkpoint"] == str(folder / ".metadata")
    assert "again" in error.details["what to do"]


def test_metadata_cut_short(folder: Path) -> None:
    content = (folder / ".metadata").read_bytes()
    for size in range(0, len(content), 97):
        (folder / ".metadata").write_bytes(content[:size])
        assert "damaged" in refused(folder).message


@pytest.mark.parametrize(
    "name", ["../a", "/etc/passwd", "..", "", "a/b", "a\\b", "c:a", "a\0b", b"a", 3]
)
def test_files_stay_in_the_folder(folder: Path, name: Any) -> None:
    def change(document: Metadata) -> None:
        for place in document.storage_data.values():
            place.relative_path = name

    edit(folder, change)
    error = refused(folder)
    assert "outside its own folder" in error.message
    assert error.details["tensor"]


def chunked(*chunks: tuple[tuple[int, ...], tuple[int, ...]]) -> Callable[[Metadata], None]:
    """The same tensor in other parts, all of which lie where it does."""

    def change(document: Metadata) -> None:
        place = document.storage_data[MetadataIndex("model.a.weight", (0, 0))]
        tensor(document).chunks = [
            ChunkStorageMetadata(torch.Size(corner), torch.Size(sizes)) for corner, sizes in chunks
        ]
        for corner, _ in chunks:
            document.storage_data[MetadataIndex("model.a.weight", corner)] = place

    return change


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [((0, 0), (3, 3))],
        [((0, 0), (2, 3)), ((1, 0), (2, 3))],
        [((0, 0), (4, 2)), ((0, 1), (4, 1))],
        [((0, 0), (4, 3)), ((0, 0), (2, 3))],
    ],
)
def test_parts_that_do_not_make_up_the_tensor(folder: Path, chunks: list[Any]) -> None:
    edit(folder, chunked(*chunks))
    error = refused(folder)
    assert "do not make up the tensor" in error.message
    assert error.details["tensor"] == "model.a.weight"
    assert "12 numbers" in error.details["expected"]


def test_replicas_of_a_part_count_once(folder: Path) -> None:
    edit(folder, chunked(((0, 0), (4, 3)), ((0, 0), (4, 3)), ((4, 0), (0, 3))))
    assert one(folder).rows("a.weight", 1, 2).tolist() == [[3, 4, 5]]
    assert len(DistributedMetadata(folder, folder).boxes("model.a.weight")) == 1


@pytest.mark.parametrize(
    "part",
    [
        ((1, 0), (4, 3)),
        ((0, 0), (3, 4)),
        ((0, 0), (12, 1)),
        ((0,), (12,)),
        ((0, 0, 0), (4, 3, 1)),
        ((-1, 0), (4, 3)),
        ((0, 0), (-4, -3)),
    ],
)
def test_parts_that_are_not_inside_the_tensor(folder: Path, part: Any) -> None:
    edit(folder, chunked(part))
    error = refused(folder)
    assert "a part of shape" in error.details["found"]
    assert error.details["tensor"] == "model.a.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda d: setattr(d, "state_dict_metadata", None),
        lambda d: setattr(d, "storage_data", None),
        lambda d: setattr(d, "storage_data", {}),
        lambda d: setattr(d, "storage_data", {1: 2}),
        lambda d: d.state_dict_metadata.update({3: tensor(d)}),
        lambda d: setattr(tensor(d), "properties", None),
        lambda d: setattr(tensor(d).properties, "dtype", 5),
        lambda d: setattr(tensor(d), "size", None),
        lambda d: setattr(tensor(d), "size", ("a", 3)),
        lambda d: setattr(tensor(d), "size", torch.Size([-4, -3])),
        lambda d: setattr(tensor(d), "size", torch.Size([2**62, 3])),
        lambda d: setattr(tensor(d), "size", torch.Size([0, 2**62, 2**62])),
        lambda d: setattr(tensor(d), "chunks", 7),
        lambda d: setattr(tensor(d), "chunks", [7]),
        lambda d: setattr(tensor(d).chunks[0], "sizes", torch.Size([4])),
        lambda d: setattr(tensor(d).chunks[0], "sizes", torch.Size([5, 3])),
        lambda d: setattr(tensor(d).chunks[0], "offsets", torch.Size([-1, 0])),
        lambda d: setattr(tensor(d).chunks[0], "offsets", ("a", 0)),
        lambda d: setattr(tensor(d).chunks[0], "offsets", torch.Size([0, 1])),
        lambda d: [setattr(p, "offset", -1) for p in d.storage_data.values()] and None,
        lambda d: [setattr(p, "length", "x") for p in d.storage_data.values()] and None,
        lambda d: d.planner_data.update({"model.a.weight": ("model", "a.bias", "b")}),
        lambda d: d.planner_data.update({"model.a.weight": ("model", "a.bias")}),
    ],
)
def test_what_does_not_fit_together(folder: Path, change: Callable[[Metadata], None]) -> None:
    edit(folder, lambda document: change(document) and None)
    error = refused(folder)
    assert error.details["found"]
    assert error.details["what to do"]
    assert str(folder) in error.details["checkpoint"]


def test_names_without_keys_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = save(tmp_path / "step_1", STATE)
    edit(folder, lambda document: setattr(document, "planner_data", None))
    assert list(one(folder).tensors) == list(STATE)


def test_what_was_compressed_is_to_be_converted(folder: Path) -> None:
    def change(document: Metadata) -> None:
        for place in document.storage_data.values():
            place.transform_descriptors = ["stream.zstd"]

    edit(folder, change)
    error = refused(folder)
    assert "cannot be read directly" in error.message
    assert "stream.zstd" in error.details["found"]
    assert "dcp_to_torch" in error.details["what to do"]


def test_sparse_tensors_are_to_be_converted(folder: Path) -> None:
    edit(folder, lambda d: setattr(tensor(d).properties, "layout", torch.sparse_coo))
    assert "dcp_to_torch" in refused(folder).details["what to do"]
