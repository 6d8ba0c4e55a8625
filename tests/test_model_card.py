"""The README.md of a merged folder."""

from __future__ import annotations

import copy
import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from twa_merge_cli.boundary import run
from twa_merge_cli.main import cli

from twa_merge import average
from twa_merge.config import Selection
from twa_merge.model_card import model_card

DOCUMENT = json.loads((Path(__file__).parent / "documents" / "train.json").read_text())


@pytest.fixture
def train() -> dict[str, Any]:
    return copy.deepcopy(DOCUMENT)


def table(card: str, heading: str) -> list[list[str]]:
    """Cells of the table under a heading, split where Markdown splits them."""
    section = card.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    cells = [row.replace("\\|", "\0").strip("|").split("|") for row in rows]
    return [[cell.strip().replace("\0", "|") for cell in row] for row in cells]


def command(card: str) -> list[str]:
    block = card.split("```sh\n")[1].split("\n```")[0]
    return shlex.split(block)


def test_front_matter_is_yaml_with_tags(train: dict[str, Any]) -> None:
    _, front, _ = model_card(train).split("---\n", 2)
    assert yaml.safe_load(front) == {"tags": ["merge", "twa-merge"]}


def test_coefficients_and_candidates(train: dict[str, Any]) -> None:
    card = model_card(train)
    assert table(card, "Coefficients")[2:] == [
        [f"checkpoint-{c['step']}", str(c["step"]), f"{a:+.6f}"]
        for c, a in zip(train["checkpoints"], train["coefficients"]["global"], strict=True)
    ]
    rows = table(card, "Candidates")
    assert rows[2][0] == "**twa**"
    assert {row[0].replace("\\", "").strip("*") for row in rows[2:]} == {
        c["name"] for c in train["candidates"]
    }
    winner = next(c for c in train["candidates"] if c["name"] == "twa")
    assert rows[2][1:4] == [f"{winner[k]:.4f}" for k in ("fit_loss", "guard_loss", "test_loss")]
    assert "twa is better than the best single checkpoint by 0.0616" in card


def test_no_path_of_the_machine_is_told(train: dict[str, Any]) -> None:
    for i, checkpoint in enumerate(train["checkpoints"]):
        checkpoint["path"] = f"/home/secret/project/run/checkpoint-{i}"
    assert "secret" not in model_card(train)


def save_run(run: Path, steps: Sequence[int]) -> list[Path]:
    run.mkdir(parents=True)
    files = [run / f"step_{step}.pt" for step in steps]
    for file in files:
        torch.save({"w": torch.tensor([float(file.stem[5:])])}, file)
    return files


def test_no_document_of_a_merge_tells_a_path_of_the_machine(tmp_path: Path) -> None:
    files = save_run(tmp_path / "a" / "run", [1, 2]) + save_run(tmp_path / "b" / "run", [1, 2])
    average(files, tmp_path / "one")
    report = tmp_path / "one" / "twa_merge.json"
    document = average(files, tmp_path / "two", weights=f"@{report}")
    assert document["weights"] == "@twa_merge.json"
    expected = [f"{seed}/run/step_{step}.pt" for step in (1, 2) for seed in "ab"]
    assert sorted(c["path"] for c in document["checkpoints"]) == sorted(expected)
    for written in (tmp_path / "two").glob("*.[jm]*"):
        assert str(tmp_path) not in written.read_text()


def test_how_to_do_it_again(train: dict[str, Any]) -> None:
    train |= {"run": "lm"}
    train["options"] |= {"dtype": "bfloat16", "selection": {"every": 3, "from_step": 40}}
    words = command(model_card(train))
    assert words[:3] == ["twa-merge", "average", "lm"]
    assert words[3:9] == ["--to-step", "250", "--every", "3", "--last", "5"]
    assert words[9:11] == ["--weights", "@twa_merge.json"]
    assert words[11:] == ["-o", "merged-again", "--dtype", "bfloat16"]


@pytest.mark.parametrize("given", ["run", "files"])
@pytest.mark.parametrize("selection", [Selection(), Selection(last=2), Selection(2, 2, 100, 400)])
def test_the_same_again_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, selection: Selection
) -> None:
    """Also where files were left out, or more of them come later."""
    files = save_run(tmp_path / "r4", [100, 200, 300, 400, 500])
    paths = [files[0].parent] if given == "run" else [files[0], files[2], files[4]]
    document = average(paths, tmp_path / "out", selection=selection)
    assert len(document["checkpoints"]) < 5 or given == "run"
    save_run(tmp_path / "later", [600])[0].rename(tmp_path / "r4" / "step_600.pt")
    words = command((tmp_path / "out" / "README.md").read_text())
    monkeypatch.chdir(tmp_path)
    shutil.copy(tmp_path / "out" / "twa_merge.json", tmp_path)
    assert run(cli, words[1:]) == 0
    again = json.loads((tmp_path / "merged-again" / "twa_merge.json").read_text())
    assert again["checkpoints"] == document["checkpoints"]


def test_files_without_steps_are_named_one_by_one(train: dict[str, Any]) -> None:
    train["checkpoints"] = [
        {"path": f"/x/{name}/model.pt", "step": None, "format": "pickle"} for name in "abcde"
    ]
    assert command(model_card(train))[2:7] == [f"{name}/model.pt" for name in "abcde"]


def test_a_path_is_not_taken_for_an_option(train: dict[str, Any]) -> None:
    assert command(model_card(train | {"run": "-dash"}))[2] == "./-dash"
    train["checkpoints"] = [
        {"path": f"-{name}/model.pt", "step": None, "format": "pickle"} for name in "abcde"
    ]
    assert command(model_card(train))[2:7] == [f"./-{name}/model.pt" for name in "abcde"]


def test_names_cannot_break_out(train: dict[str, Any]) -> None:
    evil = "a|b\n# heading\n```\n<script>`x`[y](http://z)$m$"
    train["checkpoints"][0]["path"] = evil
    train["candidates"][0]["name"] = evil
    card = model_card(train)
    assert "<script>" not in card.split("## The same again")[0]
    assert "\n# heading" not in card
    rows = table(card, "Coefficients")
    assert {len(row) for row in rows} == {3}
    assert {len(row) for row in table(card, "Candidates")} == {5}
    text = card.split("## The same again")[0]
    for mark in ("[y]", "$m", "`x"):
        assert mark not in text.replace("\\" + mark[0], "")


def test_it_is_said_where_the_same_again_runs(train: dict[str, Any]) -> None:
    copied = "with `twa_merge.json` of this folder copied there:"
    assert f"From the folder that these paths start from, {copied}" in model_card(train)
    assert f"From the folder that l\\_m lies in, {copied}" in model_card(train | {"run": "l_m"})


def test_backticks_cannot_end_the_command(train: dict[str, Any]) -> None:
    for i, checkpoint in enumerate(train["checkpoints"]):
        checkpoint |= {"path": f"{i}```\n# heading", "step": None}
    section = model_card(train).split("copied there:\n\n")[1]
    assert section.startswith("````sh\n")
    assert section.endswith("\n````\n")
    assert section.count("\n") == 3


def test_blocks_get_a_row_each(train: dict[str, Any]) -> None:
    train["coefficients"]["blocks"] = {"layer_0": [1, 0, 0, 0, 0], "layer_1": [0, 0, 0, 0, 1]}
    train["chosen"] = None
    rows = table(model_card(train), "Coefficients")
    assert rows[0][0] == "block"
    assert [row[0] for row in rows[2:]] == [r"layer\_0", r"layer\_1"]
    assert rows[2][1:] == ["+1.0000", "+0.0000", "+0.0000", "+0.0000", "+0.0000"]


def test_an_average_needs_no_candidates() -> None:
    card = model_card(
        {
            "version": "0",
            "method": "average",
            "weights": "ema:0.9",
            "checkpoints": [
                {"path": "r/checkpoint-1", "step": 1, "format": "huggingface"},
                {"path": "r/checkpoint-2", "step": 2, "format": "huggingface"},
            ],
            "coefficients": {"global": [0.25, 0.75]},
        }
    )
    assert "ema:0.9" in card
    assert "## Candidates" not in card
    assert command(card)[2:4] == ["r/checkpoint-1", "r/checkpoint-2"]
