"""What goes along with a checkpoint's weights, and what does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from twa_merge import average
from twa_merge.checkpoints import open_checkpoints, sidecars
from twa_merge.errors import CheckpointError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")


def test_sidecars_of_a_hugging_face_folder(tmp_path: Path) -> None:
    kept = """
        config.json generation_config.json tokenizer.json tokenizer_config.json merges.txt
        chat_template.jinja special_tokens_map.json modeling_x.py LICENSE preprocessor_config.json
        additional_chat_templates/tool.jinja 1_Pooling/config.json spiece.model USE_POLICY.md
        scheduler/scheduler_config.json
    """
    left = """
        README.md pytorch_model.bin pytorch_model.bin.index.json tf_model.h5 flax_model.msgpack
        model.onnx onnx/model.onnx m.gguf consolidated.safetensors consolidated.00.pth
        original/consolidated.00.pth original/params.json optimizer.pt scheduler.pt rng_state.pth
        trainer_state.json training_args.bin scaler.pt random_states_0.pkl latest
        zero_to_fp32.py global_step5/mp_rank_00_model_states.pt checkpoint-5/config.json
        runs/a/events.out.tfevents.1 .gitattributes .cache/x.json __pycache__/x.pyc
        twa_merge.json all_results.json final/config.json final/model.safetensors
    """
    touch(tmp_path, *kept.split(), *left.split())
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (checkpoint,) = open_checkpoints([tmp_path])
    assert list(sidecars(checkpoint)) == sorted(kept.split())


def test_sidecars_of_bare_files_and_plain_folders(tmp_path: Path) -> None:
    touch(tmp_path / "step_1", "config.yaml", "data/big.txt", "optimizer.pt")
    bare = tmp_path / "step_1" / "model_x.pt"
    torch.save({"w": torch.ones(2)}, bare)
    assert sidecars(open_checkpoints([bare])[0]) == {}
    assert list(sidecars(open_checkpoints([bare.parent])[0])) == ["config.yaml"]


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_a_file_with_a_hugging_face_name_takes_its_folders_sidecars_along(
    tmp_path: Path, name: str
) -> None:
    """As `checkpoint-*/model.safetensors` names them."""
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        touch(folder, "config.json", "tokenizer.json", "sub/x.json", "optimizer.pt")
        save_file({"w": torch.ones(2)}, folder / name)
        save_file({"w": torch.ones(2)}, folder / "other.safetensors")
    average(sorted(tmp_path.glob(f"checkpoint-*/{name}")), tmp_path / "out")
    written = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}
    documents = {"README.md", "twa_merge.json"}
    assert written == {name, "config.json", "tokenizer.json", "sub/x.json"} | documents
    other = open_checkpoints([tmp_path / "checkpoint-2" / "other.safetensors"])[0]
    assert sidecars(other) == {}


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    """The mean of packed weights is nothing, and that of their scales no scale of the mean."""
    weights = {"l.weight": torch.ones(4, 4).to(dtype), "l.scales": torch.ones(4)}
    save_file(weights, tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match="quantised") as caught:
        open_checkpoints([tmp_path])
    assert "l.weight" in str(caught.value)
    config.write_text("{}")
    open_checkpoints([tmp_path])
    # One that has been given back its weights may still tell of what it was.
    config.write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    save_file({"l.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    open_checkpoints([tmp_path])
