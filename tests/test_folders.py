"""What goes along with a checkpoint's weights, and what does not."""

from __future__ import annotations

import json
import os
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


def hugging_face_run(run: Path) -> Path:
    """Two checkpoints; returns the newest."""
    for step in (1, 2):
        touch(run / f"checkpoint-{step}", "config.json")
        save_file({"w": torch.ones(2)}, run / f"checkpoint-{step}" / "model.safetensors")
    return run / "checkpoint-2"


@pytest.mark.parametrize(
    "target", ["../../secret", "../.ssh/key", "../../run2/secret", "/dev/zero", "nothing", ".."]
)
def test_links_to_what_is_not_the_runs_own_are_refused(tmp_path: Path, target: str) -> None:
    newest = hugging_face_run(tmp_path / "run")
    touch(tmp_path, "secret", "run/.ssh/key", "run2/secret")
    (newest / "vocab.txt").symlink_to(target)
    if target == "..":  # a folder is not a file to copy, and is left out
        average([tmp_path / "run"], tmp_path / "out")
        return
    with pytest.raises(CheckpointError) as caught:
        average([tmp_path / "run"], tmp_path / "out")
    details = caught.value.details
    assert details["checkpoint"] == str(newest / "vocab.txt")
    assert details["found"] == f"a link to {(newest / target).resolve()}"
    assert "copy" in details["what to do"]
    assert not (tmp_path / "out").exists()


def test_a_pipe_beside_the_weights_is_refused(tmp_path: Path) -> None:
    newest = hugging_face_run(tmp_path / "run")
    os.mkfifo(newest / "vocab.txt")
    with pytest.raises(CheckpointError, match="cannot be copied"):
        average([tmp_path / "run"], tmp_path / "out")


def test_links_within_a_run_and_the_hubs_cache_are_followed(tmp_path: Path, monkeypatch) -> None:
    newest = hugging_face_run(tmp_path / "run")
    (tmp_path / "run" / "shared.txt").write_text("shared")
    (newest / "vocab.txt").symlink_to("../shared.txt")
    (newest / "again.txt").symlink_to("vocab.txt")
    repository = tmp_path / "hub" / "models--a--b"
    snapshot = repository / "snapshots" / "0a1b"
    for place, name in ((snapshot, "config.json"), (snapshot / "part", "x.json")):
        touch(repository / "blobs", name)
        place.mkdir(parents=True)
        up = "../" * (2 if place == snapshot else 3)
        (place / name).symlink_to(f"{up}blobs/{name}")
    save_file({"w": torch.ones(2)}, repository / "blobs" / "f00")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00")
    # A run may be named by a link, and from anywhere.
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(newest)
    average([tmp_path / "link"], tmp_path / "one")
    assert (tmp_path / "one" / "again.txt").read_text() == "shared"
    average([".", snapshot], tmp_path / "two")
    assert (tmp_path / "two" / "part" / "x.json").read_text() == "{}"
    average([snapshot, "."], tmp_path / "three")
    assert not (tmp_path / "three" / "vocab.txt").is_symlink()


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
    for other in ("{}", '{"quantization_config": null}', "[]", "{"):
        config.write_text(other)
        open_checkpoints([tmp_path])
    # One that has been given back its weights may still tell of what it was.
    config.write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    save_file({"l.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    open_checkpoints([tmp_path])
