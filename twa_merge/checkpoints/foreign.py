"""Formats that are not read here, and how their checkpoints become ones that are."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, listing
from .folders import METADATA, entries, has_metadata

_WHOLE_MODEL = (
    "save the whole model in one file, with torch.save(get_model_state_dict(model, options="
    "StateDictOptions(full_state_dict=True, cpu_offload=True)), path), both from"
    " torch.distributed.checkpoint.state_dict: all processes call it, the first one saves"
)


@dataclass(frozen=True)
class _Format:
    """A format that is not read.

    Attributes:
        names: of files that tell a folder of this format.
        remedy: how to convert it; ``source`` is the folder of these files, ``home`` the checkpoint.
        alone: names of files that are the whole model unless there are others.
        others: names of those, beside the file, or beside its folder (``../``).
    """

    names: re.Pattern[str]
    what: str
    remedy: str
    alone: re.Pattern[str] | None = None
    others: re.Pattern[str] | None = None


_SHARDED_SAFETENSORS = _Format(
    re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors"),
    "PyTorch distributed checkpoint in sharded safetensors",
    "save with HuggingFaceStorageWriter(..., save_distributed=True, enable_consolidation=True), or"
    " put every checkpoint together first: consolidate_safetensors_files({source!r}, {home!r},"
    " dict.fromkeys(names_of_all_tensors, 1)) from"
    " torch.distributed.checkpoint._consolidate_hf_safetensors",
)
_DISTRIBUTED = "PyTorch distributed checkpoint (FSDP, DCP)"
_WITHOUT_METADATA = _Format(
    re.compile(r".*\.distcp"),
    f"{_DISTRIBUTED} without its file {METADATA}",
    "copy the folder again, hidden files too, or leave it out if its save was interrupted; where"
    " each process has saved for itself (use_collectives=False), save it without that",
)
_BY_ITS_TOOLS = (
    "convert every checkpoint to the Hugging Face format first, with the tools of the framework"
    " that trained it"
)
_OTHER_RANKS = re.compile(r"mp_rank_\d*[1-9]\d*_model_states\.pt")
_OTHER_PARTS = re.compile(r"consolidated\.\d*[1-9]\d*\.pth")
_FORMATS = (
    _SHARDED_SAFETENSORS,
    _WITHOUT_METADATA,
    _Format(
        re.compile(r"(bf16_|fp16_)?zero_pp_rank_\d+.*"),
        "DeepSpeed ZeRO checkpoint",
        "convert it first: python zero_to_fp32.py FOLDER OUTPUT_FOLDER --safe_serialization"
        " (the script that DeepSpeed left in the folder)",
    ),
    _Format(
        _OTHER_RANKS,
        "DeepSpeed checkpoint of a model in parts (tensor or pipeline parallel)",
        _BY_ITS_TOOLS,
        re.compile(r"mp_rank_\d+_model_states\.pt"),
        _OTHER_RANKS,
    ),
    _Format(
        re.compile(r"layer_\d+-model_.*|(layer_\d+_)?expert_\d+_mp_rank_\d+_.*"),
        "DeepSpeed checkpoint of a model in parts (pipeline or expert parallel)",
        _BY_ITS_TOOLS,
    ),
    _Format(
        re.compile(r"model_index\.json"),
        "Diffusers pipeline",
        "give the folders of one of its parts instead, such as step_1/unet step_2/unet",
    ),
    _Format(
        _OTHER_PARTS,
        "tensor-parallel checkpoint",
        "convert it to the Hugging Face format first",
        re.compile(r"consolidated\.\d+\.pth"),
        _OTHER_PARTS,
    ),
    _Format(
        re.compile(r"model_optim_rng\.pt|distrib_optim\.pt"),
        "Megatron checkpoint",
        "convert every checkpoint to the Hugging Face format first, with the converter of the"
        " Megatron that saved it (tools/checkpoint of Megatron-LM, or Megatron Bridge)",
        re.compile(r"model_optim_rng\.pt"),
        re.compile(r"\.\./mp_rank_.*[1-9].*"),
    ),
)
# What tells the parts of one model in the names of files.
_PART = re.compile(r"(?<![a-z])(rank|shard|part|[mtp]p)([-_=]?)\d+", re.I)


def foreign_format(folder: Path, home: Path | None = None) -> CheckpointError | None:
    """The error to raise for a folder with a checkpoint in a format that is not read here.

    Args:
        home: the folder that the user would call the checkpoint, if not this one.
    """
    forms = [f for f in _FORMATS if not (f is _WITHOUT_METADATA and has_metadata(folder))]
    for entry in entries(folder):
        for form in forms:
            if form.names.fullmatch(entry.name):
                return _not_read(form, folder, home or folder, entry.name)
    return None


def foreign_file(file: Path) -> CheckpointError | None:
    """The error to raise for a file that is of such a format, or only a part of a model."""
    for form in _FORMATS:
        if form.alone and form.alone.fullmatch(file.name):
            others = _others(form, file)
            if others:
                return _not_read(form, file, file, listing(others))
        elif form.names.fullmatch(file.name):
            return _not_read(form, file.parent, file.parent, file.name)
    return None


def sharded_safetensors(file: Path) -> CheckpointError:
    """The error to raise for a safetensors file that holds some rows of each tensor."""
    return _not_read(_SHARDED_SAFETENSORS, file.parent, file.parent, file.name)


def unread_distributed(
    folder: Path, home: Path, *, expected: object, found: object, tensor: str | None = None
) -> CheckpointError:
    """The error to raise for a distributed checkpoint that torch can read, and this project not.

    Args:
        folder: of its files.
        home: the checkpoint, as the user would call it.
    """
    return CheckpointError(
        f"A {_DISTRIBUTED} cannot be read directly.",
        checkpoint=folder,
        tensor=tensor,
        expected=expected,
        found=found,
        remedy=conversion(folder, home),
    )


def flat_parameters(file: Path, tensor: str) -> CheckpointError:
    """The error to raise where FSDP 1 has saved its own tensors in the place of the model's."""
    return CheckpointError(
        "A distributed checkpoint holds the flat parameters of FSDP 1, which no model has.",
        checkpoint=file,
        tensor=tensor,
        expected="the model's own tensors",
        found="StateDictType.LOCAL_STATE_DICT",
        remedy="save with StateDictType.SHARDED_STATE_DICT, or with get_model_state_dict(model)",
    )


def conversion(folder: Path, home: Path) -> str:
    """What to do with a distributed checkpoint, to have it as one pickle."""
    source, weights = (shlex.quote(str(path)) for path in (folder, home / "weights.pt"))
    return (
        "convert every checkpoint first, this one with: python -m"
        f" torch.distributed.checkpoint.format_utils dcp_to_torch {source} {weights}"
    )


def parts_of_one_model(files: Sequence[Path]) -> list[list[Path]]:
    """Groups of files of one folder whose names differ in the number of a rank or a part alone."""
    groups: dict[Path, list[Path]] = {}
    for file in files:
        groups.setdefault(file.with_name(_PART.sub(r"\1\2#", file.name)), []).append(file)
    return [group for group in groups.values() if len(group) > 1]


def not_whole(parts: Sequence[Path]) -> CheckpointError:
    """The error to raise for such a group."""
    return CheckpointError(
        "Files are parts of one model, as their names say: their mean is no model.",
        checkpoint=parts[0],
        expected="the whole model in one file",
        found=listing(file.name for file in parts),
        remedy=f"{_WHOLE_MODEL}; where each of them is the whole model, list one for each step, or"
        " give them other names, such as step_1.pt",
    )


def spread_tensors(file: Path, found: str, tensor: str | None = None) -> CheckpointError:
    """The error to raise for a pickle with tensors that FSDP has spread over processes."""
    return CheckpointError(
        "A file holds one process's part of tensors that are spread over several, as FSDP does it.",
        checkpoint=file,
        tensor=tensor,
        expected="plain tensors of the whole model",
        found=found,
        remedy=_WHOLE_MODEL,
    )


def _others(form: _Format, file: Path) -> list[str]:
    folder = file.absolute().parent
    names = [p.name for p in entries(folder)]
    names += [f"../{p.name}" for p in entries(folder.parent)]
    return [name for name in names if form.others and form.others.fullmatch(name)]


def _not_read(form: _Format, source: Path, home: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"A {form.what} cannot be read directly.",
        checkpoint=source,
        expected="safetensors, or a pickle of all weights",
        found=found,
        remedy=form.remedy.format(source=str(source), home=str(home)),
    )
