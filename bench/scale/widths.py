"""Quality of the trained merge by the width of the offsets it was trained on.

    python bench/scale/widths.py --folder FOLDER

A byte-level language model is trained for a minute (made once and kept). Both stages of the fit,
one set of coefficients and one a tensor, are then trained with each width of the store. Whatever
the width, the coefficients are applied to the original checkpoints, as the written model's are. The
loss is that of the test part, which nothing was chosen on. Ridge and tolerance are the same for
all, and every fit goes on until it converges: two fits that are stopped early differ by where they
were stopped.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from launched import machine, mb
from torch import Tensor

from twa_merge.checkpoints import open_checkpoints
from twa_merge.choices import Choices
from twa_merge.clock import Clock
from twa_merge.config import EngineConfig, FitConfig, Selection, StoreConfig
from twa_merge.demo import task, train_run
from twa_merge.distributed import World
from twa_merge.layout import make_layout
from twa_merge.objective import Engine
from twa_merge.progress import silent
from twa_merge.resume import EvaluationLog
from twa_merge.run import Run, set_up
from twa_merge.store import make_store
from twa_merge.stream import row_slices
from twa_merge.subspace import Chart, make_subspace
from twa_merge.task import split

DEMANDED = {"int8": 0.0001, "int4": 0.0005}
RIDGE, TOLERANCE, SEQUENCES = 0.001, 1e-6, 192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--widths", nargs="+", default=["int8", "int4", "int1"])
    parser.add_argument("--run", type=Path, help="checkpoints of such a run that are there already")
    parser.add_argument("--every", type=int, help="K-th checkpoint of it only")
    parser.add_argument("--evaluations", type=int, default=60, help="of a stage, at most")
    options = parser.parse_args()
    folder = options.run or options.folder / f"demo-{options.steps}-{options.checkpoints}"
    if not folder.is_dir():
        train_run(folder, steps=options.steps, checkpoints=options.checkpoints)
    selection = Selection(last=options.checkpoints, every=options.every)
    print(machine())
    print("store    | MB held | seconds | test loss: one set of coefficients | one a tensor")
    exact: list[float] = []
    for width in ["float32", *options.widths]:
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as state:
            run = prepare(folder, selection, width, Path(state), options.evaluations)
            alphas = fit(run)
        took = time.perf_counter() - begun
        losses = [test_loss(run, a) for a in alphas]
        exact = exact or losses
        demanded = f"  (demanded: {DEMANDED[width]})" if width in DEMANDED else ""
        cells = [f"{loss:.5f} ({loss - e:+.5f})" for loss, e in zip(losses, exact, strict=True)]
        print(
            f"{width:8} | {mb(run.engine.store.nbytes):>7} | {took:7.1f} | "
            f"{cells[0]:>20} | {cells[1]:>20}{demanded}",
            flush=True,
        )


def prepare(folder: Path, selection: Selection, width: str, state: Path, evaluations: int) -> Run:
    """A run as ``twa-merge train`` sets it up."""
    checkpoints = open_checkpoints([folder], selection)
    chosen = task(sequences=SEQUENCES)
    choices = Choices(
        fit=FitConfig(
            blocks="tensors", ridge=RIDGE, max_evaluations=evaluations, tolerance=TOLERANCE
        ),
        store=StoreConfig("device", width),
        engine=EngineConfig(device="cpu"),
    )
    splits = split(chosen, choices.data.guard_fraction, choices.data.seed, None)
    log = EvaluationLog(state / "out.partial", {}, World(), fresh=True)
    return set_up(
        checkpoints, make_layout(checkpoints), chosen, splits, World(), choices, log, Clock(),
        silent,
    )  # fmt: skip


def fit(run: Run) -> list[Tensor]:
    """Coefficients of the two stages: (1, n) and (B, n)."""
    whole = run.fitter.stage(
        "twa", Chart(run.fitter.start(run.n), [make_subspace(run.grams.exact.sum(0))])
    )
    subspaces = [make_subspace(gram) for gram in run.grams.by_block(run.blocks)]
    base = whole.alphas.expand(len(run.blocks), -1).clone()
    return [whole.alphas, run.fitter.stage("twa-tensors", Chart(base, subspaces)).alphas]


def test_loss(run: Run, alphas: Tensor) -> float:
    """Of Σ α_i w_i from the files themselves."""
    files = make_store(
        run.checkpoints, run.layout, run.blocks, World(), StoreConfig("disk", "auto")
    )
    for cut in row_slices(run.layout, run.engine.store.names):
        files.put(cut, torch.empty(0), torch.empty(0))
    exact = Engine(run.engine.live, files, run.blocks, run.task, World())
    exact.set_weights(alphas)
    assert run.jury.test is not None
    losses, _ = exact.example_losses(run.jury.test, range(run.jury.test.size))
    return float(losses.mean())


if __name__ == "__main__":
    main()
