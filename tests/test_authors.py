"""The authors' algorithm that the benchmarks compare with."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from runs import LinearTask, save_run

from twa_merge.checkpoints import open_checkpoints
from twa_merge.task import split

_PATH = Path(__file__).parents[1] / "bench" / "quality" / "authors.py"


@pytest.fixture(scope="module")
def authors():
    spec = importlib.util.spec_from_file_location("bench_authors", _PATH)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "bench_authors", module)
        spec.loader.exec_module(module)
        yield module


def test_gram_schmidt_spans_the_raw_weights(authors):
    weights = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    basis = authors.gram_schmidt(weights)
    assert authors.orthogonality_error(basis) < 1e-6
    inside = weights @ basis.T @ basis
    assert torch.allclose(inside, weights, atol=1e-5)
    # The first direction is the first checkpoint itself: nothing was centred.
    assert torch.allclose(basis[0], weights[0] / weights[0].norm())


def test_gram_schmidt_loses_orthogonality_on_nearly_parallel_weights(authors):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1, 5000, generator=generator)
    weights = weights + 1e-4 * torch.randn(20, 5000, generator=generator)
    assert authors.orthogonality_error(authors.gram_schmidt(weights)) > 1e-3


def test_the_training_comes_close_to_the_optimum_in_the_linear_span(tmp_path, authors):
    task = LinearTask(examples=200)
    states = task.states(6)
    save_run(tmp_path / "run", states)
    checkpoints = open_checkpoints([tmp_path / "run"])
    data = split(task, 0.25, 0)
    settings = authors.Settings(
        learning_rates=(1e-6, 0.01, 1e6), epochs=30, starts=("mean", "last")
    )
    found = authors.authors_twa(checkpoints, task, data.fit, data.guard, settings)
    assert found.learning_rate == 0.01
    assert found.passes == 30 * 6
    assert found.guard_loss == min(v for v in found.trials.values() if v == v)
    model = task.build_model()
    model.load_state_dict(found.state)
    x, y = (torch.stack(part) for part in zip(*data.guard, strict=True))
    with torch.no_grad():
        assert float(task.loss(model, (x, y)).mean()) == pytest.approx(found.guard_loss, rel=1e-5)
    assert found.guard_loss == pytest.approx(best_in_span(states, data), rel=0.1)


def best_in_span(states, data):
    """Guard loss of the least-squares fit within the span of the weights, in float64."""
    x, y = (torch.stack(part).double() for part in zip(*data.fit, strict=True))

    def outputs(state, x):
        return x @ state["0.weight"].double().T + state["0.bias"].double()

    columns = torch.stack([outputs(s, x).flatten() for s in states], 1)
    solution = torch.linalg.lstsq(columns, y.flatten()[:, None]).solution[:, 0]
    x, y = (torch.stack(part).double() for part in zip(*data.guard, strict=True))
    fitted = sum(a * outputs(s, x) for a, s in zip(solution, states, strict=True))
    return float((fitted - y).square().sum(1).mean())
