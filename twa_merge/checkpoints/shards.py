"""Checkpoints that are spread over several files: index files and shard names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import CheckpointError, listing
from .base import reading, require_file

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)(?P<end>\.[^/]+)")
_AGAIN = "save or download the checkpoint again"


def without_shard(name: str) -> str:
    """``model-00001-of-00003.safetensors`` → ``model.safetensors``; other names stay."""
    match = _SHARD.fullmatch(name)
    return f"{match['stem']}{match['end']}" if match else name


def group_shards(files: Iterable[Path]) -> list[tuple[Path, ...]]:
    """Files that are shards of one checkpoint together, all others alone, in the order given."""
    groups: dict[tuple[Path, ...] | tuple[Path, str, str], list[Path]] = {}
    for file in files:
        match = _SHARD.fullmatch(file.name)
        if match:
            groups.setdefault((file.parent, without_shard(file.name), match["total"]), []).append(
                file
            )
        else:
            groups.setdefault((file,), []).append(file)
    return [tuple(group) for group in groups.values()]


def require_all_shards(files: Sequence[Path]) -> None:
    """Checks one group of ``group_shards``: numbers 1 to total (or 0 to total - 1), all there.

    Raises:
        CheckpointError: a shard is missing.
    """
    matches = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    if not matches:
        return
    total = int(matches[0]["total"])
    numbers = sorted(int(match["number"]) for match in matches)
    if len(numbers) != total or numbers[-1] - numbers[0] != total - 1 or numbers[0] > 1:
        raise CheckpointError(
            "A checkpoint is not complete: some of its shards are missing.",
            checkpoint=files[0].parent,
            expected=f"{total} shards named like {files[0].name}",
            found=f"{len(files)}: {listing(sorted(file.name for file in files))}",
            remedy="give the folder that holds all shards, or download the missing ones",
        )


def read_index(index: Path) -> dict[str, Path]:
    """Tensor → file that it lies in, as an index file says; every file is there.

    Files are known by name alone, so that they stay in the index's folder; a name may be a
    symbolic link to somewhere else, as in the Hugging Face cache.

    Raises:
        CheckpointError: no valid index, a file outside the folder, or a missing file.
    """
    require_file(index)
    try:
        with reading(index):
            document = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            "An index file is not valid JSON.", checkpoint=index, found=error, remedy=_AGAIN
        ) from error
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            "An index file says nothing about weights.",
            checkpoint=index,
            expected="an object with weight_map: tensor → file",
            found=listing(document) if isinstance(document, dict) else type(document).__name__,
            remedy=_AGAIN,
        )
    files: dict[object, Path] = {}
    for tensor, name in weight_map.items():
        files.setdefault(name, index.parent / require_plain_name(name, index, tensor))
    require_present(index, list(files.values()))
    return {tensor: files[name] for tensor, name in weight_map.items()}


def require_consistent(
    index: Path | None,
    weight_map: Mapping[str, Path],
    names: Mapping[Path, Iterable[str]],
) -> None:
    """Checks what the shards hold against each other and against the index.

    Tensors that the index does not mention are welcome: some libraries leave buffers out of it.

    Args:
        index: None for shards without one; ``weight_map`` is empty then.
        names: shard → the tensors that it really holds.

    Raises:
        CheckpointError: a tensor lies in two shards, or not in the shard that the index says.
    """
    found: dict[str, Path] = {}
    for file, tensors in names.items():
        for tensor in tensors:
            if tensor in found:
                raise CheckpointError(
                    "A tensor lies in two files of one checkpoint.",
                    checkpoint=file,
                    tensor=tensor,
                    expected="each tensor in one file",
                    found=f"{found[tensor].name} and {file.name}",
                    remedy="remove files of an earlier save from the folder, or save again",
                )
            found[tensor] = file
    for tensor, file in weight_map.items():
        if found.get(tensor) != file:
            raise CheckpointError(
                "A file lacks a tensor that the index says it holds.",
                checkpoint=index,
                tensor=tensor,
                expected=f"in {file.name}",
                found=f"in {found[tensor].name}" if tensor in found else "nowhere",
                remedy=_AGAIN,
            )


def require_plain_name(name: object, index: Path, tensor: str) -> str:
    """The name of a file that ``index`` says a tensor lies in.

    Raises:
        CheckpointError: it would lead out of the index's folder.
    """
    if (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and name.isprintable()
        and not any(mark in name for mark in "/\\:")
    ):
        return name
    raise CheckpointError(
        "An index file names a file outside its own folder.",
        checkpoint=index,
        tensor=tensor,
        expected="the name of a file in the same folder",
        found=repr(name)[:200],
        remedy="do not trust this checkpoint, or correct its index",
    )


def require_present(index: Path, files: Sequence[Path]) -> None:
    """Raises CheckpointError where a file is missing that ``index`` names."""
    with reading(index):
        missing = [file.name for file in files if not file.exists()]
    if missing:
        raise CheckpointError(
            "A checkpoint is not complete: some of its shards are missing.",
            checkpoint=index.parent,
            expected=f"{len(files)} files, as {index.name} says",
            found=f"without {listing(missing)}",
            remedy="download the missing files, or leave this checkpoint out",
        )
