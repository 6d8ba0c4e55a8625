"""The names that training scripts give to checkpoints → their order, and their steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from twa_merge.checkpoints import open_checkpoints
from twa_merge.config import Selection
from twa_merge.errors import CheckpointError
from twa_merge.progress import Event, Noted

UNKNOWN = None


def save(folder: Path, names: Sequence[str], **beside: Sequence[object]) -> list[Path]:
    """One pickle a name; ``beside`` holds what each has saved beside its weights."""
    folder.mkdir(exist_ok=True)
    for k, name in enumerate(names):
        extras = {key: values[k] for key, values in beside.items()}
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save({"model": {"w": torch.full((2,), float(k))}, **extras}, folder / name)
    return [folder / name for name in names]


def read(*paths: Path, notes: list[str] | None = None) -> tuple[list[str], list[int | None]]:
    def hear(event: Event) -> None:
        if notes is not None and isinstance(event, Noted):
            notes.append(event.text)

    found = open_checkpoints(paths, Selection(), hear)
    for checkpoint in found:
        checkpoint.close()
    return [c.path.name for c in found], [c.step for c in found]


# In the order of training. Scripts number and count in many ways:
NUMBERED = {
    "trainer": ("checkpoint-100 checkpoint-1000 checkpoint-2000", [100, 1000, 2000]),
    "lightning": (
        "epoch=3-step=120-val_loss=0.34.ckpt epoch=12-step=480-val_loss=0.28.ckpt",
        [120, 480],
    ),
    "keras": ("weights.01-0.41.pt weights.02-0.88.pt weights.10-0.60.pt", [1, 2, 10]),
    "megatron": ("iter_0001000.pt iter_0002000.pt iter_0010000.pt", [1000, 2000, 10000]),
    "deepspeed": ("global_step500.pt global_step1000.pt", [500, 1000]),
    "timm": ("checkpoint-9.pth.tar checkpoint-10.pth.tar", [9, 10]),
    "moco": ("checkpoint_0009.pth.tar checkpoint_0010.pth.tar", [9, 10]),
    "bare": ("0001.pt 0002.pt 0010.pt", [1, 2, 10]),
    "the size before": ("resnet50_epoch3.pth resnet50_epoch12.pth", [3, 12]),
    "the size after": ("9_resnet50_0.18.pth 10_resnet50_0.13.pth", [9, 10]),
    "a size and a step": ("llama-7b-step-100.pt llama-7b-step-1000.pt", [100, 1000]),
    "a size and a number": ("llama-7b-100.pt llama-7b-1000.pt", [100, 1000]),
    "hyperparameters": ("m_v2_9_lr0.01_bs32.pt m_v2_10_lr0.01_bs32.pt", [9, 10]),
    "of how many": ("model-9-of-10ep.pt model-10-of-10ep.pt", [9, 10]),
    "fairseq": ("checkpoint_1_500.pt checkpoint_2_1000.pt checkpoint_2_1500.pt", [500, 1000, 1500]),
    "of one epoch": ("epoch_0_900.pt epoch_0_1000.pt", [900, 1000]),
    "epochs planned": ("resnet_ep90_9.pt resnet_ep90_10.pt", [9, 10]),
    "epochs alone": ("epoch=0-val_loss=0.31.pt epoch=0-val_loss=0.34.pt", [0, 0]),
    "a run's number": ("ckpt2_9.pt ckpt2_10.pt", [9, 10]),
    "epoch and step": ("m_0_900.pt m_1_1000.pt m_1_1900.pt", [900, 1000, 1900]),
    "steps within an epoch": (
        "ep0_iter100.pt ep0_iter900.pt ep1_iter100.pt ep1_iter900.pt",
        [0, 0, 1, 1],
    ),
    "a metric in words": ("net_1_bleu41.pt net_2_bleu23.pt net_10_bleu30.pt", [1, 2, 10]),
    "another one": ("epoch1-psnr41.pt epoch2-psnr23.pt epoch10-psnr30.pt", [1, 2, 10]),
    "a score with digits": ("e9_f1_0.77.pt e10_f1_0.60.pt", [9, 10]),
    "a metric": ("net_1_41.pt net_2_23.pt net_3_67.pt net_4_5.pt", [1, 2, 3, 4]),
    "a metric first": ("41_100.pt 23_200.pt 67_300.pt 5_400.pt", [100, 200, 300, 400]),
    "files of one name": ("a1/wav2vec2.pt a2/wav2vec2.pt a10/wav2vec2.pt", [1, 2, 10]),
    "a day and a number": ("2026-01-05_900.pt 2026-01-05_1000.pt 2026-01-06_1100.pt",
                           [900, 1000, 1100]),
    "a time and a step": ("20260105_093440_step900.pt 20260105_101640_step1000.pt", [900, 1000]),
    "steps like days": ("m_9000000.pt m_20150512.pt m_30000000.pt", [9000000, 20150512, 30000000]),
    "a run's start": ("2026-01-05_09-34-40_9.pt 2026-01-05_09-34-40_10.pt", [9, 10]),
}  # fmt: skip
TIMES = {
    "a day": "model_2026-01-09.pt model_2026-01-10.pt model_2026-02-01.pt",
    "dashes": "m_2026-01-05_09-34-40.pt m_2026-01-05_10-05-48.pt m_2026-01-06_08-01-39.pt",
    "nothing between": "m_20260105_234500.pt m_20260106_000000.pt m_20260106_001500.pt",
    "in front": "20260105-234500_tagger.pt 20260106-000000_tagger.pt",
    "one number": "m20260105234500.pt m20260106000000.pt",
    "iso": "ckpt_2026-01-05T09:34:40.pt ckpt_2026-01-05T10:05:48.pt ckpt_2026-01-06T08:00:00.pt",
    "basic iso": "20260105T234500Z.pt 20260106T000000Z.pt",
    "an offset": "2026-01-05T23:45:00.250+01:00.pt 2026-01-06T00:00:00.125+01:00.pt",
    "points": "m.2026.01.05.23.45.00.pt m.2026.01.06.00.15.00.pt",
    "low lines": "m_2026_01_05_23_45_00.pt m_2026_01_06_00_15_00.pt",
    "minutes": "m_2026-01-05_2345.pt m_2026-01-06_0015.pt m_2026-01-06_0115.pt",
    "without zeros": "m_2026-1-9_23-5-7.pt m_2026-1-10_0-15-7.pt",
    "a clock": "m_09-34-40.pt m_10-05-48.pt m_11-02-02.pt",
    "the day first": "m_31-01-2026_09-34.pt m_01-02-2026_08-00.pt",
    "the month first": "m_01-31-2026.pt m_02-01-2026.pt",
    "seconds": "model_1767605680.pt model_1767609948.pt",
    "milliseconds": "1767605680123.pt 1767609948001.pt",
    "fractions": "m_1767605680.123456.pt m_1767609948.5.pt",
    "folders": "2026-01-05_09-34-40/model.pt 2026-01-06_08-01-39/model.pt",
    "a size": "resnet50_2026-01-05_09-34-40.pt resnet50_2026-01-06_08-01-39.pt",
    "a metric": "2026-01-05_09-34_97.pt 2026-01-05_10-02_95.pt 2026-01-06_08-00_99.pt",
    "a metric in front": "97_2026-01-05_09-34.pt 95_2026-01-05_10-02.pt 99_2026-01-06_08-00.pt",
}


@pytest.mark.parametrize("case", NUMBERED)
def test_steps(tmp_path: Path, case: str) -> None:
    text, steps = NUMBERED[case]
    names = [name if "." in name else f"{name}/model.pt" for name in text.split()]
    files = save(tmp_path / "run", names)
    notes: list[str] = []
    assert read(tmp_path / "run", notes=notes) == ([name.split("/")[0] for name in names], steps)
    if "/" not in names[0]:
        assert read(*files, notes=notes) == (names, steps)
    assert not notes


@pytest.mark.parametrize("case", TIMES)
def test_a_time_orders_and_is_no_step(tmp_path: Path, case: str) -> None:
    names = TIMES[case].split()
    files = save(tmp_path / "run", names)
    notes: list[str] = []
    unknown = [UNKNOWN] * len(names)
    assert read(tmp_path / "run", notes=notes) == ([n.split("/")[0] for n in names], unknown)
    if "/" not in names[0]:
        assert read(*reversed(files), notes=notes) == (names, unknown)
    assert not notes
    with pytest.raises(CheckpointError, match="no known steps"):
        open_checkpoints([tmp_path / "run"], Selection(from_step=1))


@pytest.mark.parametrize("case", TIMES)
def test_the_step_that_a_file_stores_goes_before_times(tmp_path: Path, case: str) -> None:
    names = TIMES[case].split()
    steps = [100 * (k + 1) for k in range(len(names))]
    save(tmp_path / "run", names, global_step=steps)
    assert read(tmp_path / "run")[1] == steps
    found = open_checkpoints([tmp_path / "run"], Selection(to_step=100))
    assert [c.path.name for c in found] == [names[0].split("/")[0]]


def test_stored_steps_go_before_times_beside_a_copy_without_either(tmp_path: Path) -> None:
    names = TIMES["dashes"].split()
    save(tmp_path, names, global_step=[300, 200, 100])
    torch.save({"w": torch.full((2,), 9.0)}, tmp_path / "final.pt")
    assert read(tmp_path) == ([*names[::-1], "final.pt"], [100, 200, 300, UNKNOWN])


def test_several_of_one_step_are_told_unless_they_were_listed(tmp_path: Path) -> None:
    paths = save(tmp_path / "run", ["model_50.pt", "ema_50.pt", "model_60.pt", "ema_60.pt"])
    notes: list[str] = []
    assert read(tmp_path / "run", notes=notes)[1] == [50, 50, 60, 60]
    (note,) = notes
    assert "ema_50.pt, model_50.pt of step 50" in note
    read(*paths, notes=notes)
    assert len(notes) == 1


def test_times_in_names_of_several_kinds(tmp_path: Path) -> None:
    names = ["tagger_2026-01-05.pt", "again_2026-01-06.pt", "20260107.pt", "latest.pt"]
    save(tmp_path, names)
    assert read(tmp_path) == (names, [UNKNOWN] * 4)


def test_what_is_called_the_best_may_be_a_copy_of_one_that_is_called_by_a_time(
    tmp_path: Path,
) -> None:
    names = TIMES["dashes"].split()
    save(tmp_path, names)
    (tmp_path / "best.pt").write_bytes((tmp_path / names[1]).read_bytes())
    assert read(tmp_path)[0] == names


DOUBTFUL = ["net_1_30.pt", "net_2_23.pt", "net_7_41.pt", "net_10_25.pt"]


def test_numbers_of_which_none_is_said_to_be_the_step_are_told(tmp_path: Path) -> None:
    files = save(tmp_path, DOUBTFUL)
    notes: list[str] = []
    assert read(tmp_path, notes=notes) == (DOUBTFUL, [UNKNOWN] * 4)
    (note,) = notes
    assert "net_1_30.pt" in note
    assert "net_10_25.pt" in note
    assert "--from-step" in note
    given = [files[2], files[0], files[3]]
    assert read(*given, notes=notes)[0] == [f.name for f in given]
    assert "as they were given" in notes[1]


def test_a_file_settles_what_its_name_leaves_open(tmp_path: Path) -> None:
    for key, values in (("global_step", [400, 300, 200, 100]), ("epoch", [10, 7, 2, 1])):
        save(tmp_path / key, DOUBTFUL, **{key: values})
        notes: list[str] = []
        assert read(tmp_path / key, notes=notes) == (DOUBTFUL[::-1], values[::-1])
        assert not notes


def test_words_that_only_some_names_have(tmp_path: Path) -> None:
    """Folds, where the first one looks like a metric."""
    names = ["f1_3.pt", "f2_6.pt", "f12_9.pt", "x_fp16.5_1.pt", "x_fp16_2.pt"]
    files = save(tmp_path, names)
    assert read(*files[:3]) == (names[:3], [3, 6, 9])
    assert read(*files[3:]) == (names[3:], [1, 2])


def test_numbers_of_a_checkpoint_by_itself(tmp_path: Path) -> None:
    assert read(*save(tmp_path, ["llama-7b-100.pt"])) == (["llama-7b-100.pt"], [100])
    assert read(*save(tmp_path, ["m_2026-01-05.pt"])) == (["m_2026-01-05.pt"], [UNKNOWN])
    stored = save(tmp_path, ["net_3_23.pt"], global_step=[7])
    assert read(*stored) == (["net_3_23.pt"], [7])
