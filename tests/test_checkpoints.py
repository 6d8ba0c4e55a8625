"""Arguments → checkpoints in order: discovery, steps, selection."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from twa_merge.checkpoints import open_checkpoints
from twa_merge.config import Selection
from twa_merge.errors import CheckpointError
from twa_merge.progress import Event, Noted
from twa_merge.tensors import tensor_rows

STATE = {"w": torch.arange(6.0).reshape(3, 2), "b": torch.zeros(3)}


def put(path: Path, **beside: object) -> Path:
    """Weights at ``path``, in the format of its suffix; ``beside`` goes into a pickle with them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Each has weights of its own, or it would be a copy of another one.
    state = STATE | {"b": torch.full((3,), float(zlib.crc32(bytes(path))))}
    if path.suffix == ".safetensors":
        save_file(state, path, metadata={"format": "pt"})
    else:
        torch.save({"model": state, **beside} if beside else state, path)
    return path


def touch(root: Path, *names: str, text: str = "{}") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def found(
    *paths: Path | str, root: Path | None = None, selection: Selection | None = None
) -> list[tuple[str, int | None]]:
    checkpoints = open_checkpoints(paths, selection or Selection())
    base = root or Path(paths[0])
    for checkpoint in checkpoints:
        assert torch.equal(tensor_rows(checkpoint, "w", 1, 3), STATE["w"][1:3])
        checkpoint.close()
    return [(os.path.relpath(c.path, base), c.step) for c in checkpoints]


def message(*paths: Path | str, selection: Selection | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoints(paths, selection or Selection())
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["checkpoint-1000/model.safetensors", "checkpoint-200/model.safetensors"], [200, 1000]),
        (["step_100/model.pt", "step_20/model.pt"], [20, 100]),
        (["epoch=3-step=900.ckpt", "epoch=12-step=80.ckpt"], [80, 900]),
        (["ckpt_0100.pt", "ckpt_0090.pt"], [90, 100]),
        (["iter_7_loss_0.5.pth", "iter_10_loss_0.25.pth"], [7, 10]),
        (["model-9-v2.5.bin", "model-10-v1.5.bin"], [9, 10]),
        (["ep1-ba5-rank0.pt", "ep0-ba10-rank0.pt"], [5, 10]),
        (["epoch_3_17.pt", "epoch_2_99.pt"], [2, 3]),
        (["100_model.fp16.safetensors", "90_model.fp16.safetensors"], [90, 100]),
        (["global_step100/m.safetensors", "global_step9/m.safetensors"], [9, 100]),
        (["step-5-00001-of-00001.safetensors", "step-40-00001-of-00001.safetensors"], [5, 40]),
        (["a1/pytorch_model.bin", "a12/pytorch_model.bin", "a3/pytorch_model.bin"], [1, 3, 12]),
    ],
)
def test_order_by_the_step_in_the_name(
    tmp_path: Path, names: Sequence[str], steps: Sequence[int]
) -> None:
    files = [put(tmp_path / name) for name in names]
    assert [step for _, step in found(tmp_path)] == steps
    listed = [f.parent if f.parent != tmp_path else f for f in files]
    assert [step for _, step in found(*listed, root=tmp_path)] == steps


def test_trainer_state_goes_before_names(tmp_path: Path) -> None:
    for name, step in (("checkpoint-1", 500), ("checkpoint-2", 40), ("final", 600)):
        put(tmp_path / name / "model.safetensors")
        touch(tmp_path / name, "trainer_state.json", text=json.dumps({"global_step": step}))
    put(tmp_path / "checkpoint-55" / "model.safetensors")
    touch(tmp_path / "checkpoint-55", "trainer_state.json", text="{ cut short")
    assert found(tmp_path) == [
        ("checkpoint-2", 40),
        ("checkpoint-55", 55),
        ("checkpoint-1", 500),
        ("final", 600),
    ]
    assert found(tmp_path / "final" / "model.safetensors")[0][1] == 600


def test_a_pickle_tells_its_step_where_the_name_does_not(tmp_path: Path) -> None:
    put(tmp_path / "last.ckpt", global_step=900)
    put(tmp_path / "epoch=1.ckpt", global_step=300)
    put(tmp_path / "best.ckpt", iter_num=torch.tensor(600))
    put(tmp_path / "step=30.ckpt", global_step=7)
    put(tmp_path / "final.ckpt", epoch=3)
    assert found(tmp_path) == [
        ("step=30.ckpt", 30),
        ("epoch=1.ckpt", 300),
        ("best.ckpt", 600),
        ("last.ckpt", 900),
        ("final.ckpt", None),
    ]


def test_lightnings_last_is_the_checkpoint_of_its_step_once_more(tmp_path: Path) -> None:
    for name, step in (("step=200.ckpt", 200), ("step=300.ckpt", 300), ("last.ckpt", 300)):
        put(tmp_path / name, global_step=step)
    names = [c.path.name for c in open_checkpoints([tmp_path])]
    assert names == ["step=200.ckpt", "step=300.ckpt"]
    given = [tmp_path / "step=200.ckpt", tmp_path / "last.ckpt", tmp_path / "step=300.ckpt"]
    assert len(open_checkpoints(given)) == 3
    put(tmp_path / "another" / "step=100.ckpt", global_step=100)
    put(tmp_path / "another" / "last.ckpt", global_step=200)
    steps = [c.step for c in open_checkpoints([tmp_path / "another", *given[::2]])]
    assert steps == [100, 200, 200, 300]
    shutil.rmtree(tmp_path / "another")
    put(tmp_path / "last.ckpt", global_step=350)
    assert [c.step for c in open_checkpoints([tmp_path])] == [200, 300, 350]


def test_copies_without_a_number_count_once(tmp_path: Path) -> None:
    """As torchvision, timm, Lightning and the Trainer leave them."""
    pickles, folders = tmp_path / "pickles", tmp_path / "folders"
    for step in (7, 12, 9):
        put(pickles / f"model_{step}.pth", epoch=step, args=argparse.Namespace(lr=0.1))
        put(folders / f"checkpoint-{step}" / "model.safetensors")
        put(tmp_path / "tar" / f"checkpoint-{step}.pth.tar", epoch=step)
    shutil.copy(tmp_path / "tar/checkpoint-9.pth.tar", tmp_path / "tar/model_best.pth.tar")
    for name, step in (("model_best", 7), ("checkpoint", 12)):
        saved = torch.load(pickles / f"model_{step}.pth", weights_only=False)
        torch.save(saved | {"best": 1.0}, pickles / f"{name}.pth")
    shutil.copytree(folders / "checkpoint-9", folders / "final")
    for run in (pickles, folders, tmp_path / "tar"):
        assert [step for _, step in found(run)] == [7, 9, 12]
    numbers = tmp_path / "numbers"
    for step in (3, 10):
        put(numbers / f"resnet50_epoch_{step}.pth")
    shutil.copy(numbers / "resnet50_epoch_3.pth", numbers / "resnet50_best.pth")
    put(numbers / "resnet50_final.pth")
    assert [step for _, step in found(numbers)] == [3, 10, None]
    # Whoever names a copy wants it.
    given = sorted(pickles.iterdir())
    assert len(found(*given, root=pickles)) == len(given)


def test_a_final_model_that_is_no_checkpoint_again_is_told(tmp_path: Path) -> None:
    """It may be trained further than any of them, and whoever merges the run would miss it."""
    told: list[Event] = []
    for step in (7, 9, 12):
        put(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        touch(tmp_path, f"checkpoint-{step}/config.json")
    touch(tmp_path, "config.json")
    shutil.copy(tmp_path / "checkpoint-9/model.safetensors", tmp_path)
    last = Selection(last=2)
    assert len(open_checkpoints([tmp_path], last, told.append)) == 2
    assert not told
    put(tmp_path / "model.safetensors")
    assert len(open_checkpoints([tmp_path], last, told.append)) == 2
    (note,) = told
    assert isinstance(note, Noted)
    remedy = note.text.partition("the folder last: ")[2]
    listed = subprocess.run(["bash", "-c", f"echo {remedy}"], capture_output=True, text=True)
    assert [step for _, step in found(*listed.stdout.split())] == [7, 9, 12, None]


def test_the_best_is_not_taken_for_the_newest(tmp_path: Path) -> None:
    for name in ("model_1.pth", "model_2.pth", "model_best.pth", "bestow.pth"):
        put(tmp_path / name)
    names = [name for name, _ in found(tmp_path)]
    assert names == ["model_best.pth", "model_1.pth", "model_2.pth", "bestow.pth"]
    assert found(tmp_path, selection=Selection(last=2))[1][0] == "bestow.pth"


def test_order_without_steps(tmp_path: Path) -> None:
    files = [put(tmp_path / f"{name}.safetensors") for name in ("first", "second", "third", "an")]
    for age, file in enumerate(reversed(files)):
        os.utime(file, (1e9 - age, 1e9 - age))
    assert [name for name, _ in found(tmp_path)] == [f.name for f in files]
    given = [files[2], files[0], files[3]]
    assert [name for name, _ in found(*given, root=tmp_path)] == [f.name for f in given]
    with_step = put(tmp_path / "step3.safetensors")
    given = [files[2], with_step, files[0]]
    assert [name for name, _ in found(*given, root=tmp_path)] == [f.name for f in given]
    assert found(tmp_path)[0] == ("step3.safetensors", 3)


def test_a_trainers_output_folder(tmp_path: Path) -> None:
    out = put(tmp_path / "out" / "model.safetensors").parent
    touch(out, "config.json", "training_args.bin", "runs/x/events.out.tfevents.1")
    assert found(out) == [(".", None)]
    for step in (20, 100):
        folder = out / f"checkpoint-{step}"
        put(folder / "model.safetensors")
        touch(folder, "config.json", "optimizer.pt", "scheduler.pt", "rng_state_0.pth")
    (out / "checkpoint-200" / "global_step200").mkdir(parents=True)
    assert "holds no weights" in message(out)
    (out / "checkpoint-200" / "global_step200").rmdir()
    (out / "checkpoint-200").rmdir()
    put(out / "2_Dense" / "model.safetensors")
    assert found(out) == [("checkpoint-20", 20), ("checkpoint-100", 100)]
    other = put(tmp_path / "other" / "model.safetensors").parent
    assert [name for name, _ in found(out, other)] == [".", "../other"]


def test_training_state_is_no_checkpoint(tmp_path: Path) -> None:
    state = (
        "optimizer.pt optimizer.bin scheduler.pt rng_state.pth rng_state_1.pth training_args.bin"
        " scaler.pt random_states_0.pkl optim_100.pt model_100_optimizer.pt lr_scheduler.bin"
        " step-100-optim_states.pt .hidden.pt notes.txt"
    )
    touch(tmp_path, *state.split())
    put(tmp_path / "opt-125m_100.pt")
    put(tmp_path / "opt-125m_200.pt")
    assert [name for name, _ in found(tmp_path)] == ["opt-125m_100.pt", "opt-125m_200.pt"]


def test_safetensors_go_before_pickles(tmp_path: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin", "model.pt"):
        put(tmp_path / "hf" / name)
    (checkpoint,) = open_checkpoints([tmp_path / "hf"])
    assert checkpoint.format == "huggingface"
    for name in ("a_1.safetensors", "a_1.pt", "a_2.safetensors", "a_2.pt"):
        put(tmp_path / "bare" / name)
    assert [name for name, _ in found(tmp_path / "bare")] == ["a_1.safetensors", "a_2.safetensors"]


def test_adapters_and_folders_with_one_file(tmp_path: Path) -> None:
    put(tmp_path / "checkpoint-1" / "adapter_model.safetensors")
    put(tmp_path / "checkpoint-2" / "diffusion_pytorch_model.safetensors")
    put(tmp_path / "checkpoint-3" / "net.pt")
    put(tmp_path / "checkpoint-4" / "model.pt")
    put(tmp_path / "checkpoint-4" / "ema.pt")
    put(tmp_path / "checkpoint-5" / "pytorch_model_fsdp.bin")
    assert [step for _, step in found(tmp_path)] == [1, 2, 3, 4, 5]
    assert found(tmp_path / "checkpoint-3") == [(".", 3)]
    put(tmp_path / "checkpoint-6" / "generator.pt")
    put(tmp_path / "checkpoint-6" / "critic.pt")
    assert "which file" in message(tmp_path)
    assert len(found(tmp_path, selection=Selection(to_step=5))) == 5


def test_bare_files_beside_a_final_model(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model_10.safetensors", "model_9.safetensors"):
        put(tmp_path / name)
    assert [step for _, step in found(tmp_path)] == [9, 10, None]


def test_paths_given_twice_and_links_count_once(tmp_path: Path) -> None:
    one, two = (put(tmp_path / f"checkpoint-{k}" / "model.safetensors").parent for k in (1, 2))
    (tmp_path / "latest").symlink_to(two, target_is_directory=True)
    (tmp_path / "a-link").symlink_to("checkpoint-1", target_is_directory=True)
    assert found(tmp_path) == [("checkpoint-1", 1), ("checkpoint-2", 2)]
    assert len(found(one, tmp_path / "checkpoint-2" / ".." / "checkpoint-1", two)) == 2
    copy = put(tmp_path / "checkpoint-3" / "model.safetensors").parent
    assert len(found(one, copy)) == 2


@pytest.mark.parametrize(
    ("selection", "steps"),
    [
        (Selection(), [10, 20, 30, 40, 50]),
        (Selection(last=2), [40, 50]),
        (Selection(last=9), [10, 20, 30, 40, 50]),
        (Selection(every=2), [10, 30, 50]),
        (Selection(every=3), [20, 50]),
        (Selection(from_step=20, to_step=40), [20, 30, 40]),
        (Selection(to_step=45, every=2, last=1), [40]),
        (Selection(from_step=11, every=2), [30, 50]),
    ],
)
def test_selection(tmp_path: Path, selection: Selection, steps: list[int]) -> None:
    for step in (10, 20, 30, 40, 50):
        put(tmp_path / f"step_{step}.safetensors")
    assert [step for _, step in found(tmp_path, selection=selection)] == steps


def test_nothing_selected(tmp_path: Path) -> None:
    for step in (10, 20):
        put(tmp_path / f"step_{step}.safetensors")
    put(tmp_path / "final.safetensors")
    text = message(tmp_path, selection=Selection(from_step=21))
    assert "10, 20" in text
    assert "from 21" in text


def test_only_what_is_selected_is_opened(tmp_path: Path) -> None:
    put(tmp_path / "checkpoint-1" / "model.safetensors")
    put(tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"broken")
    (tmp_path / "checkpoint-3").mkdir()
    assert "checkpoint-2" in message(tmp_path)
    assert "no weights" in message(tmp_path, selection=Selection(from_step=3))
    assert found(tmp_path, selection=Selection(to_step=1)) == [("checkpoint-1", 1)]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["checkpoint-1/pytorch_model_fsdp_0/__0_0.distcp"], "without its file .metadata"),
        (["model_index.json", "unet/diffusion_pytorch_model.safetensors"], "Diffusers"),
        (["__0_0.distcp", ".metadata"], "metadata of a distributed checkpoint is damaged"),
        (["global_step1/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "zero_to_fp32.py"),
        (["checkpoint-1/global_step1/zero_pp_rank_0_mp_rank_00_model_states.pt"], "zero_to_fp32"),
        (["consolidated.00.pth", "consolidated.01.pth"], "tensor-parallel"),
        (["x/tf_model.h5", "flax_model.msgpack"], "no checkpoint in this folder"),
        (["version_0/checkpoints/last.ckpt"], "no checkpoint in this folder"),
        (["checkpoints/a_1.pt", "checkpoints/a_2.pt"], "give "),
        ([], "an empty folder"),
    ],
)
def test_what_is_not_read(tmp_path: Path, files: list[str], says: str) -> None:
    touch(tmp_path, *files)
    assert says in message(tmp_path)


def test_deepspeed_state_beside_readable_weights_is_ignored(tmp_path: Path) -> None:
    folder = put(tmp_path / "checkpoint-1" / "model.safetensors").parent
    touch(folder, "global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_to_fp32.py")
    assert found(folder) == [(".", 1)]


def test_wrong_arguments(tmp_path: Path) -> None:
    touch(tmp_path, "x.txt")
    os.mkfifo(tmp_path / "pipe.pt")
    assert "hf download org/name" in message("org/name")
    assert "no such" in message(tmp_path / "gone.pt")
    assert "no such" in message("a\0b")
    assert "cannot be read" in message(tmp_path / ("x" * 5000))
    assert ".txt" in message(tmp_path / "x.txt")
    assert "neither" in message(tmp_path / "pipe.pt")
    assert "No checkpoints" in message()


def test_an_index_stands_for_its_folder(tmp_path: Path) -> None:
    put(tmp_path / "m" / "model-00001-of-00001.safetensors")
    index = tmp_path / "m" / "model.safetensors.index.json"
    weight_map = dict.fromkeys(STATE, "model-00001-of-00001.safetensors")
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert found(index, root=tmp_path) == [("m", None)]


def test_opening_is_fast(tmp_path: Path) -> None:
    state = {f"layers.{k}.weight": torch.zeros(8, 8) for k in range(300)}
    for step in range(25):
        (tmp_path / f"checkpoint-{step}").mkdir()
        save_file(state, tmp_path / f"checkpoint-{step}" / "model.safetensors")
    began = time.process_time()
    assert len(open_checkpoints([tmp_path])) == 25
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize("paths", ["", ["", "run"]])
def test_an_empty_path_is_not_the_current_folder(
    paths: str | list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    for folder in (tmp_path, tmp_path / "run"):
        save_file({"w": torch.ones(2)}, folder / "step_1.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="empty"):
        open_checkpoints(paths)


def test_step_zero_is_a_step(tmp_path: Path) -> None:
    for name, step in (("mid", 500), ("init", 0), ("end", 1000)):
        put(tmp_path / name / "model.safetensors")
        state = json.dumps({"global_step": step})
        touch(tmp_path, f"{name}/trainer_state.json", text=state)
    assert found(tmp_path) == [("init", 0), ("mid", 500), ("end", 1000)]


@pytest.mark.timeout(60)
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for step in (1, 2):
        put(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        os.mkfifo(tmp_path / f"checkpoint-{step}" / "trainer_state.json")
    assert [step for _, step in found(tmp_path)] == [1, 2]


def test_json_without_an_end_is_no_configuration(tmp_path: Path) -> None:
    put(tmp_path / "model.safetensors")
    weights = {"w": torch.zeros(3, 2, dtype=torch.int8)}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert len(open_checkpoints([tmp_path])) == 1


def test_a_folder_that_may_not_be_entered_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The administrator may enter all, so that the tests are told of it by the system's answer."""
    for step in (1, 2):
        put(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    closed = tmp_path / "checkpoint-2"
    monkeypatch.setattr(os, "access", lambda path, mode, **_: Path(path) != closed)
    said = message(tmp_path)
    assert str(closed) in said
    assert "permission" in said.lower()
