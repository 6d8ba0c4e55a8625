"""The README.md of a merged folder."""

from __future__ import annotations

import copy
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

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
    train["weights"] = "@/home/secret/project/twa_merge.json"
    card = model_card(train)
    assert "secret" not in card
    assert "@twa" in card


@pytest.mark.parametrize("parent", ["run", "other/run"])
def test_how_to_do_it_again(train: dict[str, Any], parent: str) -> None:
    for checkpoint in train["checkpoints"]:
        checkpoint["path"] = f"{parent}/checkpoint-{checkpoint['step']}"
    train["options"]["dtype"] = "bfloat16"
    words = command(model_card(train))
    assert words[:3] == ["twa-merge", "average", "run"]
    assert words[3:7] == ["--from-step", "50", "--to-step", "250"]
    assert words[7:9] == ["--weights", "@twa_merge.json"]
    assert words[9:] == ["-o", "merged", "--dtype", "bfloat16"]


def test_files_without_steps_are_named_one_by_one(train: dict[str, Any]) -> None:
    train["checkpoints"] = [
        {"path": f"/x/{name}/model.pt", "step": None, "format": "pickle"} for name in "abcde"
    ]
    assert command(model_card(train))[2:7] == [f"{name}/model.pt" for name in "abcde"]


def test_names_cannot_break_out(train: dict[str, Any]) -> None:
    evil = "a|b\n# heading\n```\n<script>`x`[y](http://z)$m$"
    train["checkpoints"][0]["path"] = evil
    train["candidates"][0]["name"] = evil
    train["notes"] = [evil]
    card = model_card(train)
    assert "<script>" not in card.split("## The same again")[0]
    assert "\n# heading" not in card
    rows = table(card, "Coefficients")
    assert {len(row) for row in rows} == {3}
    assert {len(row) for row in table(card, "Candidates")} == {5}
    text = card.split("## The same again")[0]
    for mark in ("[y]", "$m", "`x"):
        assert mark not in text.replace("\\" + mark[0], "")


def test_backticks_cannot_end_the_command(train: dict[str, Any]) -> None:
    for i, checkpoint in enumerate(train["checkpoints"]):
        checkpoint |= {"path": f"{i}```\n# heading", "step": None}
    section = model_card(train).split("## The same again\n\n")[1]
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
    assert command(card)[2] == "r"
