"""Bytes between the ranks, and memory for the basis while it is built, against the paper's scheme.

    python bench/scale/traffic.py --folder FOLDER

Both sides run in real processes under torchrun, on the same checkpoints and the same batches. Every
operation of torch.distributed that carries tensors is counted where it is called, FSDP2's own
included. Bytes are those that a rank sends in a ring of k: all-gather, reduce-scatter and
all-to-all (k − 1) / k of the whole, all-reduce twice that.

"step" is one batch on every rank and one update. "evaluation" is loss and gradient over the whole
fit split: of ours one update, of the paper's scheme either one step a round of batches, as its
authors train, or one update for all of them, which is the least that it can do.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from launched import Anonymous, answer, is_worker, machine, mb, under_torchrun
from layers_task import Layers, make_run
from paper_scheme import PaperScheme
from torch.utils._python_dispatch import TorchDispatchMode

from twa_merge.batches import Batches
from twa_merge.checkpoints import open_checkpoints
from twa_merge.choices import Choices
from twa_merge.clock import Clock
from twa_merge.config import DataConfig, EngineConfig, FitConfig, StoreConfig
from twa_merge.distributed import start, stop
from twa_merge.layout import make_layout
from twa_merge.objective import Objective
from twa_merge.progress import silent
from twa_merge.resume import EvaluationLog
from twa_merge.run import Run, set_up
from twa_merge.subspace import Chart, make_subspace
from twa_merge.task import Splits

DEMANDED = 2.0
# What ``--gather auto`` chooses between; on CPUs it is always a layer.
GATHERED = ("layer", "model")
BATCH = 4


class Counted(TorchDispatchMode):
    """Counts what goes through the process group while it is entered, by operation."""

    # Operation of torch.ops.c10d → how often its whole goes round the ring, and which argument
    # that whole is.
    WHOLE = {  # noqa: RUF012
        "allreduce_": (2.0, 0),
        "allgather_": (1.0, 0),
        "_allgather_base_": (1.0, 0),
        "reduce_scatter_": (1.0, 1),
        "_reduce_scatter_base_": (1.0, 1),
        "alltoall_base_": (1.0, 1),
        "broadcast_": (1.0, 0),
    }

    def __init__(self, size: int) -> None:
        super().__init__()
        self._share = (size - 1) / size
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d" and func._opname != "barrier":
            times, place = self.WHOLE[func._opname]
            self.sent[func._opname] += times * self._share * _nbytes(args[place])
        return func(*args, **(kwargs or {}))

    def of(self, work: Callable[[], object]) -> dict[str, float]:
        """Bytes that this rank sends during ``work``, by operation."""
        self.sent.clear()
        with self:
            work()
        return dict(self.sent)


def _nbytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.nbytes
    return sum(map(_nbytes, tensors))


def main() -> None:
    options = arguments()
    if is_worker():
        worker(options)
        return
    run = make_run(options.folder, options.width, options.layers, options.checkpoints)
    checkpoint = open_checkpoints([run])[0]
    print(machine())
    print(
        f"{options.checkpoints} checkpoints of {mb(checkpoint.nbytes)} MB in float32, "
        f"{options.rounds} batches a rank in an evaluation; MB per rank"
    )
    for k in options.processes:
        ranks = under_torchrun(k, __file__, options.passed_on)
        report(k, options.rounds, {key: max(r[key] for r in ranks) for key in ranks[0]})


def report(k: int, rounds: int, found: dict[str, float]) -> None:
    print(f"\n{k} processes | ours | the paper's scheme | ratio (demanded)")
    lines = [
        (f"{what}, --gather {gather}", f"{ours}, {gather}", theirs, times, DEMANDED)
        for what, ours, theirs, times in (
            ("step", "step", "paper step", 1),
            ("evaluation, a step a round", "evaluation", "paper step", rounds),
            ("evaluation, one update", "evaluation", "paper evaluation", 1),
        )
        for gather in GATHERED
    ]
    lines += [
        ("evaluation, without the engine's own", "own", "paper own", 1, DEMANDED),
        ("memory while building the basis", "building", "paper building", 1, k),
    ]
    for what, ours, other, times, demanded in lines:
        a, b = found[ours], times * found[other]
        digits = 1 if a > 1e5 else 3
        print(
            f"{what:42} | {a / 1e6:9.{digits}f} | {b / 1e6:9.1f} | {b / a:8.2f}  ({demanded:g})",
            flush=True,
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--checkpoints", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=4, help="batches a rank in an evaluation")
    parser.add_argument("--precision", default="fp32", help="of our passes; the scheme's are fp32")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args()
    options.passed_on = [
        part
        for name in ("folder", "width", "layers", "checkpoints", "rounds", "precision")
        for part in (f"--{name}", getattr(options, name))
    ]
    return options


def worker(options: argparse.Namespace) -> None:
    world = start("cpu")
    world.gather(None)  # all are here
    folder = make_run(options.folder, options.width, options.layers, options.checkpoints)
    found: dict[str, float] = {}
    theirs(found, options, folder)
    gc.collect()
    for gather in GATHERED:
        ours(found, options, folder, gather)
        gc.collect()
    answer(**found)
    world.gather(None)
    stop()


def theirs(found: dict[str, float], options: argparse.Namespace, folder: Path) -> None:
    world, checkpoints = start("cpu"), open_checkpoints([folder])
    examples = BATCH * options.rounds * world.size
    task = Layers(options.width, options.layers, examples)
    scheme = PaperScheme(task, world.rank, world.size)
    # The start matters to no figure here, only that its pages are there.
    with Anonymous() as memory:
        scheme.build_basis(checkpoints)
    found["paper building"] = memory.peak - memory.before
    batches = Batches(task.dataset(), task, BATCH, 0, world)

    def step(count: int) -> None:
        chosen = range(count * BATCH * world.size)
        rounds = batches.rounds(chosen)
        scheme.step((batch for _, batch, _ in rounds), len(chosen))

    counted = Counted(world.size)
    found["paper step"] = sum(counted.of(lambda: step(1)).values())
    found["paper evaluation"] = sum(counted.of(lambda: step(options.rounds)).values())
    # All but summing the gradient, which every data-parallel engine does.
    found["paper own"] = found["paper evaluation"] / 2


def ours(found: dict[str, float], options: argparse.Namespace, folder: Path, gather: str) -> None:
    world = start("cpu")
    run, building = prepare(options, folder, EngineConfig("cpu", options.precision, gather=gather))
    found.setdefault("building", building)
    chart = Chart(run.fitter.start(run.n), [make_subspace(run.grams.exact.sum(0))])
    z = torch.zeros(chart.size, dtype=torch.float64)
    counted = Counted(world.size)

    def evaluation(rounds: int) -> dict[str, float]:
        chosen = range(rounds * BATCH * world.size)
        return counted.of(lambda: Objective(run.engine, chart, run.fitter.batches, chosen)(z))

    # The very first pass of FSDP2 gathers one layer more.
    evaluation(1)
    found[f"step, {gather}"] = sum(evaluation(1).values())
    whole = evaluation(options.rounds)
    found[f"evaluation, {gather}"] = sum(whole.values())
    # The engine's own are the two that work on one flat tensor.
    found["own"] = sum(sent for op, sent in whole.items() if not op.endswith("_base_"))


def prepare(options: argparse.Namespace, folder: Path, engine: EngineConfig) -> tuple[Run, float]:
    """Model, store and batches as ``twa-merge train`` sets them up; what the store took."""
    world, checkpoints = start("cpu"), open_checkpoints([folder])
    # Three quarters are for the fit.
    task = Layers(options.width, options.layers, 2 * BATCH * options.rounds * world.size)
    fit, guard = torch.utils.data.random_split(task.dataset(), [0.5, 0.5])
    choices = Choices(
        data=DataConfig(batch_size=BATCH),
        fit=FitConfig(blocks="tensors"),
        store=StoreConfig("device", "float32"),
        engine=engine,
    )
    with tempfile.TemporaryDirectory() as state, Anonymous() as memory:
        log = EvaluationLog(Path(state) / "out.partial", {}, world)
        run = set_up(
            checkpoints, make_layout(checkpoints), task, Splits(fit, guard), world, choices, log,
            Clock(), silent,
        )  # fmt: skip
    return run, memory.peak - memory.before


if __name__ == "__main__":
    main()
