"""What the files of a folder are: weights, training state, or what belongs to the model besides."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .base import Checkpoint, reading
from .shards import group_shards, without_shard
from .step_names import is_step_folder
from .steps import natural

SAFETENSORS = ".safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar")
# Of torch.distributed.checkpoint: says what is where in its .distcp files.
METADATA = ".metadata"
# What accelerate calls the folder of a distributed checkpoint inside of a checkpoint's.
_INNER = re.compile(r"pytorch_model_fsdp_\d+")
_INDEX = re.compile(r"(?P<stem>.+)(?P<kind>\.safetensors|\.bin)\.index\.json")

# What Hugging Face's libraries call a model's weights; the first that is there is the model.
_HF_NAMES = ("model", "adapter_model", "diffusion_pytorch_model", "pytorch_model")
# What scripts call the weights when a folder holds other pickles beside them.
_USUAL_NAMES = (*_HF_NAMES, "weights", "state_dict", "ckpt", "checkpoint", "consolidated")
_HF_CONFIGS = ("config.json", "adapter_config.json", "model_index.json")

_STATE = re.compile(
    r"(^|[^a-z])(optim(izer)?s?|(lr_?)?sched(uler)?s?|rng(_?states?)?|random_states?|(grad_?)?scaler"
    r"|training_args|train_args|trainer_states?|dataloader|sampler)([^a-z]|$)",
    re.I,
)
# Other frameworks' weights, programs, and stores of training state.
_OTHER_WEIGHTS = (
    *(".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml", ".tflite", ".mlmodel", ".ot"),
    *(".nemo", ".distcp", ".pt2", ".pdparams", ".keras"),
)
_NOT_COPIED = re.compile(
    r"readme\.md|trainer_state\.json|twa_merge\.json|report\.html|latest|zero_to_fp32\.py"
    r"|latest_checkpointed_iteration\.txt|(all|train|eval|test|predict)_results\.json"
    r"|events\.out\.tfevents\..*|random_states.*\.pkl|consolidated.*"
    r"|.*\.(safetensors|bin|h5|msgpack)\.index(\.\w+)?\.json",
    re.I,
)
_NOT_ENTERED = re.compile(r"\..*|__pycache__|runs|wandb|mlruns|logs?|lightning_logs|onnx", re.I)


@dataclass(frozen=True)
class Weights:
    """The weights of one checkpoint: an index file, or one file, or shards without an index.

    The index of a distributed checkpoint is its ``.metadata``.
    """

    files: tuple[Path, ...]
    index: Path | None = None

    @property
    def is_distributed(self) -> bool:
        return self.index is not None and self.index.name == METADATA

    @property
    def is_pickle(self) -> bool:
        name = (self.index or self.files[0]).name
        safetensors = name.removesuffix(".index.json").endswith(SAFETENSORS)
        return not (safetensors or self.is_distributed)


def entries(folder: Path) -> list[Path]:
    """What is in the folder, hidden entries left out, in natural order.

    Raises:
        CheckpointError: it cannot be read.
    """
    with reading(folder):
        if not os.access(folder, os.X_OK):
            # Its names can be read, but nothing that they stand for.
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return sorted(
            (p for p in folder.iterdir() if not p.name.startswith(".")),
            key=lambda p: (natural(p.name), p.name),
        )


def whole_model(folder: Path) -> Weights | None:
    """The folder's weights if it is one checkpoint by the names in it, as Hugging Face's are.

    Safetensors come before pickles, and the single file before the index, as transformers has it.
    Files of either that have one of the usual names come before a distributed checkpoint: it is
    what they were converted from.
    """
    files = [p for p in entries(folder) if p.is_file()]
    names = {p.name for p in files}
    found = _named(folder, names)
    inner = [] if found else distributed_in(folder)
    if len(inner) == 1:
        return _usual(bare_weights(files)) or Weights((), inner[0] / METADATA)
    if not found and is_step_folder(folder):
        return bare_or_usual(files)
    if not found or not any(config in names for config in _HF_CONFIGS):
        # Without a config, other weights beside these make it a run of bare files.
        stems = {without_shard(g.files[0].name).rpartition(".")[0] for g in bare_weights(files)}
        return found if found and (found.index or stems <= set(_HF_NAMES)) else None
    return found


def weights_in(folder: Path) -> Weights | None:
    """The weights of a folder inside a run: by name, or the only ones in it."""
    return whole_model(folder) or bare_or_usual([p for p in entries(folder) if p.is_file()])


def bare_weights(files: Sequence[Path]) -> list[Weights]:
    """Every set of weights among the files of a folder, shards as one; training state left out.

    A pickle that stands beside a safetensors file of the same name is the same weights again.
    """
    weights = [
        f for f in files if f.name.endswith((SAFETENSORS, *PICKLES)) and not is_training_state(f)
    ]
    stems = {f.stem for f in weights if f.suffix == SAFETENSORS}
    groups = group_shards(f for f in weights if f.suffix == SAFETENSORS or f.stem not in stems)
    return [Weights(group) for group in groups]


def bare_or_usual(files: Sequence[Path]) -> Weights | None:
    """The only weights among the files, or those with the name that weights usually have."""
    groups = bare_weights(files)
    return groups[0] if len(groups) == 1 else _usual(groups)


def distributed_in(folder: Path) -> list[Path]:
    """The folder itself if it is a distributed checkpoint, or else those in it that it consists of.

    These are folders inside a checkpoint's own, as accelerate and others have them: one for each
    model, and others for the state of optimizers, which are left out.
    """
    if has_metadata(folder):
        return [folder]
    own = is_step_folder(folder)
    return [
        p
        for p in entries(folder)
        if (own or _INNER.fullmatch(p.name))
        and not (is_training_state(p) or is_step_folder(p))
        and has_metadata(p)
    ]


def has_metadata(folder: Path) -> bool:
    """Whether a distributed checkpoint lies in the folder; CheckpointError if it cannot be read."""
    with reading(folder):
        return (folder / METADATA).is_file()


def checkpoint_of(folder: Path) -> Path:
    """The checkpoint that a folder of accelerate's is the model of; any other is one itself."""
    inside = _INNER.fullmatch(folder.name) and distributed_in(folder.parent) == [folder]
    return folder.parent if inside else folder


def _usual(groups: Sequence[Weights]) -> Weights | None:
    usual = [g for g in groups if g.files[0].stem.lower() in _USUAL_NAMES]
    for choice in (usual, [g for g in usual if not g.is_pickle]):
        if len(choice) == 1:
            return choice[0]
    return None


def is_training_state(path: Path) -> bool:
    """Whether a file or folder is called as optimizers, schedulers and their like are."""
    return _STATE.search(path.stem) is not None


def is_model_file(path: Path) -> bool:
    """Whether a file has one of Hugging Face's names for a model's weights."""
    return without_shard(path.name).rpartition(".")[0] in _HF_NAMES


def sidecars(checkpoint: Checkpoint) -> dict[str, Path]:
    """The files that a checkpoint's folder holds besides weights and training state.

    Config, tokenizer, chat templates, remote code, licence and the like, in subfolders too.
    Left out are weights of any format, optimizer, scheduler, RNG and trainer state, logs, results
    of evaluations, the model card (a merge gets its own), hidden files, and checkpoints inside
    the folder. Of a folder that does not look like Hugging Face's, subfolders are left out too.

    Returns:
        Name relative to the folder → file, sorted; none for a bare file, unless it is called as
        Hugging Face's are and lies beside their configuration.
    """
    root = folder_of(checkpoint)
    of_a_model = any(is_model_file(f.path) for f in checkpoint.files)
    configured = any((root / config).is_file() for config in _HF_CONFIGS)
    if checkpoint.path != root and not (of_a_model and configured):
        return {}
    deep = of_a_model or configured
    found = []
    with reading(root):
        for parent, folders, files in os.walk(root, onerror=_raise):
            folders[:] = [name for name in folders if deep and _belongs(Path(parent, name))]
            found += [Path(parent, name).relative_to(root) for name in files if _is_sidecar(name)]
    return {name: root / name for name in sorted(path.as_posix() for path in found)}


def require_own(file: Path, checkpoint: Checkpoint) -> None:
    """Checks that a sidecar is the run's own: whoever gets the merge gets a copy of it.

    A link may lead to what the run's checkpoints share, in the folder that they lie in, and to the
    blobs of the Hub's cache; to nothing hidden, as a run may lie in somebody's home.

    Raises:
        CheckpointError: it is a link to somewhere else, or no regular file.
    """
    with reading(file):
        folder, target = folder_of(checkpoint).resolve(), file.resolve()
        own = any(
            target.is_relative_to(place) and not _is_hidden(target.relative_to(place))
            for place in (folder, folder.parent, *_hub_blobs(folder))
        )
        regular = target.is_file()
    if own and regular:
        return
    link = file.is_symlink()
    raise CheckpointError(
        "A file beside the weights cannot be copied into the merge."
        if own
        else "A link beside the weights leads out of the run, perhaps to a private file.",
        checkpoint=file,
        expected=f"a file in {folder.parent}, or a link to one" if link else "a regular file",
        found=f"a link to {target}" if link else "a device, a socket or a pipe",
        remedy="delete it, or put a copy in its place if the model needs that file",
    )


def folder_of(checkpoint: Checkpoint) -> Path:
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def _hub_blobs(folder: Path) -> list[Path]:
    """The folder that the files of ``snapshots/REVISION/`` in the Hub's cache are links into."""
    return [(p.parent / "blobs").resolve() for p in folder.parents if p.name == "snapshots"]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _named(folder: Path, names: set[str]) -> Weights | None:
    for suffix in (SAFETENSORS, ".bin"):
        for stem in _HF_NAMES:
            if f"{stem}{suffix}" in names:
                return Weights((folder / f"{stem}{suffix}",))
            if f"{stem}{suffix}.index.json" in names:
                return Weights((), folder / f"{stem}{suffix}.index.json")
        indexes = [n for n in names if (m := _INDEX.fullmatch(n)) and m["kind"] == suffix]
        if len(indexes) == 1:
            return Weights((), folder / indexes[0])
    return None


def _is_sidecar(name: str) -> bool:
    lower = name.lower()
    if name.startswith(".") or _NOT_COPIED.fullmatch(lower):
        return False
    return not lower.endswith((SAFETENSORS, *PICKLES, *_OTHER_WEIGHTS))


def _belongs(folder: Path) -> bool:
    """Whether a subfolder is part of the model, rather than another checkpoint or a log."""
    if _NOT_ENTERED.fullmatch(folder.name) or is_step_folder(folder):
        return False
    inside = entries(folder)
    return not any(p.name.endswith((SAFETENSORS, *PICKLES, *_OTHER_WEIGHTS)) for p in inside)


def _raise(error: OSError) -> None:
    raise error
