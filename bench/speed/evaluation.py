"""One evaluation of the fit against the plain forward and backward passes over the same batches.

    python bench/speed/evaluation.py --folder FOLDER

An evaluation is all that the optimizer asks for at one point: coefficients to weights (combine),
forward and backward passes of all batches, gradient to coordinates (project). Both in one process,
in turn, set up as `twa-merge train` does it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from processes import machine, spread
from runs import byte_run

from twa_merge.checkpoints import open_checkpoints
from twa_merge.choices import Choices
from twa_merge.clock import Clock
from twa_merge.config import DataConfig, StoreConfig
from twa_merge.distributed import World
from twa_merge.layout import make_layout
from twa_merge.objective import Objective
from twa_merge.progress import silent
from twa_merge.resume import EvaluationLog
from twa_merge.run import Run, set_up
from twa_merge.subspace import Chart, make_subspace
from twa_merge.task import Splits, to_device
from twa_merge.tasks.byte_lm import ByteConfig, ByteTask, standard_library_text

DEMANDED = 1.15


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    config = ByteConfig(options.width, options.layers, options.width // 32, 128)
    paths = byte_run(
        options.folder / f"bytes-{options.width}x{options.layers}", options.checkpoints, config
    )
    with tempfile.TemporaryDirectory() as state:
        run = prepare(paths, config, options, Path(state))
    objective = Objective(
        run.engine,
        Chart(run.fitter.start(run.n), [make_subspace(run.grams.exact.sum(0))]),
        run.fitter.batches,
        range(options.sequences),
    )
    z = torch.zeros(objective.chart.size, dtype=torch.float64)
    parts = Parts(run)
    plain: list[tuple[float, float]] = []
    ours: list[tuple[float, float]] = []
    for repetition in range(-1, options.repetitions):
        # Another point each time, as in a fit: nothing can be remembered.
        z += 0.01
        parts.seconds.clear()
        both = timed(partial(plain_passes, run, objective)), timed(partial(objective, z))
        if repetition >= 0:
            plain.append(both[0])
            ours.append(both[1])
            parts.keep()
    report(options, run, plain, ours, parts)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=64, help="of 128 bytes, in the fit split")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--store-dtype", default="auto")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def prepare(paths: list[Path], config: ByteConfig, options: argparse.Namespace, state: Path) -> Run:
    """Model, store and batches as ``twa-merge train`` sets them up."""
    checkpoints = open_checkpoints(paths)
    text = standard_library_text()
    task = ByteTask(text.held_out, config=config, sequences=2 * options.sequences)
    data = task.dataset()
    fit, guard = torch.utils.data.random_split(data, [0.5, 0.5])
    choices = Choices(
        data=DataConfig(batch_size=options.batch_size, sample=options.sequences),
        store=StoreConfig(dtype=options.store_dtype),
    )
    log = EvaluationLog(state / "out.partial", {}, World())
    return set_up(
        checkpoints, make_layout(checkpoints), task, Splits(fit, guard), World(), choices, log,
        Clock(), silent,
    )  # fmt: skip


def plain_passes(run: Run, objective: Objective) -> float:
    """What training would do on the same batches with the same model, without an optimizer."""
    module, task = run.engine.live.module, run.engine.task
    module.zero_grad()
    total = 0.0
    for _, batch, _ in objective.batches.rounds(objective.chosen):
        own = to_device(batch, run.world.device)
        loss = task.loss(module, own).sum() / len(objective.chosen)
        loss.backward()
        total += loss.item()
    return total


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


class Parts:
    """Seconds of each evaluation in combine and in project."""

    def __init__(self, run: Run) -> None:
        self.seconds: dict[str, float] = {}
        self.kept: list[dict[str, float]] = []
        for name in ("combine", "project"):
            setattr(run.engine.store, name, self._timed(name, getattr(run.engine.store, name)))

    def keep(self) -> None:
        self.kept.append(dict(self.seconds))

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            begun = time.perf_counter()
            result = function(*args)
            self.seconds[name] = time.perf_counter() - begun
            return result

        return call


def report(
    options: argparse.Namespace,
    run: Run,
    plain: list[tuple[float, float]],
    ours: list[tuple[float, float]],
    parts: Parts,
) -> None:
    parameters = sum(p.numel() for p in run.engine.live.module.parameters())
    print(machine())
    print(
        f"byte-level transformer, {parameters / 1e6:.1f} M parameters, {options.checkpoints} "
        f"checkpoints in float32, store of {run.engine.store.nbytes / 1e6:.0f} MB "
        f"({options.store_dtype}); {options.sequences} sequences of 128 bytes in batches of "
        f"{options.batch_size}; torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"{options.repetitions} rounds in turn after one that does not count"
    )
    for name, rows in (("plain passes", plain), ("evaluation", ours)):
        wall, cpu = spread([w for w, _ in rows], 3), spread([c for _, c in rows], 3)
        print(f"{name:13} wall {wall} s, CPU {cpu} s")
    for name in ("combine", "project"):
        print(f"  {name:11} wall {spread([p[name] for p in parts.kept], 3)} s")
    for what, k in (("wall clock", 0), ("CPU time", 1)):
        ratios = [o[k] / p[k] for o, p in zip(ours, plain, strict=True)]
        print(f"evaluation / plain passes, {what}, round by round: {spread(ratios, 3)} "
              f"(demanded: {DEMANDED})")  # fmt: skip


if __name__ == "__main__":
    main()
