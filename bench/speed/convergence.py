"""Evaluations until the fit loss is within 1e-4 of its optimum, without a learning rate.

    python bench/speed/convergence.py --folder FOLDER

For each seed the run of `twa-merge demo` is trained (a minute or two, kept in the folder). L-BFGS
then minimises the fit loss over the coordinates of the whole model, from where `twa-merge train`
starts and with its settings, but for the tolerance: it goes on for many times longer, and the best
that it finds counts as the optimum. What is counted are the evaluations (each of loss and gradient
over the whole fit split, those of the line search among them) up to the first whose loss is within
1e-4 of that optimum.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from processes import machine

from twa_merge.checkpoints import open_checkpoints
from twa_merge.choices import Choices
from twa_merge.clock import Clock
from twa_merge.config import DataConfig
from twa_merge.demo import train_run
from twa_merge.distributed import World
from twa_merge.layout import make_layout
from twa_merge.objective import Objective
from twa_merge.optimize import FitResult, lbfgs
from twa_merge.progress import silent
from twa_merge.resume import EvaluationLog
from twa_merge.run import Run, set_up
from twa_merge.subspace import Chart, make_subspace
from twa_merge.task import split
from twa_merge.tasks.byte_lm import ByteTask, Text, standard_library_text

WITHIN, DEMANDED = 1e-4, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where runs are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=256, help="of 128 bytes, in the fit split")
    parser.add_argument("--ridges", type=float, nargs="+", default=[0.0, 0.001, 0.01])
    parser.add_argument("--most", type=int, default=80, help="evaluations of the long fit")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    print(
        f"demo's byte-level run; {options.sequences} sequences of 128 bytes to fit; torch "
        f"{torch.__version__}, {options.threads} threads; the optimum: best of at most "
        f"{options.most} evaluations"
    )
    print(f"{'seed':>4} {'ridge':>7} {'start':>9} {'optimum':>9} {'within 1e-4 after':>18}")
    text, counts = standard_library_text(), []
    for seed in range(options.seeds):
        run = prepare(options.folder / f"demo-{seed}", text, seed, options.sequences)
        for ridge in options.ridges:
            result = long_fit(run, ridge, options.most)
            count = evaluations(result)
            counts.append(count)
            print(
                f"{seed:4} {ridge:7g} {result.trace[0][1]:9.5f} {result.loss:9.5f} {count:18}"
                + ("" if result.converged else f"  (not converged after {len(result.trace)})"),
                flush=True,
            )
    print(f"at most {max(counts)} evaluations (demanded: {DEMANDED})")


def prepare(folder: Path, text: Text, seed: int, sequences: int) -> Run:
    """Model, store and batches as ``twa-merge train`` sets them up."""
    if not (folder / "complete").exists():
        train_run(folder, seed=seed, text=text)
        (folder / "complete").touch()
    checkpoints = open_checkpoints([folder])
    fraction = DataConfig().guard_fraction
    task = ByteTask(text.held_out, sequences=round(sequences / (1 - fraction)), seed=seed)
    with tempfile.TemporaryDirectory() as state:
        return set_up(
            checkpoints, make_layout(checkpoints), task, split(task, fraction, seed), World(),
            Choices(), EvaluationLog(Path(state) / "out.partial", {}, World()), Clock(), silent,
        )  # fmt: skip


def long_fit(run: Run, ridge: float, most: int) -> FitResult:
    batches = run.fitter.batches
    objective = Objective(
        run.engine,
        Chart(run.fitter.start(run.n), [make_subspace(run.grams.exact.sum(0))]),
        batches,
        range(batches.size),
        ridge,
    )
    zero = torch.zeros(objective.chart.size, dtype=torch.float64)
    return lbfgs(objective, zero, max_evaluations=most, tolerance=1e-8)


def evaluations(result: FitResult) -> int:
    """How many it took to come within 1e-4 of the best."""
    return next(k for k, loss in result.trace if loss <= result.loss + WITHIN)


if __name__ == "__main__":
    main()
