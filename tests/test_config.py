"""What is wrong with a choice or an argument is said in the library's own errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from runs import LinearTask, save_run

from twa_merge import average, evaluate, inspect, merge
from twa_merge.config import (
    DataConfig,
    EngineConfig,
    FitConfig,
    GuardConfig,
    OutputConfig,
    Selection,
    StoreConfig,
)
from twa_merge.errors import ConfigError


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (Selection, "last", "3"),
        (Selection, "from_step", 2.5),
        (DataConfig, "seed", None),
        (DataConfig, "batch_size", None),
        (DataConfig, "batch_size", True),
        (DataConfig, "guard_fraction", "0.5"),
        (FitConfig, "max_evaluations", "5"),
        (FitConfig, "tolerance", None),
        (FitConfig, "ridge", "auto"),
        (FitConfig, "start", 5),
        (FitConfig, "subspace", None),
        (FitConfig, "blocks", None),
        (StoreConfig, "kind", []),
        (GuardConfig, "candidates", None),
        (GuardConfig, "select", None),
        (GuardConfig, "require_improvement", "no"),
        (OutputConfig, "dtype", 3),
        (EngineConfig, "device", 0),
    ],
)
def test_values_of_a_wrong_type_are_refused(
    kind: Callable[..., object], name: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=f"{name} is of another type") as caught:
        kind(**{name: value})
    assert caught.value.details["found"] == repr(value)


@pytest.mark.parametrize("given", [{"fit": {"ridge": 1.0}}, {"guard": "quick"}])
def test_choices_of_another_class_are_refused(given: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="of another class") as caught:
        merge([tmp_path / "run"], LinearTask(), tmp_path / "out", **given)
    assert caught.value.details["expected"] in ("FitConfig", "GuardConfig")


def test_numbers_of_every_library_are_numbers() -> None:
    assert DataConfig(batch_size=np.int64(4), guard_fraction=np.float32(0.5)).batch_size == 4
    assert FitConfig(ridge=1, tolerance=0).ridge == 1
    # They are written down as JSON, and seed generators that take Python's own alone.
    assert type(DataConfig(seed=np.int64(3)).seed) is int
    assert type(FitConfig(ridge=np.float32(0.5)).ridge) is float


@pytest.mark.parametrize("weights", [[0.25, 0.75], (0.25, 0.75), np.array([0.25, 0.75])])
def test_weights_may_be_numbers(tmp_path: Path, weights: object) -> None:
    save_run(tmp_path / "run", LinearTask().states(2))
    document = average([tmp_path / "run"], tmp_path / "m", weights=weights)  # type: ignore[arg-type]
    assert document["coefficients"]["global"] == [0.25, 0.75]
    assert document["weights"] == "0.25,0.75"


@pytest.mark.parametrize("weights", [5, None, ["a", "b"], [[0.5], [0.5]], [], [0.5, 0.6]])
def test_weights_that_are_none_are_refused(tmp_path: Path, weights: object) -> None:
    save_run(tmp_path / "run", LinearTask().states(2))
    with pytest.raises(ConfigError):
        average([tmp_path / "run"], tmp_path / "m", weights=weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [5, [5], None, [None]])
def test_what_is_no_path_is_refused(tmp_path: Path, given: object) -> None:
    for command in (
        lambda: inspect(given),  # type: ignore[arg-type]
        lambda: average(given, tmp_path / "m"),  # type: ignore[arg-type]
        lambda: evaluate(given, LinearTask()),  # type: ignore[arg-type]
        lambda: merge(given, LinearTask(), tmp_path / "m"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match="paths"):
            command()


def test_no_models_are_nothing_to_evaluate() -> None:
    with pytest.raises(ConfigError, match="No models"):
        evaluate([], LinearTask())


def test_one_path_is_one_model(tmp_path: Path) -> None:
    save_run(tmp_path / "run", LinearTask().states(2))
    document = evaluate(str(tmp_path / "run"), LinearTask())
    assert len(document["models"]) == 2


def test_paths_may_come_one_by_one(tmp_path: Path) -> None:
    paths = save_run(tmp_path / "run", LinearTask().states(3))
    quick = GuardConfig(candidates="uniform")
    document = merge(iter(paths), LinearTask(), tmp_path / "m", guard=quick)  # type: ignore[arg-type]
    assert len(document["checkpoints"]) == 3
