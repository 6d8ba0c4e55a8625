"""What a person sees in the terminal: tables, bars, maps, live progress."""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from twa_merge_cli import console as consoles
from twa_merge_cli import figures, live, pictures, render

from twa_merge.document import leading_candidates
from twa_merge.model_card import model_card
from twa_merge.progress import Advanced, Evaluated, Noted, Started
from twa_merge.wording import verdict

DOCUMENT = json.loads((Path(__file__).parent / "documents" / "train.json").read_text())


@pytest.fixture
def train() -> dict[str, Any]:
    return copy.deepcopy(DOCUMENT)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(draw: Callable[[Console], None], **options: Any) -> str:
    """What ``draw`` leaves on a console of 100 columns."""
    file = io.StringIO()
    settings = {"width": 100, "markup": False, "emoji": False, "highlight": False, **options}
    draw(Console(file=file, **settings))
    return file.getvalue()


def train_text(document: dict[str, Any], **options: Any) -> str:
    return shown(lambda c: render.show_train(document, c, Path("merged")), **options)


def test_the_table_has_every_loss_and_marks_the_winner(train: dict[str, Any]) -> None:
    lines = train_text(train).splitlines()
    (winner,) = [line for line in lines if line.strip().startswith("> ")]
    twa = next(c for c in train["candidates"] if c["name"] == "twa")
    for key in ("fit_loss", "guard_loss", "test_loss"):
        assert f"{twa[key]:.4f}" in winner
    low, high = twa["guard_ci95"]
    assert f"{(high - low) / 2:.4f}" in winner
    assert "0.9100" in winner  # its test accuracy


def test_rows_are_ordered_by_guard_loss(train: dict[str, Any]) -> None:
    train["candidates"].append({"name": "twa-layers", "guard_loss": None, "coefficients": [1.0]})
    text = train_text(train)
    order = sorted(
        (c for c in train["candidates"] if c["guard_loss"] is not None),
        key=lambda c: c["guard_loss"],
    )
    places = [text.index(f" {c['name']} ") for c in [*order, {"name": "twa-layers"}]]
    assert places == sorted(places)


def test_what_decided_is_shown_and_orders_the_rows(train: dict[str, Any]) -> None:
    assert "selection loss" not in train_text(train)
    for k, row in enumerate(train["candidates"]):
        row["selection_loss"], row["selection_examples"] = 1.0 + k / 8, 99
    lines = train_text(train, width=120).splitlines()
    assert "selection loss" in lines[2]
    shown = [line for line in lines if any(f" {1.0 + k / 8:.4f} " in line for k in range(9))]
    names = [line.replace(">", " ").split()[0] for line in shown]
    assert names == [row["name"] for row in train["candidates"]]


# In the order in which they go.
COLUMNS = ("cost", "fit loss", "test iou", "guard iou", "+/- 95 %")


@pytest.mark.parametrize("width", range(20, 120))
def test_names_stay_and_no_figure_is_cut_where_the_terminal_is_narrow(
    train: dict[str, Any], width: int
) -> None:
    lines = train_text(train, width=width).splitlines()
    table = lines[2 : lines.index(next(line for line in lines if not line.strip() and line), 2)]
    names = {c["name"] for c in leading_candidates(train, 16)}
    assert names <= {line.replace(">", " ").split()[0] for line in table}
    assert not any("…" in line for line in table)
    if width >= 30:
        assert "guard loss" in table[0]


def test_a_table_loses_no_column_that_there_is_room_for(train: dict[str, Any]) -> None:
    whole = train_text(train, width=200).splitlines()[2].rstrip()
    assert train_text(train, width=len(whole) + 1).splitlines()[2].rstrip() == whole
    assert train_text(train, width=len(whole)).splitlines()[2].rstrip() != whole


def test_the_test_loss_goes_last_and_what_goes_is_named(train: dict[str, Any]) -> None:
    for k, row in enumerate(train["candidates"]):
        row["guard_metrics"], row["test_metrics"] = {"iou": 0.5 + k / 99}, {"iou": 0.5 + k / 99}
    gone: list[str] = []
    for width in range(200, 44, -1):
        lines = train_text(train, width=width).splitlines()
        assert "guard loss   " in lines[2] + "   "
        assert "test loss" in lines[2], width
        said = " ".join(line.strip() for line in lines).partition("left out for want of room: ")[2]
        gone += [c for c in COLUMNS if c in said[:70] and c not in gone]
        assert all((c in lines[2]) != (c in gone) for c in COLUMNS), width
    assert gone == list(COLUMNS)


def test_the_metric_that_decided_stays_longer_than_others(train: dict[str, Any]) -> None:
    for k, row in enumerate(train["candidates"]):
        row["guard_metrics"] = {"iou": 0.5 + k / 99, "f": 0.5}
    train["options"]["guard"]["select"] = "metric:iou"
    texts = [train_text(train, width=width) for width in range(200, 60, -1)]
    assert all("guard iou" in text.splitlines()[2] for text in texts)
    assert "guard f" not in texts[-1].splitlines()[2]


def test_a_wide_table_leaves_nothing_out(train: dict[str, Any]) -> None:
    assert "left out" not in train_text(train, width=120)


def test_the_cost_has_a_unit_where_it_is_shown(train: dict[str, Any]) -> None:
    assert "\ncost: passes over the fit data\n" in train_text(train, width=120)
    assert "passes over" not in train_text(train, width=50)


def test_long_names_are_folded_beside_their_figures() -> None:
    models = [{"path": "run/" + 60 * "a", "loss": 1.25, "ci95": [1.2, 1.3], "metrics": {"m": 0.5}}]
    document = {"examples": 12, "models": models}
    text = shown(lambda c: render.show_evaluation(document, c), width=30)
    assert "1.2500" in text
    assert text.count("a") > 60


def test_a_long_list_of_candidates_is_cut_but_keeps_the_named_ones(train: dict[str, Any]) -> None:
    for k in range(50):
        train["candidates"].append({"name": f"window:{k + 10}", "guard_loss": 0.5 + k / 100})
    text = train_text(train)
    assert "window:10 " in text
    assert "window:59 " not in text
    assert " last " in text
    assert " uniform " in text
    total = len(train["candidates"]) + len(train["other_candidates"])
    assert f"and {total - 16} more in twa_merge.json" in text


def test_the_verdict_is_in_plain_words(train: dict[str, Any]) -> None:
    assert "The best single checkpoint is checkpoint-250." in " ".join(train_text(train).split())
    sentence = "twa is better than the best single checkpoint by 0.0616 (95 % interval 0.0571 to"
    assert sentence in train_text(train)
    train["improvement"] |= {"mean": 0.0003, "ci95": [-0.001, 0.0015]}
    assert "within noise" in " ".join(train_text(train).split())
    train["improvement"] |= {"mean": -0.02, "ci95": [-0.03, -0.01]}
    worse = "twa is worse than the best single checkpoint by 0.0200 (95 % interval "
    assert f"{worse}0.0100 to 0.0300)." in " ".join(train_text(train).split())
    train["improvement"] |= {"mean": -0.02, "ci95": [-0.05, 0.01]}
    assert f"{worse}-0.0100 to 0.0500): within noise." in model_card(train)
    train["improvement"] |= {"mean": -0.02, "ci95": [-0.05, 0.0]}
    assert f"{worse}0.0000 to 0.0500): within noise." in verdict(train)
    train["improvement"] = {"over": "best_single", "mean": 0.0, "ci95": [0.0, 0.0]}
    train["chosen"] = "last"
    assert "No candidate beat the last checkpoint." in train_text(train)


@pytest.mark.parametrize(
    ("unit", "best", "last", "lead"),
    [
        (1e6, "1310400", "1395000", "84600"),
        (1e-6, "1.3104e-06", "1.3950e-06", "8.460e-08"),
        (1e8, "1.3104e+08", "1.3950e+08", "8460000"),
        (1e30, "1.3104e+30", "1.3950e+30", "8.460e+28"),
    ],
)
def test_losses_of_any_unit_are_told_apart(
    train: dict[str, Any], unit: float, best: str, last: str, lead: str
) -> None:
    rows = [
        {"name": "twa", "guard_loss": 1.3104 * unit, "guard_ci95": [1.25 * unit, 1.37 * unit]},
        {"name": "last", "guard_loss": 1.395 * unit, "guard_ci95": [1.33 * unit, 1.45 * unit]},
    ]
    gain = {"over": "last", "mean": 0.0846 * unit, "ci95": [0.07 * unit, 0.099 * unit]}
    train |= {"candidates": rows, "chosen": "twa", "improvement": gain}
    train["improvement_over_uniform"] = None
    text = train_text(train)
    assert best in text
    assert last in text
    assert f"better than the last checkpoint by {lead} (" in text
    assert best in model_card(train)


def columns(document: dict[str, Any]) -> dict[str, list[str]]:
    """Heading → cells of the candidates' table, top to bottom."""
    lines = [re.split(r"  +", line.strip()) for line in train_text(document, width=250).split("\n")]
    head, _, *body = lines[2:]
    rows = [line for line in body if len(line) == len(head)]
    return {name: [row[i] for row in rows] for i, name in enumerate(head)}


def test_a_table_has_places_enough_for_its_smallest_number(train: dict[str, Any]) -> None:
    for row in train["candidates"]:
        row["test_metrics"] = {"score": -row["guard_loss"], "accuracy": 0.98765}
        if row["name"] == "twa":
            row |= {"guard_loss": 4.441e-5, "test_metrics": {"score": -4.441e-5, "accuracy": 0.99}}
    found = columns(train)
    assert found["guard loss"][0] == "0.0000444"
    assert found["test score"][0] == "-0.0000444"
    assert found["test accuracy"][:2] == ["0.9900", "0.9877"]
    assert "0.0000444" in model_card(train)
    twa = next(row for row in train["candidates"] if row["name"] == "twa")
    twa["guard_loss"] = 4.441e-9
    assert columns(train)["guard loss"][0] == "4.44e-09"
    assert all("e-" in text or "e+" in text for text in columns(train)["guard loss"])


@pytest.mark.parametrize("smallest", [0.01, 0.2086])
def test_ordinary_tables_have_four_decimals(train: dict[str, Any], smallest: float) -> None:
    train["candidates"][0] |= {"guard_loss": smallest, "selection_loss": smallest}
    found = columns(train)
    for key in ("guard loss", "fit loss", "test accuracy"):
        assert all(re.fullmatch(r"\d\.\d{4}|-", text) for text in found[key])


def test_large_numbers_of_a_column_are_written_alike(train: dict[str, Any]) -> None:
    train["improvement"] |= {"mean": -3992979.0, "ci95": [-4017267.0, 13642440.0]}
    said = "by 3.993e+06 (95 % interval -1.3642e+07 to 4.017e+06): within noise."
    assert said in verdict(train)[0]
    for k, row in enumerate(train["candidates"]):
        row["guard_loss"] = row["selection_loss"] = 9.5e6 + 2e5 * k
    assert all("e+" in text for text in columns(train)["guard loss"])
    # What exploded alone leaves the others as they are.
    train["candidates"][-1]["guard_loss"] = 3.21e9
    for k, row in enumerate(train["candidates"][:-1]):
        row["guard_loss"] = row["selection_loss"] = 1.5 + k / 8
    assert columns(train)["guard loss"][0] == "1.5000"
    assert "3.21e+09" in columns(train)["guard loss"]


def test_an_evaluation_keeps_digits_as_well() -> None:
    models = [
        {"path": name, "loss": loss, "ci95": [loss, loss], "metrics": {"error": -loss}}
        for name, loss in (("a", 3.331e-4), ("b", 0.0545))
    ]
    text = shown(lambda c: render.show_evaluation({"examples": 12, "models": models}, c))
    assert "0.000333" in text.split()
    assert "-0.000333" in text.split()


def test_the_loss_that_decided_is_said_as_the_table_has_it(train: dict[str, Any]) -> None:
    rows = [
        {"name": "twa", "guard_loss": 2e-7, "selection_loss": 3.141e-7, "selection_examples": 90},
        {"name": "last", "guard_loss": 1e-7, "selection_loss": 4e-7, "selection_examples": 90},
    ]
    train |= {"candidates": rows, "chosen": "twa"}
    assert "its loss on 90 examples, 3.141e-07:" in " ".join(verdict(train))


def test_a_winner_that_the_guard_split_alone_would_not_pick_is_explained(
    train: dict[str, Any],
) -> None:
    assert "was picked by its loss on" not in train_text(train)
    for row in train["candidates"]:
        row |= {"selection_loss": 1.25, "selection_examples": 96}
        if row["name"] == "uniform":
            row["guard_loss"] = 0.01
    text = " ".join(train_text(train).split())
    assert "twa was picked by its loss on 96 examples, 1.2500" in text
    assert "On the guard split alone the uniform mean is best." in text
    # Without a cross-validation nothing but the guard split counted.
    train["data"]["guard_examples_used"] = 96
    assert "held out in turn" not in train_text(train)


def test_a_plain_winner_that_another_is_ahead_of_by_luck_is_explained(
    train: dict[str, Any],
) -> None:
    said = "has less loss than"
    assert said not in train_text(train)
    for row in train["candidates"]:
        row["selection_loss"] = 1.0 if row["name"] == "twa" else 1.5
    train["chosen"] = "ema:0.9"
    assert said not in train_text(train)
    train["passed_over"] = "twa"
    text = " ".join(train_text(train).split())
    assert "twa has less loss than ema:0.9 on the examples that decide, but is not" in text
    assert "ahead of the last checkpoint and the uniform mean by more than luck." in text
    train["candidates"] = [c for c in train["candidates"] if c["name"] != "uniform"]
    assert "ahead of the last checkpoint by more than luck." in " ".join(verdict(train))


def test_a_winner_by_a_metric_is_explained_by_it(train: dict[str, Any]) -> None:
    train["options"] = {"guard": {"select": "metric:accuracy"}}
    for k, row in enumerate(train["candidates"]):
        row |= {"selection_loss": 1.25, "selection_examples": 96}
        row["guard_metrics"] = {"accuracy": 0.9 if row["name"] == train["chosen"] else 0.1 * k}
    text = " ".join(train_text(train).split())
    assert "twa was picked by accuracy on the guard split, 0.9000." in text
    assert "0.0616 in accuracy (95 %" in text
    assert "guard accuracy" in text
    assert "+/- 95 %" not in text
    assert "picked by its loss" not in text
    assert leading_candidates(train, 3)[0]["name"] == "twa"
    for row in train["candidates"]:
        row["guard_metric_ci95"] = [0.8, 0.95]
    assert re.search(r"guard accuracy +\+/- 95 %", train_text(train, width=200))
    assert "0.0750" in train_text(train, width=200)
    card = model_card(train)
    assert "guard accuracy, 95 % interval" in card
    assert "| 0.8000 to 0.9500 |" in card
    assert "picked by accuracy on the guard data" in card
    assert "| candidate | guard accuracy |" in card


def test_the_smallest_loss_of_a_table_keeps_three_digits(train: dict[str, Any]) -> None:
    for row in train["candidates"]:
        row["guard_metrics"] = {"error": -1e-4 * row["guard_loss"], "accuracy": 0.98765}
        if row["name"] == "twa":
            row["guard_loss"] = row["selection_loss"] = 0.000333
    assert "0.000333" in train_text(train, width=200)
    assert "0.000333" in model_card(train)
    assert "0.9877" in train_text(train, width=250)
    assert "-0.0001 " not in train_text(train, width=250)


def test_few_examples_are_said_to_be_too_few(train: dict[str, Any]) -> None:
    train["improvement"] |= {"certain": False, "enough": False, "examples": 3}
    assert "of 3 examples: too few, within noise." in " ".join(train_text(train).split())
    train["improvement"] |= {"examples": 60, "groups": 5}
    assert "of 60 examples in 5 groups: too few, within noise." in verdict(train)[0]
    train["improvement"] |= {"ci95": [None, None], "groups": 1}
    assert "by 0.0616, of 60 examples in 1 group: too few, within noise." in verdict(train)[0]


def test_coefficients_that_are_not_the_whole_model_say_so(train: dict[str, Any]) -> None:
    assert "they add up to" not in train_text(train)
    train["coefficients"]["random"] = {"values": [0.1, 0.2]}
    assert "they add up to 1; 2 random directions are added" in train_text(train)


def test_an_interval_without_width_is_not_taken_for_certainty(train: dict[str, Any]) -> None:
    train["improvement"] |= {"mean": 0.5, "ci95": [0.5, 0.5], "certain": False}
    assert "every example says the same" in " ".join(verdict(train))


def test_a_blend_says_what_it_is_made_of(train: dict[str, Any]) -> None:
    assert "is a mean of candidates" not in train_text(train)
    chosen = next(row for row in train["candidates"] if row["name"] == train["chosen"])
    chosen |= {"name": "blend", "blend_of": {"last": 0.004, "uniform": 0.336, "twa": 0.66}}
    train["chosen"] = "blend"
    text = " ".join(train_text(train).split())
    assert "blend is a mean of candidates: 66% twa, 34% the uniform mean." in text
    chosen["blend_of"] = {"last": 0.008, "greedy": 0.008, "uniform": 0.33, "twa": 0.654}
    assert "65% twa, 33% the uniform mean and 2% others." in " ".join(verdict(train))
    assert "ahead of it" not in text
    train["passed_over"] = "uniform"
    text = " ".join(train_text(train).split())
    assert "The uniform mean alone is ahead of it by less than one standard error" in text


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ({"last": 1 / 3, "uniform": 1 / 3, "twa": 1 / 3}, [34, 33, 33]),
        ({"last": 0.204, "uniform": 0.204, "twa": 0.204, "greedy": 0.194, "wsm": 0.194}, None),
        ({"last": 0.008, "greedy": 0.008, "uniform": 0.33, "twa": 0.654}, [65, 33, "others", 2]),
        ({"last": 0.004, "uniform": 0.336, "twa": 0.66}, [66, 34]),
        ({"last": 0.335, "twa": 0.665}, None),
    ],
)
def test_the_parts_of_a_blend_add_up(
    train: dict[str, Any], shares: dict[str, float], said: list[int | str] | None
) -> None:
    chosen = next(row for row in train["candidates"] if row["name"] == train["chosen"])
    chosen |= {"name": "blend", "blend_of": shares}
    train["chosen"] = "blend"
    text = next(s for s in verdict(train) if "is a mean of candidates" in s)
    percents = [int(number) for number in re.findall(r"(\d+)%", text)]
    assert sum(percents) == 100
    if said:
        assert percents == [number for number in said if number != "others"]
        assert ("others" in text) == ("others" in said)


def test_whose_running_statistics_were_replaced_is_said(train: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in train["candidates"]}
    for row in rows.values():
        row["batch_norm"] = "reestimate"
    rows["last"]["batch_norm"] = "average"
    train["chosen"] = "twa"
    said = "The running statistics of batch norm in twa were re-estimated on fit examples."
    assert said in verdict(train)
    note = "best_single: running statistics re-estimated on fit examples instead of those saved"
    assert note in train_text(train)
    assert "last: running" not in train_text(train)
    assert note.replace("_", "\\_") in model_card(train)
    rows["last"]["batch_norm"] = "newest"
    rows["best_single"]["batch_norm"] = "average"
    assert "of those saved" not in train_text(train), "the last checkpoint's are the newest"


def test_many_blocks_are_cut_to_those_that_moved_most(train: dict[str, Any]) -> None:
    rows = {f"layers.{i:02}": [0.2, 0.2, 0.2, 0.2, 0.2 + i / 100] for i in range(40)}
    train["coefficients"]["blocks"] = rows
    train["coefficients"]["global"] = [0.2] * 5
    train["candidates"].append({"name": "twa-layers", "guard_loss": 1.0, "coefficients": rows})
    train["chosen"] = "twa-layers"
    text = train_text(train)
    assert "layers.39" in text
    assert "layers.23" not in text
    assert "and 24 blocks that moved less" in text


def test_coefficients_are_those_of_the_winner(train: dict[str, Any]) -> None:
    text = train_text(train)
    for label, value in zip((50, 100, 150, 200, 250), (0.05, -0.1, 0.25, 0.3, 0.5), strict=True):
        (line,) = [s for s in text.splitlines() if s.startswith(f"  checkpoint-{label} ")]
        assert f"{value:+.4f}" in line
    train["chosen"] = "uniform"
    text = train_text(train)
    assert text.count(" 0.2000 ") == 5


def test_blocks_become_a_map(train: dict[str, Any]) -> None:
    rows = {"layers.0": [1.0, 0.0, 0.0, -1.0, 1.0], "layers.1": [0.2, 0.2, 0.2, 0.2, 0.2]}
    train["coefficients"]["blocks"] = rows
    train["candidates"].append({"name": "twa-layers", "guard_loss": 1.0, "coefficients": rows})
    train["chosen"] = "twa-layers"
    lines = train_text(train).splitlines()
    (first,) = [line for line in lines if line.startswith("  layers.0")]
    assert first.rstrip().endswith(" █    -█ █")
    assert any(line.startswith("  layers.1") for line in lines)


def test_names_from_files_are_literal(train: dict[str, Any]) -> None:
    train["checkpoints"][0]["path"] = "run/[bold red]x[/]:smile:\x1b[31m\nnew"
    train["candidates"][0]["name"] = "[link=http://x]last"
    text = train_text(train, force_terminal=True, no_color=True)
    assert "[link=http://x]last" in text
    assert r"]:smile:\x1b[31m\nnew" in text
    assert "\x1b[31m" not in text


def test_no_color_leaves_no_colour(train: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = train_text(train, force_terminal=True)
    assert "\x1b[34m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[34m" not in train_text(train, force_terminal=True)


def test_evaluation() -> None:
    models = [
        {"path": "a[b]", "loss": 1.25, "ci95": [1.2, 1.3], "metrics": {"accuracy": 0.5}},
        {"path": "b", "loss": None, "ci95": [None, None], "metrics": {}},
    ]
    document = {"examples": 12, "models": models}
    text = shown(lambda c: render.show_evaluation(document, c))
    assert [line.split() for line in text.splitlines() if line.strip()][2:] == [
        ["a[b]", "1.2500", "0.0500", "0.5000"],
        ["b", "-", "-", "-"],
        ["12", "examples"],
    ]


def test_average_shows_the_effective_coefficients() -> None:
    document = {
        "method": "average",
        "checkpoints": [{"path": "r/c-1", "step": 1}, {"path": "r/c-2", "step": 2}],
        "coefficients": {"global": [0.25, 0.75]},
        "timings": {"open": 1.0, "write": 64.0},
    }
    text = shown(lambda c: render.show_average(document, c, Path("out")))
    assert "c-1  0.2500" in text
    assert "c-2  0.7500" in text
    assert "Written to out in 1:05" in text


def inspection() -> dict[str, Any]:
    return {
        "checkpoints": [
            {"path": f"run/c-{i}", "step": i or None, "format": "pickle", "bytes": 2_500_000,
             "tensors": 4}
            for i in range(3)
        ],
        "tensors": {
            "averaged": 3,
            "copied": 1,
            "tied": 0,
            "statistics": 0,
            "by_dtype": {"float32": {"tensors": 4, "parameters": 1_500, "bytes": 6_000}},
        },
        "parameters": 1_234_567,
        "differences": ["A tensor is missing.\n  tensor: x[red]"],
        "geometry": {
            "distances": [[0.0, 1.0, 4.0], [1.0, 0.0, 3.0], [4.0, 3.0, 0.0]],
            "cosines": [[1.0, 0.5, -1.0], [0.5, 1.0, -0.25], [-1.0, -0.25, 1.0]],
            "distance_to_mean": [1.0, 1.5, 2.0],
            "norms": [10.0, 11.0, 12.0],
            "spectrum": [0.75, 0.25, 0.0],
            "rank": 2,
            "orthogonality_error": 1.5e-12,
        },
        "plan": {
            "fits": False,
            "bytes_per_rank": {"offsets": 16_000_000_000},
            "expected_minutes": 2.5,
            "advice": ["give [--store disk]"],
        },
    }  # fmt: skip


def test_inspection() -> None:
    text = shown(lambda c: render.show_inspection(inspection(), c))
    lines = [line.rstrip() for line in text.splitlines()]
    assert "1.23 M parameters; tensors: 3 averaged, 1 copied" in lines
    assert "cosine of offsets" in text
    assert "difference: A tensor is missing.; tensor: x[red]" in lines
    assert "  c-0    ░░██" in lines
    assert "  c-1  ░░  ▓▓" in lines
    assert "rank 2 from 3 checkpoints; the basis is orthonormal within 1.5e-12" in lines
    assert any("0.7500" in line and "█" in line for line in lines)
    assert not any("direction 3" in line for line in lines)
    assert any(line.split() == ["offsets", "16", "GB"] for line in lines)
    assert any(line.split()[:3] == ["expected", "time", "2:30,"] for line in lines)
    assert "  advice: give [--store disk]" in lines


def test_bars_share_one_axis() -> None:
    lines = pictures.bars(["a", "bb"], [-0.5, 1.0], width=50, ascii_only=True)
    text = [line.plain for line in lines]
    axis = text[0].index("|")
    assert text[1][axis] == "|"
    assert text[0].count("=") * 2 == pytest.approx(text[1].count("#"), abs=2)
    assert text[0][:axis].endswith("=")
    assert "#" not in text[0]
    assert all(len(line) <= 50 for line in text)


def test_bars_of_zeros_do_not_fail() -> None:
    assert [line.plain.strip() for line in pictures.bars(["a"], [0.0], width=40, ascii_only=False)]


def test_a_map_wider_than_the_terminal_shows_every_kth_and_the_newest() -> None:
    rows = [[0.0] * 99 + [1.0]]
    lines = pictures.signed_map(["row"], rows, width=60, ascii_only=True)
    assert len(lines[0].plain) <= 60
    assert lines[0].plain.endswith(" #")
    assert "every 4. one is shown" in lines[1].plain


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1_500, "1.5 kB"), (999_700, "1 MB"), (8e10, "80 GB"),
     (3e15, "3e+03 TB")],
)  # fmt: skip
def test_size(value: float, text: str) -> None:
    assert figures.size(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59, "59 s"), (245, "4:05"), (3729, "1:02:09")]
)
def test_duration(seconds: float, text: str) -> None:
    assert figures.duration(seconds) == text


def test_number_has_no_minus_zero() -> None:
    assert figures.number(-0.00001) == "0.0000"
    assert figures.number(None) == "-"
    # A loss that exploded must not push the others out of the table.
    assert figures.number(10632962605989232.0) == "1.06e+16"
    assert figures.number(float("nan")) == "nan"


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.21, "3.2100"), (0.0032, "0.0032000"), (2.04e-7, "2.040e-07"), (2357123.4, "2357123")],
)
def test_losses_are_told_apart_while_they_go_by(value: float, text: str) -> None:
    assert figures.loss(value) == text


def story(narrator: live.Narrator) -> None:
    with narrator as tell:
        tell(Started("Reading [x]\x1b[5m", 3_000_000, "numbers"))
        for _ in range(3000):
            tell(Advanced(1000))
        tell(Noted("A [note]."))
        tell(Started("Training coefficients", None, "evaluations"))
        for number in range(7, 12):
            tell(Evaluated(number, 2.0 / number, 2.0 / number))


def test_a_log_gets_few_lines() -> None:
    text = shown(lambda c: story(live.LineNarrator(c)))
    assert [line.rsplit("  ", 1)[0] for line in text.splitlines()] == [
        "note: A [note].",
        r"Reading [x]\x1b[5m  3 M/3 M numbers",
        "Training coefficients  5 evaluations  least loss + ridge 0.1818",
    ]


def test_the_best_of_one_fit_is_not_shown_beside_the_loss_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stage fits many folds and ridges in turn: the least of one rose from line to line."""
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    with live.LineNarrator(Console(file=file, width=100)) as tell:
        tell(Started("Training", None, "evaluations"))
        for number, best in ((1, 1.5), (2, 1.2), (3, 1.7), (4, 1.4)):
            now[0] += 20.0
            tell(Evaluated(number, 2.0, best))
    *lines, last = file.getvalue().splitlines()
    assert lines == [f"Training  {k} evaluations  loss + ridge 2.0000" for k in range(1, 5)]
    assert "least loss + ridge 1.4000" in last


def test_a_fit_says_how_long_it_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the newest evaluations, as those of larger samples take longer."""
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    stage = live.Stage(Started("Training", None, "evaluations"))
    for number in range(1, 31):
        now[0] += 1.0
        stage.take(Evaluated(number, 2.0, 2.0, 100 - number))
    assert stage.figures()[-1] == "up to about 1:10 left"
    assert stage.share == pytest.approx(0.3)
    for number in range(31, 51):
        now[0] += 4.0
        stage.take(Evaluated(number, 2.0, 2.0, 100 - number, growing=True))
    assert stage.figures()[-1] == "up to about 3:20 left with this sample"
    stage.take(Evaluated(51, 2.0, 2.0, 0))
    assert "left" not in " ".join(stage.figures())
    assert "left" not in stage.last_line()


def test_a_slow_stage_reports_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    with live.LineNarrator(Console(file=file, width=100)) as tell:
        tell(Started("Training", 3600, "steps"))
        for _ in range(3600):
            now[0] += 1.0
            tell(Advanced())
    lines = file.getvalue().splitlines()
    assert 20 < len(lines) < 60
    assert lines[0] == "Training  10/3600 steps  59:50 left"
    assert lines[-1] == "Training  3600/3600 steps  1:00:00"


def test_a_terminal_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    file = Terminal()
    console = Console(file=file, width=100, markup=False, highlight=False)
    narrator = live.live_progress(console)
    assert isinstance(narrator, live.TerminalNarrator)
    story(narrator)
    assert "least loss + ridge 0.1818" in file.getvalue()
    assert "\x1b[5m" not in file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_line_of_a_fit_is_said_to_its_end(width: int) -> None:
    console = Console(file=Terminal(), width=width, markup=False)
    narrator = live.TerminalNarrator(console)
    narrator(Started("Training twa-tensors", None, "evaluations"))
    narrator(Evaluated(1, 1.3282, 1.3282, 200))
    assert narrator.stage is not None
    narrator.stage._pace = 10.0
    line = narrator._draw()
    assert "loss + ridge 1.3282  up to about" in line.plain
    assert line.plain.endswith("left")
    assert len(line.plain) <= width
    assert ("─" in line.plain) is (width > 80)


@pytest.mark.parametrize("name", ["dumb", "log", "quiet"])
def test_anything_else_is_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb" if name == "dumb" else "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO() if name == "log" else Terminal()
    console = Console(file=file, quiet=name == "quiet")
    assert isinstance(live.live_progress(console), live.LineNarrator)


def test_the_console_takes_text_literally(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[bold]x[/] :smile: 'quoted' 12"
    for stderr in (False, True):
        consoles.make_console(stderr=stderr).print(text)
    assert capsys.readouterr() == (text + "\n", text + "\n")


def test_only_rank_zero_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        consoles.make_console().print(f"from {rank}")
        consoles.write_json({"rank": rank})
    assert capsys.readouterr().out == 'from 0\n{\n  "rank": "0"\n}\n'
    # Left behind in a shell: this process is alone.
    monkeypatch.delenv("WORLD_SIZE")
    consoles.make_console().print("alone")
    assert capsys.readouterr().out == "alone\n"
