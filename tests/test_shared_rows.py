"""Blocks with the same coefficients are shown as one row, named by what they have in common."""

from __future__ import annotations

import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from twa_merge_cli import render

from twa_merge.html_report import html_report
from twa_merge.model_card import model_card
from twa_merge.shared_rows import shown_coefficients

DOCUMENT = json.loads((Path(__file__).parent / "documents" / "train.json").read_text())
FIRST, SECOND, REST = [1.0, 0, 0, 0, 0], [0, 1.0, 0, 0, 0], [0, 0, 0, 0, 1.0]


def document(rows: dict[str, list[float]], kind: str = "tensors") -> dict[str, Any]:
    found = copy.deepcopy(DOCUMENT)
    found["coefficients"]["blocks"] = rows
    next(c for c in found["candidates"] if c["name"] == found["chosen"])["coefficients"] = rows
    found["blocks"] = {"kind": kind}
    return found


@pytest.fixture
def by_layer() -> dict[str, Any]:
    tensors = [f"{part}.{kind}" for part in ("norm", "dense") for kind in ("weight", "bias")]
    rows = {f"model.layers.0.{t}": FIRST for t in tensors}
    rows |= {f"model.layers.1.{t}": SECOND for t in tensors}
    rows |= {"model.norm.weight": REST, "head.weight": REST, "head.bias": REST}
    return document(rows)


def test_rows_are_named_by_what_they_alone_have_in_common(by_layer: dict[str, Any]) -> None:
    assert shown_coefficients(by_layer) == {
        "model.layers.0.* (4 tensors)": FIRST,
        "model.layers.1.* (4 tensors)": SECOND,
        "model.norm.weight, head.* (3 tensors)": REST,
    }


def test_rows_of_their_own_keep_their_names() -> None:
    rows = {"a.weight": FIRST, "a.bias": SECOND, "b": REST}
    assert shown_coefficients(document(rows)) == rows


def test_names_with_little_in_common_are_listed() -> None:
    rows = {"a": FIRST, "b": FIRST, "c": FIRST, "d": SECOND}
    found = shown_coefficients(document(rows, "layers"))
    assert list(found) == ["a, b and 1 more (3 blocks)", "d"]


def test_they_are_shown_like_that_everywhere(by_layer: dict[str, Any]) -> None:
    file = io.StringIO()
    render.show_coefficients(by_layer, Console(file=file, width=100))
    page, card = html_report(by_layer), model_card(by_layer).replace("\\", "")
    for text in (file.getvalue(), page, card):
        assert len(re.findall(r"layers\.[01]\.\* \(4 tensors\)", text)) == 2
        assert "layers.0.dense" not in text
