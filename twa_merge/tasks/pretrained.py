"""Architecture, configuration and tokenizer from a checkpoint's own folder or from the Hub."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..errors import TaskError
from .documents import import_extra

# Any of them makes a folder one that a tokenizer can be loaded from.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)

T = TypeVar("T")


def places(checkpoint: Path | None) -> list[Path]:
    """Folders that may hold a checkpoint's configuration and tokenizer, nearest first.

    A Trainer that was not given its tokenizer saves none in ``checkpoint-*``, but the user often
    has saved one in the run's folder.
    """
    if checkpoint is None:
        return []
    # Not resolved: in the Hub's cache, files are links into a folder that holds all versions.
    path = checkpoint.absolute()
    folder = path if path.is_dir() else path.parent
    return [folder, folder.parent]


def load_config(source: str | None, near: Sequence[Path], trust_remote_code: bool) -> Any:
    """The model's configuration, from ``source`` (folder or Hub name) or the ``near`` folders.

    Raises:
        TaskError: there is none, or it cannot be read.
    """
    if near and (near[0] / "adapter_config.json").is_file():
        raise TaskError(
            "The checkpoints are adapters, whose coefficients cannot be trained.",
            checkpoint=near[0],
            expected="checkpoints of whole models",
            found="adapter_config.json",
            remedy="write a task whose build_model() gives the whole model, all but the adapters "
            "frozen, and whose model_names() says which tensor is which; or save whole models, "
            "with PEFT's merge_and_unload(), and merge those; or choose coefficients yourself, "
            "with twa-merge average",
        )
    source = source or _having(near, ("config.json",))
    if source is None:
        raise TaskError(
            "There is no config.json to build the model from.",
            checkpoint=near[0] if near else None,
            expected=f"config.json in {' or '.join(map(str, near))}" if near else None,
            remedy="give --model: a folder or Hub name that has one",
        )
    transformers = import_extra("transformers")
    return _tried(
        f"The model's configuration cannot be read from {source}.",
        trust_remote_code,
        lambda: transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=trust_remote_code
        ),
    )


def load_tokenizer(source: str | None, near: Sequence[Path], trust_remote_code: bool) -> Any:
    """The tokenizer, from ``source`` (folder or Hub name) or the ``near`` folders.

    Raises:
        TaskError: there is none, or it cannot be read.
    """
    source = source or _having(near, _TOKENIZER_FILES)
    if source is None:
        raise TaskError(
            "There is no tokenizer beside the checkpoint.",
            checkpoint=near[0] if near else None,
            expected=f"tokenizer files in {' or '.join(map(str, near))}" if near else None,
            remedy="give --tokenizer (or --model): a folder or Hub name that has them",
        )
    transformers = import_extra("transformers")
    return _tried(
        f"The tokenizer cannot be read from {source}.",
        trust_remote_code,
        lambda: transformers.AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code
        ),
    )


def build(config: Any, trust_remote_code: bool) -> Any:
    """The architecture in float32 and evaluation mode, tied weights tied, no key-value cache.

    Parameters are uninitialised; buffers have their values. Works under a context that creates
    parameters (and only those) on the meta device.

    Raises:
        TaskError: there is no causal language model for this configuration.
    """
    transformers = import_extra("transformers")
    config = copy.deepcopy(config)  # the model writes into it
    config.return_dict = True
    config.use_cache = config.get_text_config().use_cache = False
    with import_extra("transformers.initialization").no_init_weights():
        model = _tried(
            "This is no causal language model that transformers can build.",
            trust_remote_code,
            # None is scaled dot product attention, or eager where a model has no such.
            lambda: transformers.AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32,
                attn_implementation=None,
                trust_remote_code=trust_remote_code,
            ),
        )
    _tie(model)
    return model.eval()


def renamings(model: Any, names: Sequence[str]) -> dict[str, str]:
    """Names in files → names in the model, for the tensors that transformers only renames.

    What it also reshapes or fuses as it loads it keeps its name here.
    """
    mapping = import_extra("transformers.conversion_mapping").get_model_conversion_mapping(model)
    loading = import_extra("transformers.core_model_loading")
    renames = [t for t in mapping if isinstance(t, loading.WeightRenaming)]
    # In the order of transformers' own loading, on which some renamings depend.
    found = {
        name: loading.apply_renamings(name, renames)
        for name in sorted(names, key=loading.dot_natural_key)
    }
    return {name: own for name, own in found.items() if own != name}


def _tie(model: Any) -> None:
    """Ties what the model says is tied, also where a context re-creates every parameter set."""
    model.tie_weights()
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        parent, _, name = target.rpartition(".")
        model.get_submodule(parent)._parameters[name] = model.get_parameter(source)


def _tried(message: str, trust_remote_code: bool, load: Callable[[], T]) -> T:
    """``load()``; what transformers refuses becomes a `TaskError` that starts with ``message``."""
    try:
        return load()
    except Exception as error:
        text = str(error).strip()
        if "trust_remote_code" in text and not trust_remote_code:
            raise TaskError(
                "The model comes with code of its own, which is not run unasked.",
                remedy="read that code, then give --trust-remote-code",
            ) from error
        found = f"{type(error).__name__}: {text}".splitlines()[0][:400]
        raise TaskError(message, found=found, remedy="check --model and --tokenizer") from error


def _having(near: Sequence[Path], names: Sequence[str]) -> str | None:
    return next((str(p) for p in near if any((p / n).is_file() for n in names)), None)
