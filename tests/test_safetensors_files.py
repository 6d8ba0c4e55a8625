"""Safetensors: what is read, and what hostile files end in."""

from __future__ import annotations

import gc
import json
import os
import struct
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from twa_merge.checkpoints import Checkpoint, open_checkpoints, open_files
from twa_merge.checkpoints.open_files import OpenFile, OpenFiles
from twa_merge.errors import CheckpointError
from twa_merge.tensors import dtype_of, tensor_rows

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def sharded(folder: Path, shards: Mapping[str, Mapping[str, Tensor]], **more: str) -> Path:
    """A Hugging Face folder; ``more`` goes into the index's weight map."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, state in shards.items():
        save_file(dict(state), folder / name, metadata={"format": "pt"})
    weight_map = {k: name for name, state in shards.items() for k in state} | more
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def three_shards(folder: Path, value: float = 0.0) -> Path:
    return sharded(
        folder,
        {
            f"model-0000{k}-of-00003.safetensors": {f"layer.{k}": torch.full((3, 2), value + k)}
            for k in (1, 2, 3)
        },
    )


def one(path: Path) -> Checkpoint:
    (checkpoint,) = open_checkpoints([path])
    return checkpoint


def refused(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoints([path])
    assert str(path) in str(caught.value) or str(path.parent) in str(caught.value)
    assert len(str(caught.value)) < 1500
    return caught.value


def test_every_dtype_and_shape_comes_back_row_by_row(tmp_path: Path) -> None:
    state = {
        "scalar": torch.tensor(3.5),
        "no rows": torch.zeros(0, 4),
        "empty rows": torch.zeros(3, 0),
        "f64": torch.randn(4, 3, dtype=torch.float64),
        "bf16": torch.randn(5, 2, 3).bfloat16(),
        "f16": torch.randn(4).half(),
        "f8": torch.randn(4, 3).to(torch.float8_e4m3fn),
        "i64": torch.arange(6).reshape(3, 2),
        "u16": torch.arange(4).to(torch.uint16),
        "bool": torch.tensor([True, False, True]),
        "complex": torch.randn(2, 2, dtype=torch.complex64),
    }
    save_file(state, tmp_path / "x.safetensors", metadata={"format": "pt", "by": "test"})
    checkpoint = one(tmp_path / "x.safetensors")
    assert checkpoint.format == "safetensors"
    assert set(checkpoint.tensors) == set(state)
    assert checkpoint.files[0].metadata == {"format": "pt", "by": "test"}
    for name, tensor in state.items():
        info = checkpoint.tensors[name]
        assert (info.shape, info.dtype) == (tuple(tensor.shape), dtype_of(tensor.dtype))
        half = info.rows // 2
        whole = tensor_rows(checkpoint, name, 0, info.rows)
        parts = [tensor_rows(checkpoint, name, 0, half), tensor_rows(checkpoint, name, half)]
        assert whole.dtype == tensor.dtype
        assert whole.shape == tensor.shape
        assert torch.equal(bits(whole), bits(tensor))
        if tensor.dim():
            assert [p.shape[0] for p in parts] == [half, info.rows - half]
            assert torch.equal(torch.cat([bits(p) for p in parts]), bits(tensor))
        else:
            assert checkpoint.rows(name, 1, 1).size == 0


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    raw(
        tmp_path / "x.safetensors",
        {"late": {**F32, "data_offsets": [8, 16]}, "early": F32},
        struct.pack("<4f", 1, 2, 3, 4),
    )
    checkpoint = one(tmp_path / "x.safetensors")
    assert list(checkpoint.tensors) == ["early", "late"]
    assert checkpoint.rows("late", 0, 2).tolist() == [3, 4]


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    checkpoint = one(three_shards(tmp_path / "m"))
    assert checkpoint.format == "huggingface"
    assert list(checkpoint.tensors) == ["layer.1", "layer.2", "layer.3"]
    assert [f.path.name for f in checkpoint.files] == [
        f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)
    ]
    assert checkpoint.rows("layer.3", 1, 3).tolist() == [[3, 3], [3, 3]]


def test_shards_without_an_index_are_one_checkpoint_or_an_error(tmp_path: Path) -> None:
    folder = three_shards(tmp_path / "m")
    (folder / "model.safetensors.index.json").unlink()
    files = sorted(folder.glob("*.safetensors"))
    assert list(one(folder).tensors) == ["layer.1", "layer.2", "layer.3"]
    (listed,) = open_checkpoints(files)
    assert len(listed.files) == 3
    assert "shards" in refused(files[1]).message
    files[1].rename(folder / "model-00005-of-00003.safetensors")
    assert "3 shards" in str(refused(folder))
    (folder / "model-00005-of-00003.safetensors").unlink()
    assert "3 shards" in str(refused(folder))


def test_hub_cache_links_and_untold_tensors_are_fine(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    folder.mkdir(parents=True)
    save_file({"a": torch.ones(2), "untold": torch.zeros(1)}, blobs / "123")
    (folder / "model-00001-of-00001.safetensors").symlink_to("../../blobs/123")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    )
    checkpoint = one(folder)
    assert sorted(checkpoint.tensors) == ["a", "untold"]
    assert checkpoint.rows("a", 0, 2).tolist() == [1, 1]


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\\b", "C:x", "a\0b", 3],
)
def test_index_cannot_leave_its_folder(tmp_path: Path, name: object) -> None:
    save_file({"secret": torch.ones(2)}, tmp_path / "x.safetensors")
    folder = three_shards(tmp_path / "m")
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["secret"] = name
    index.write_text(json.dumps(document))
    error = refused(folder)
    assert "outside" in error.message
    assert error.details["tensor"] == "secret"


def test_broken_indexes(tmp_path: Path) -> None:
    folder = three_shards(tmp_path / "m")
    index = folder / "model.safetensors.index.json"
    good = index.read_bytes()
    for bad in (b"", b"{", b"\xff\xfe", b"[1]", b"{}", b'{"weight_map": []}', b"[" * 100_000):
        index.write_bytes(bad)
        assert "index" in refused(folder).message
    index.write_bytes(good)
    shard = folder / "model-00002-of-00003.safetensors"
    document = json.loads(good)
    document["weight_map"]["ghost"] = shard.name
    index.write_text(json.dumps(document))
    assert refused(folder).details["tensor"] == "ghost"
    index.write_bytes(good)
    save_file({"layer.2": torch.ones(3, 2), "layer.1": torch.ones(3, 2)}, shard)
    error = refused(folder)
    assert "two files" in error.message
    assert error.details["tensor"] == "layer.1"
    shard.unlink()
    assert shard.name in refused(folder).details["found"]
    shard.mkdir()
    assert refused(folder).details["expected"] == "a file"


HOSTILE: dict[str, tuple[Any, bytes]] = {
    "no json": (b"{not json", b""),
    "no text": (b"\xff\xfe\xfd", b""),
    "no object": ([1, 2], b""),
    "deep": (b"[" * 100_000, b""),
    "twice": (b'{"a": %b, "a": %b}' % ((json.dumps(F32).encode(),) * 2), bytes(8)),
    "entry": ({"a": 3}, b""),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "negative": ({"a": {**F32, "shape": [-2]}}, bytes(8)),
    "two negatives": ({"a": {**F32, "shape": [-1, -2]}}, bytes(8)),
    "float": ({"a": {**F32, "shape": [2.0]}}, bytes(8)),
    "bool": ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4)),
    "three offsets": ({"a": {**F32, "data_offsets": [0, 4, 8]}}, bytes(8)),
    "unknown dtype": ({"a": {**F32, "dtype": "F4"}}, bytes(8)),
    "odd dtype": ({"a": {**F32, "dtype": ["F32"]}}, bytes(8)),
    "shape lies": ({"a": {**F32, "shape": [3]}}, bytes(8)),
    "backwards": ({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8)),
    "outside": ({"a": {**F32, "data_offsets": [8, 16]}}, bytes(8)),
    "far outside": ({"a": {**F32, "data_offsets": [2**64, 2**64 + 8]}}, bytes(8)),
    "overlap": ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12)),
    "gap": ({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, bytes(20)),
    "too long": ({"a": F32}, bytes(9)),
    "metadata": ({"__metadata__": {"a": 1}, "a": F32}, bytes(8)),
    "huge": ({"a": {**F32, "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}, b""),
    "many digits": (b'{"a": {"shape": [' + b"9" * 5000 + b"]}}", b""),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path: Path, case: str) -> None:
    path = raw(tmp_path / "x.safetensors", *HOSTILE[case])
    error = refused(path)
    assert error.details["checkpoint"] == str(path)


@pytest.mark.parametrize("size", [0, 5, 8, 60, -1, -9])
def test_truncated_files(tmp_path: Path, size: int) -> None:
    folder = three_shards(tmp_path / "m")
    shard = folder / "model-00002-of-00003.safetensors"
    os.truncate(shard, size if size >= 0 else shard.stat().st_size + size)
    assert "short" in refused(folder).message


def test_header_longer_than_the_file_or_the_format_allows(tmp_path: Path) -> None:
    for length in (0, 1, 1000, 2**63, 2**64 - 1):
        path = raw(tmp_path / "x.safetensors", {"a": F32}, bytes(8), length)
        assert "short" in refused(path).message


def test_a_git_lfs_pointer_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refused(tmp_path).details["what to do"]


def test_a_file_that_changes_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for late in (
        {"a": torch.ones(3)},
        {"b": torch.ones(2, 3)},
        {"a": torch.ones(2, 3).double()},
        {"a": torch.ones(2, 4)},
    ):
        save_file({"a": torch.ones(2, 3)}, path)
        checkpoint = one(path)
        save_file(late, path)
        with pytest.raises(CheckpointError, match="changed"):
            checkpoint.rows("a", 0, 2)
    checkpoint = one(path)
    path.unlink()
    with pytest.raises(CheckpointError):
        checkpoint.rows("a", 0, 2)


def test_files_that_are_replaced_or_cut_short_while_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_files, "FILES", OpenFiles(most=1))
    first, second = (tmp_path / f"{k}.safetensors" for k in (1, 2))
    for path in (first, second):
        save_file({"a": torch.ones(4, 3)}, path)
    one_, two = open_checkpoints([first, second])
    assert one_.rows("a", 0, 4).sum() == 12
    # Another file of the same size: the one that is open is still the old one.
    save_file({"a": torch.zeros(4, 3)}, tmp_path / "new")
    (tmp_path / "new").rename(first)
    assert one_.rows("a", 0, 4).sum() == 12
    assert two.rows("a", 0, 4).sum() == 12
    with pytest.raises(CheckpointError, match="changed") as caught:
        one_.rows("a", 0, 4)
    assert caught.value.details["checkpoint"] == str(first)
    assert caught.value.details["tensor"] == "a"
    two.rows("a", 0, 1)
    os.truncate(second, second.stat().st_size - 20)
    assert two.rows("a", 0, 1).sum() == 3
    with pytest.raises(CheckpointError, match="changed"):
        two.rows("a", 2, 4)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files cannot be counted here")
def test_files_are_closed_with_their_checkpoint(tmp_path: Path) -> None:
    checkpoint = one(three_shards(tmp_path / "m"))
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for name, info in checkpoint.tensors.items():
        checkpoint.rows(name, 0, info.rows)
    assert len(os.listdir("/proc/self/fd")) == before + 3
    del checkpoint
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_64_checkpoints_of_three_shards_read_from_many_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_files, "FILES", OpenFiles(most=5))
    for k in range(64):
        three_shards(tmp_path / f"checkpoint-{k}", value=10.0 * k)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None
    checkpoints = open_checkpoints([tmp_path])
    jobs = [(k, i) for i in (1, 2, 3) for k in range(64)] * 5
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda j: checkpoints[j[0]].rows(f"layer.{j[1]}", 1, 3), jobs))
    assert all(bool((r == 10 * k + i).all()) for (k, i), r in zip(jobs, rows, strict=True))
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 5
    for checkpoint in checkpoints:
        checkpoint.close()
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before
    assert rows[0].tolist() == [[1, 1], [1, 1]]  # rows outlive their reader
    expected = load_file(tmp_path / "checkpoint-7" / "model-00002-of-00003.safetensors")
    assert torch.equal(tensor_rows(checkpoints[7], "layer.2"), expected["layer.2"])


def test_a_collection_in_the_middle_of_it_does_not_wait_for_itself(tmp_path: Path) -> None:
    """The garbage collector may let go of a reader in a thread that is about to close another."""
    files = OpenFiles()
    path = tmp_path / "x"
    path.write_bytes(b"x")

    class Owner:
        pass

    def collected_with_the_lock() -> None:
        owner = Owner()
        files.register(owner)
        files.keep(owner, path, OpenFile.at(path))
        with files._lock:
            del owner

    thread = threading.Thread(target=collected_with_the_lock, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert files.get(object(), path) is None
    assert not files._files
