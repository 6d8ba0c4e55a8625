"""One self-contained page: complete, deterministic, and safe with any name."""

from __future__ import annotations

import builtins
import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from twa_merge.errors import OutputError
from twa_merge.html_report import html_report
from twa_merge.model_card import model_card

DOCUMENT = json.loads((Path(__file__).parent / "documents" / "train.json").read_text())
LANDSCAPE = {
    "examples": 48,
    "points": [[-1.0, 0.0], [-0.5, 0.5], [0.0, 0.2], [0.5, -0.3], [1.0, 0.1]],
    "path": [[0.0, 0.0], [0.3, 0.1], [0.25, 0.2]],
    "grid_x": [-1.5, -0.5, 0.5, 1.5],
    "grid_y": [-1.0, 0.0, 1.0],
    "loss": [[2.0, 1.5, 1.4, None], [1.6, 1.2, 1.1, 1.5], [1.9, 1.5, 1.45, float("nan")]],
    "candidates": {"twa": [0.25, 0.2], "uniform": [0.0, 0.0]},
}
_VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; every tag must be closed where it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)


@pytest.fixture
def train() -> dict[str, Any]:
    return copy.deepcopy(DOCUMENT)


@pytest.fixture(scope="module")
def whole() -> str:
    """The page of the document as it is; drawing takes a second or two."""
    return html_report(copy.deepcopy(DOCUMENT), LANDSCAPE)


@pytest.fixture(scope="module")
def by_block() -> str:
    """The page of a winner with several blocks."""
    blocks = {f"layers.{b}": [0.1 * b, -0.2, 0.3, 0.3, 0.6 - 0.1 * b] for b in range(7)}
    return html_report(with_blocks(copy.deepcopy(DOCUMENT), blocks), LANDSCAPE)


def with_blocks(document: dict[str, Any], blocks: dict[str, list[float]]) -> dict[str, Any]:
    document["candidates"].append(
        {"name": "twa-layers", "coefficients": blocks, "guard_loss": 1.0, "fit_loss": 1.0}
    )
    document["coefficients"]["blocks"] = blocks
    return document | {"chosen": "twa-layers"}


def test_everything_is_on_the_page(whole: str, train: dict[str, Any]) -> None:
    page = Page(whole)
    assert page.tags.count("svg") == 4
    for candidate in train["candidates"]:
        assert candidate["name"] in page.text
        assert f"{candidate['guard_loss']:.4f}" in page.text
    for checkpoint in train["checkpoints"]:
        assert Path(checkpoint["path"]).name in page.text
    for words in ("twa is better than the best single checkpoint", "path of the fit", "fit loss"):
        assert words in page.text
    assert page.text.count(train["other_candidates"][0]["name"]) >= 1


def test_checkpoints_that_are_not_as_saved_are_named(train: dict[str, Any]) -> None:
    next(c for c in train["candidates"] if c["name"] == "best_single")["batch_norm"] = "newest"
    said = "running statistics taken from the newest checkpoint instead of those saved"
    assert said not in Page(html_report(train)).text, "it is the newest itself"
    train["candidates"][0]["batch_norm"] = "reestimate"
    assert "last: running statistics re-estimated on" in Page(html_report(train)).text


def test_nothing_comes_from_elsewhere(by_block: str) -> None:
    text, page = by_block, Page(by_block)
    assert "script" not in page.tags
    assert "link" not in page.tags
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert value is not None
            assert value.startswith(("#", "data:image/png;base64,"))
    assert "http://" not in text
    assert "https://" not in text
    assert not re.search(r"url\((?!#)", text)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in (
        page.attributes
    )


def test_ids_are_unique_and_all_references_resolve(by_block: str) -> None:
    ids = [value for name, value in Page(by_block).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', by_block))
    assert used
    assert used <= set(ids)


def test_the_same_document_gives_the_same_bytes(whole: str, train: dict[str, Any]) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "xtick.labelsize": 30}):
        assert html_report(train, LANDSCAPE) == whole
    assert dict(matplotlib.rcParams) == before


def test_colours_are_those_of_the_page(whole: str) -> None:
    body = whole.split("</style>", 1)[1]
    assert "var(--ink)" in body
    assert "var(--blue)" in body
    assert "#01020" not in body
    assert "#000000" not in body
    assert "prefers-color-scheme: dark" in whole


def test_names_are_only_ever_text(whole: str, train: dict[str, Any]) -> None:
    evil = '</text><script>alert("1")</script>$\\frac{a}{$ id="x" &amp; \x1b[31m\u202e日本 {} %s'
    for i, checkpoint in enumerate(train["checkpoints"]):
        checkpoint["path"] = f"run/{i}{evil.replace('/', '∕')}"
        checkpoint["format"] = evil
    train["candidates"][0]["name"] = evil
    train["other_candidates"][0]["name"] = evil
    train["device"] = train["version"] = evil
    train["optimizer"]["stages"][0]["name"] = evil
    train["improvement"]["over"] = evil
    landscape = {**LANDSCAPE, "candidates": {evil: [0.1, 0.1], "$x^2$": [0.0, 0.0]}}
    text = html_report(train, landscape)
    page = Page(text)
    assert "script" not in page.tags
    assert {*page.tags} <= {*Page(whole).tags}
    assert "$x^2$" in page.words
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert '<script>alert("1")</script>$\\frac{a}{$ id="x" &amp; ' in page.text


def test_blocks_are_drawn_as_a_map(by_block: str) -> None:
    page = Page(by_block)
    assert "image" in page.tags
    assert all(f"layers.{b}" in page.text for b in range(7))
    assert "in each block" in page.text


@pytest.mark.parametrize("blocks", [1, 3, 80])
def test_long_names_of_checkpoints_leave_room_for_the_coefficients(blocks: int) -> None:
    rows = {f"layers.{b}": [0.1 * b, -0.2, 0.3, 0.3, 0.6 - 0.1 * b] for b in range(blocks)}
    heights = []
    for name in ("c", "checkpoint-of-a-long-experiment-"):
        document = with_blocks(copy.deepcopy(DOCUMENT), rows)
        for k, checkpoint in enumerate(document["checkpoints"]):
            checkpoint["path"] = f"{name}{k}"
        section = html_report(document).split('aria-label="Coefficients"')[1].split("</svg>")[0]
        clip = re.search(r"<clipPath id.*?<rect [^>]*height=\"([0-9.]+)\"", section, re.DOTALL)
        assert clip
        heights.append(float(clip[1]))
    assert heights[1] > 11 * min(blocks, 60), "of a label on each row"
    assert heights[1] > 0.75 * heights[0]


def test_the_tasks_metrics_are_among_the_numbers(train: dict[str, Any]) -> None:
    for k, row in enumerate(train["candidates"]):
        row["guard_metrics"], row["test_metrics"] = {"iou": 0.1234 + k}, {"iou": 0.5678 + k}
    words = Page(html_report(train)).words
    assert {"guard iou", "test iou", "0.1234", "1.5678"} <= set(words)


def test_parts_may_be_missing(train: dict[str, Any]) -> None:
    for key in ("candidates", "optimizer", "data", "timings", "subspace", "improvement"):
        del train[key]
    assert Page(html_report(train)).tags.count("svg") == 1


def test_figures_of_little_data(train: dict[str, Any]) -> None:
    flat = {**LANDSCAPE, "loss": [[1.0] * 4] * 3, "path": [], "candidates": {}}
    train["optimizer"]["stages"][0]["trace"] = [[1, 1.0], [2, None]]
    train["candidates"] = [{"name": "twa", "coefficients": [0.0] * 5, "guard_loss": 1.0}]
    assert Page(html_report(train, flat)).tags.count("svg") == 4


def test_an_average_has_a_page_too() -> None:
    document = {
        "method": "average",
        "checkpoints": [{"path": "a", "step": None}, {"path": "b", "step": None}],
        "coefficients": {"global": [0.5, 0.5]},
    }
    assert Page(html_report(document)).tags.count("svg") == 1


def test_without_matplotlib_the_remedy_is_named(
    train: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(OutputError) as error:
        html_report(train)
    assert 'pip install "twa-merge[report]"' in str(error.value)


def test_the_page_says_how_much_of_large_data_was_used() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["data"] |= {"fit_examples": 30000, "fit_examples_used": 1024}
    document["data"]["guard_examples_used"] = document["data"]["guard_examples"]
    assert "1024 of 30000 / 128 / 512" in html_report(document)
    assert "1024 of 30000 examples to fit, 128 to choose" in model_card(document)


def test_a_candidate_that_exploded_leaves_room_for_the_others() -> None:
    document = copy.deepcopy(DOCUMENT)
    assert "beyond the frame" not in html_report(document)
    document["candidates"][0]["guard_loss"] = 1e17
    document["candidates"][0]["guard_ci95"] = [1e16, 2e17]
    page = html_report(document)
    assert "beyond the frame" in page
    assert "1e17" not in page


def test_what_lies_inside_the_interval_of_another_is_not_left_out() -> None:
    document = copy.deepcopy(DOCUMENT)
    losses = [0.717, *(0.718 + 0.001 * i for i in range(len(document["candidates"]) - 3)), 0.8, 0.8]
    for row, loss in zip(document["candidates"], losses, strict=True):
        row |= {"guard_loss": loss, "guard_ci95": [loss - 0.4, loss + 0.5], "test_loss": None}
    assert "beyond the frame" not in html_report(document)
    for row in document["candidates"]:
        row["guard_ci95"] = [row["guard_loss"] - 0.001, row["guard_loss"] + 0.001]
    document["candidates"][-1]["guard_loss"] = 1.8
    assert "beyond the frame" in html_report(document)


def test_candidates_in_one_place_share_a_label() -> None:
    near = {"twa": [0.1, 0.1], "window:2": [0.12, 0.11], "last": [0.9, 0.1]}
    page = html_report(copy.deepcopy(DOCUMENT), LANDSCAPE | {"candidates": near})
    assert "twa, window:2" in page
    assert "window:2, last" not in page


def test_the_chart_shows_the_metric_that_decided() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["options"]["guard"]["select"] = "metric:iou"
    for k, row in enumerate(document["candidates"]):
        row["guard_metrics"], row["test_metrics"] = {"iou": 0.5 + k / 99}, {"iou": 0.4 + k / 99}
    document["candidates"][0]["guard_metrics"] = {"iou": None}
    page = Page(html_report(document))
    chart = page.words[page.words.index("Candidates") : page.words.index("Coefficients")]
    assert {"guard iou", "test iou", "iou"} <= set(chart)
    assert not {"guard loss", "test loss", "loss"} & set(chart)
    assert document["candidates"][0]["name"] not in chart
    assert document["candidates"][1]["name"] in chart
    caption = next(words for words in chart if "decides nothing" in words)
    assert caption.startswith("The test iou decides nothing. Larger is better.")
    assert "intervals" not in caption
    for row in document["candidates"]:
        row["guard_metric_ci95"] = [0.1, 0.9]
    assert any("Bars are 95 % intervals" in words for words in Page(html_report(document)).words)


def test_what_the_fit_took_is_named_by_its_unit() -> None:
    words = Page(html_report(copy.deepcopy(DOCUMENT))).words
    assert words[words.index("passes over the fit data") + 1].endswith(" (lbfgs)")
    assert "cost, passes over the fit data" in words
    assert "evaluations" not in words


def test_a_candidate_beside_others_has_a_label_of_its_own() -> None:
    """As far apart as the stars are wide: names shared one label at the first of them."""
    named = {"last": [0.5, -0.3], "greedy": [0.5, -0.3], "twa": [0.62, -0.28], "uniform": [0, 0]}
    words = Page(html_report(copy.deepcopy(DOCUMENT), LANDSCAPE | {"candidates": named})).words
    assert {"last, greedy", "twa", "uniform"} <= set(words)


def test_the_fit_is_of_the_loss_and_the_ridge() -> None:
    document = copy.deepcopy(DOCUMENT)
    page = Page(html_report(document))
    assert "Loss on the fit data plus ridge/2 · |z|² at each evaluation." in page.text
    assert "fit loss + ridge" in page.words
    for stage in document["optimizer"]["stages"]:
        stage["ridge"] = 0.0
    page = Page(html_report(document))
    assert "Loss on the fit data at each evaluation." in page.text
    assert "fit loss + ridge" not in page.words


def test_the_page_shows_the_loss_that_decided() -> None:
    document = copy.deepcopy(DOCUMENT)
    assert "selection loss" not in html_report(document)
    for row in document["candidates"]:
        row["selection_loss"] = row["guard_loss"] + 0.125
    assert "selection loss" in html_report(document)
