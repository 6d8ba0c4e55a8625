"""Formats that are not read: told by name, and what the messages advise leads to a merge."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import dcp_folders
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
from torch.distributed.checkpoint.metadata import Metadata

from twa_merge.checkpoints import open_checkpoints
from twa_merge.errors import CheckpointError
from twa_merge.tensors import tensor_rows

WEIGHTS = {"w": torch.arange(12.0).reshape(4, 3), "b": torch.zeros(4)}
# One process saves what several would have saved together.
alone = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def refused(*paths: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoints(paths)
    return caught.value


def advice(*paths: Path) -> str:
    return refused(*paths).details["what to do"]


def found(*paths: Path) -> list[tuple[str, int | None]]:
    checkpoints = open_checkpoints(paths)
    assert all(torch.equal(tensor_rows(c, "w"), WEIGHTS["w"] + c.step) for c in checkpoints)
    return [(c.path.name, c.step) for c in checkpoints]


def at(step: int) -> dict[str, torch.Tensor]:
    return {name: tensor + step for name, tensor in WEIGHTS.items()}


def save(path: Path, content: object = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(WEIGHTS if content is None else content, path)
    return path


def save_shards(folder: Path, step: int = 0) -> list[Path]:
    """As two processes with FSDP2 save them: half of the rows of each tensor in a file."""
    folder.mkdir(parents=True)
    files = []
    for k in range(2):
        rows = {name: t[2 * k : 2 * k + 2].clone() for name, t in at(step).items()}
        begins = {
            name: {"saved_offsets": [2 * k] + [0] * (t.dim() - 1)} for name, t in rows.items()
        }
        metadata = {"DCP_SHARDING_INFO": json.dumps(begins), "DCP_VERSION": "1.0", "format": "pt"}
        files.append(folder / f"shard-0000{k + 1}-model-00001-of-00001.safetensors")
        save_file(rows, files[-1], metadata)
    return files


def save_distributed(folder: Path, content: dict[str, Any]) -> None:
    """With something in its metadata that torch does not mind."""

    def change(document: Metadata) -> None:
        document.planner_data["more"] = Fraction(1)

    dcp_folders.save(folder, content)
    dcp_folders.edit(folder, change)


def test_sharded_safetensors_are_no_checkpoints_each(tmp_path: Path) -> None:
    shards = save_shards(tmp_path / "model")
    renamed = shutil.copy(shards[1], tmp_path / "step-2.safetensors")
    for paths in ([tmp_path / "model"], shards, shards[:1], [Path(renamed)]):
        error = refused(*paths)
        assert "sharded safetensors" in error.message
        assert "enable_consolidation=True" in error.details["what to do"]


def test_sharded_safetensors_that_were_put_together_as_advised(tmp_path: Path) -> None:
    for step in (8, 16):
        save_shards(tmp_path / f"step-{step}", step)
    for step in (8, 16):
        call = re.search(r"consolidate_safetensors_files\(('.+?'), ('.+?'),", advice(tmp_path))
        assert call
        source, home = (text.strip("'") for text in call.groups())
        assert home == str(tmp_path / f"step-{step}")
        consolidate_safetensors_files(source, home, dict.fromkeys(WEIGHTS, 1))
    assert found(tmp_path) == [("step-8", 8), ("step-16", 16)]


@alone
@pytest.mark.parametrize("options", [{}, {"save_distributed": True, "enable_consolidation": True}])
def test_whole_safetensors_of_distributed_checkpoints_are_read(
    tmp_path: Path, options: dict[str, bool]
) -> None:
    for step in (8, 16):
        folder = tmp_path / f"step-{step}"
        writer = dcp.HuggingFaceStorageWriter(str(folder), **options)
        dcp.save(at(step), storage_writer=writer, no_dist=True)
    assert found(tmp_path) == [("step-8", 8), ("step-16", 16)]


@pytest.mark.parametrize(
    "info", ["{", "[]", '{"w": 1}', '{"w": {}}', '{"w": {"saved_offsets": 1}}']
)
def test_what_a_shard_says_of_its_rows_may_be_damaged(tmp_path: Path, info: str) -> None:
    path = tmp_path / "step_1.safetensors"
    save_file(WEIGHTS, path, {"DCP_SHARDING_INFO": info})
    assert "sharded safetensors" in refused(path).message


@pytest.mark.parametrize(
    "names",
    [
        ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"],
        ["mp_rank_01_model_states.pt"],
        ["consolidated.00.pth", "consolidated.01.pth"],
        ["layer_00-model_00-model_states.pt", "mp_rank_00_model_states.pt"],
    ],
)
def test_parts_of_one_model_are_no_checkpoints(tmp_path: Path, names: list[str]) -> None:
    run, plain = tmp_path / "run" / "global_step8", tmp_path / "plain"
    files = [save(folder / name) for folder in (run, plain) for name in names]
    for paths in ([run.parent], [run], [plain], files[: len(names)], files[:1]):
        error = refused(*paths)
        assert "cannot be read directly" in error.message
        assert "convert" in error.details["what to do"]
        assert "list the files" not in error.details["what to do"]


def test_deepspeed_without_parts_is_read(tmp_path: Path) -> None:
    for step in (8, 16):
        folder = tmp_path / f"global_step{step}"
        save(folder / "mp_rank_00_model_states.pt", {"module": at(step)})
        save(folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert found(tmp_path) == [("global_step8", 8), ("global_step16", 16)]
    assert [s for _, s in found(*tmp_path.glob("global_step*/mp_rank_00*"))] == [8, 16]
    # In the folder of a Trainer.
    for step in (8, 16):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"global_step{step}").rename(tmp_path / f"checkpoint-{step}/global_step{step}")
    assert [s for _, s in found(*tmp_path.glob("checkpoint-*"))] == [8, 16]


@pytest.mark.parametrize(
    "pattern",
    ["m_rank{}.pt", "step_8-shard{}.safetensors", "x.part_{}.bin", "m_tp{}_pp0.pt", "MP{}.pt"],
)
def test_files_that_differ_in_a_rank_alone(tmp_path: Path, pattern: str) -> None:
    for folder in (tmp_path / "step_8", tmp_path / "plain"):
        for k in range(2):
            file = folder / pattern.format(k)
            save(file)
            if file.suffix == ".safetensors":
                save_file(WEIGHTS, file)
    files = sorted((tmp_path / "plain").iterdir())
    for paths in ([tmp_path / "step_8"], [tmp_path], [tmp_path / "plain"], files):
        error = refused(*paths)
        assert "parts of one model" in error.message
        assert "full_state_dict=True" in error.details["what to do"]
        assert "list the files themselves" not in error.details["what to do"]


def test_copies_of_the_whole_model_may_be_listed_one_for_each_step(tmp_path: Path) -> None:
    for step in (8, 16):
        for rank in range(2):
            save(tmp_path / f"step{step}-rank{rank}.pt", at(step))
    assert "one for each step" in advice(tmp_path)
    assert [step for _, step in found(*tmp_path.glob("*-rank1.pt"))] == [8, 16]


def test_megatron_is_named_and_nothing_to_be_deleted(tmp_path: Path) -> None:
    files = [
        save(
            tmp_path / f"iter_000000{step}" / "mp_rank_00" / "model_optim_rng.pt",
            {"model": at(step), "iteration": step},
        )
        for step in (4, 8)
    ]
    home = files[0].parent.parent
    for path in (tmp_path, home, files[0].parent):
        error = refused(path)
        assert "Megatron" in error.message
        assert "Hugging Face" in error.details["what to do"]
        assert "delete" not in error.details["what to do"]
    # Alone it holds the whole model.
    assert [step for _, step in found(*files)] == [4, 8]
    save(home / "mp_rank_01" / "model_optim_rng.pt")
    assert "../mp_rank_01" in refused(*files).details["found"]


def test_only_an_empty_folder_may_be_deleted(tmp_path: Path) -> None:
    save(tmp_path / "step_8" / "model.pt")
    (tmp_path / "step_16").mkdir()
    assert "delete" in advice(tmp_path)
    (tmp_path / "step_16" / "weights.npz").write_bytes(b"x")
    assert "delete" not in advice(tmp_path)


def convert(command: str) -> Path:
    """What the advised command does."""
    words = shlex.split(command.partition("python -m ")[2])
    assert words[:2] == ["torch.distributed.checkpoint.format_utils", "dcp_to_torch"]
    source, target = map(Path, words[2:])
    return dcp_folders.converted(source, target)


@alone
@pytest.mark.parametrize("part", ["", "pytorch_model_fsdp_0"])
def test_a_distributed_checkpoint_converted_as_advised(tmp_path: Path, part: str) -> None:
    """With and without the folders of accelerate and the Trainer."""
    run = tmp_path / "my run"
    for step in (8, 16):
        home = run / f"checkpoint-{step}"
        save_distributed(home / part, {"model": at(step), "optim": {"state": torch.ones(3)}})
        if part:
            save_distributed(home / "optimizer_0", {"optimizer": torch.ones(3)})
            save(home / "scheduler.pt")
    homes = [run / "checkpoint-8", run / "checkpoint-16"]
    for home in homes:
        for paths in ([run], [home]):
            error = refused(*paths)
            assert error.details["checkpoint"] == str(home / part / ".metadata")
            assert "fractions.Fraction" in error.details["found"]
        assert convert(error.details["what to do"]).parent == home
    expected = [("checkpoint-8", 8), ("checkpoint-16", 16)]
    assert found(run) == found(*homes) == expected


@alone
def test_a_distributed_checkpoint_converted_to_a_file_beside_it(tmp_path: Path) -> None:
    for step in (8, 16):
        save_distributed(tmp_path / f"step-{step}", at(step))
    dcp_folders.converted(tmp_path / "step-8", tmp_path / "step-8.pt")
    assert str(tmp_path / "step-16") in advice(tmp_path)
    dcp_folders.converted(tmp_path / "step-16", tmp_path / "step-16.pt")
    expected = [("step-8.pt", 8), ("step-16.pt", 16)]
    assert found(tmp_path) == found(tmp_path / "step-8", tmp_path / "step-16") == expected


@alone
def test_a_distributed_checkpoint_of_any_name_converted_in_its_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_distributed(tmp_path / name, WEIGHTS)
        convert(advice(tmp_path / name))
    assert len(open_checkpoints([tmp_path / "a", tmp_path / "b"])) == 2
    assert len(open_checkpoints([tmp_path])) == 2


@alone
def test_a_distributed_checkpoint_that_was_converted_counts_once(tmp_path: Path) -> None:
    """Also where there was no need to, as the checkpoint itself can be read."""
    for step in (8, 16, 24):
        dcp_folders.save(tmp_path / f"step-{step}", at(step))
    dcp_folders.converted(tmp_path / "step-8", tmp_path / "step-8.pt")
    dcp_folders.converted(tmp_path / "step-16", tmp_path / "step-16" / "weights.pt")
    save(tmp_path / "step-24" / "meta.pt", {"global_step": 24})
    assert found(tmp_path) == [("step-8.pt", 8), ("step-16", 16), ("step-24", 24)]
    formats = [c.format for c in open_checkpoints([tmp_path])]
    assert formats == ["pickle", "pickle", "distributed"]


SPREAD = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
torch.save({"w": distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])}, sys.argv[1])
"""
OPENED = """
import sys, torch.distributed.tensor
from twa_merge.checkpoints import open_checkpoints
from twa_merge.errors import CheckpointError
try:
    open_checkpoints(sys.argv[1:])
except CheckpointError as error:
    print(error)
"""


def test_tensors_that_are_spread_over_processes(tmp_path: Path) -> None:
    """Also where torch could read them, as it knows their class."""
    path = tmp_path / "step_1.pt"
    subprocess.run([sys.executable, "-c", SPREAD, path], check=True, capture_output=True)
    printed = subprocess.run(
        [sys.executable, "-c", OPENED, path], check=True, capture_output=True, text=True
    ).stdout
    for text in (str(refused(path)), printed):
        assert "spread over" in text
        assert "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True" in text
        assert "torch.save(model.state_dict()" not in text
