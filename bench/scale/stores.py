"""One evaluation against the plain forward and backward passes, by where the offsets live.

    python bench/scale/stores.py --folder FOLDER [--device cuda]

An evaluation is combine, the passes of all batches, project. Every round times the plain passes and
an evaluation with each store, in turn, so that a neighbour on the machine slows all of them. On a
CPU the device's memory is the host's. The files that the disk store reads are in the system's cache
after the first round, if they fit there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from launched import machine, mb
from safetensors.torch import save_file

from twa_merge.checkpoints import open_checkpoints
from twa_merge.choices import Choices
from twa_merge.clock import Clock
from twa_merge.config import DataConfig, EngineConfig, StoreConfig
from twa_merge.distributed import start
from twa_merge.layout import make_layout
from twa_merge.objective import Objective
from twa_merge.progress import silent
from twa_merge.resume import EvaluationLog
from twa_merge.run import Run, set_up
from twa_merge.subspace import Chart, make_subspace
from twa_merge.task import Splits, to_device
from twa_merge.tasks.byte_lm import ByteConfig, ByteTask, ByteTransformer, standard_library_text

DEMANDED = 1.15


def main() -> None:
    options = arguments()
    config = ByteConfig(options.width, options.layers, options.width // 32, 128)
    folder = byte_run(options.folder, options.checkpoints, config)
    stores = [("device", "float32"), ("device", "int8"), ("device", "int4"), ("disk", "auto")]
    if options.device != "cpu":
        stores.insert(3, ("host", "float32"))
    runs = {place: prepare(folder, config, options, StoreConfig(*place)) for place in stores}
    first = next(iter(runs.values()))
    parameters = sum(p.numel() for p in first.engine.live.module.parameters())
    print(machine())
    print(
        f"byte-level transformer, {parameters / 1e6:.1f} M parameters, {options.checkpoints} "
        f"checkpoints in float32; {options.sequences} sequences of 128 bytes in batches of "
        f"{options.batch_size}; {torch.get_num_threads()} threads; medians of {options.rounds} "
        "rounds in turn after one that does not count"
    )
    z = {place: torch.zeros(chart_of(run).size, dtype=torch.float64) for place, run in runs.items()}
    objectives = {
        place: Objective(run.engine, chart_of(run), run.fitter.batches, range(options.sequences))
        for place, run in runs.items()
    }
    took: dict[object, list[float]] = {}
    for number in range(options.rounds + 1):
        row = {"plain": seconds(lambda: plain_passes(first, range(options.sequences)), options)}
        for place, objective in objectives.items():
            # Another point each time, as in a fit: nothing can be remembered.
            z[place] += 0.01
            row[place] = seconds(lambda o=objective, p=place: o(z[p]), options)
        for what, value in row.items() if number else ():
            took.setdefault(what, []).append(value)
    print(f"plain passes {statistics.median(took['plain']):.3f} s")
    print("store            | MB held | evaluation s | over plain passes: median (least to most)")
    for place, run in runs.items():
        ratios = [a / b for a, b in zip(took[place], took["plain"], strict=True)]
        demanded = f"  (demanded: {DEMANDED})" if place == stores[0] else ""
        print(
            f"{' '.join(place):16} | {mb(run.engine.store.nbytes):>7} | "
            f"{statistics.median(took[place]):12.3f} | {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}){demanded}"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--checkpoints", type=int, default=12)
    parser.add_argument("--sequences", type=int, default=32, help="of 128 bytes, in the fit split")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def byte_run(folder: Path, checkpoints: int, config: ByteConfig) -> Path:
    """A run folder of float32 transformers: a random start, and steps away from it."""
    folder = folder / f"bytes-{config.width}x{config.layers}-{checkpoints}"
    made = folder / "made.json"
    if made.is_file():
        return folder
    model = ByteTransformer(config)
    model.reset(0)
    generator = torch.Generator().manual_seed(0)
    for k in range(checkpoints):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 2e-3 * torch.randn(parameter.shape, generator=generator)
        path = folder / f"checkpoint-{100 * (k + 1)}"
        path.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
    made.write_text(json.dumps(str(config)))
    return folder


def prepare(
    folder: Path, config: ByteConfig, options: argparse.Namespace, store: StoreConfig
) -> Run:
    """Model, store and batches as ``twa-merge train`` sets them up."""
    checkpoints, world = open_checkpoints([folder]), start(options.device)
    task = ByteTask(
        standard_library_text().held_out, config=config, sequences=2 * options.sequences
    )
    fit, guard = torch.utils.data.random_split(task.dataset(), [0.5, 0.5])
    choices = Choices(
        data=DataConfig(batch_size=options.batch_size),
        store=store,
        engine=EngineConfig(device=options.device),
    )
    with tempfile.TemporaryDirectory() as state:
        log = EvaluationLog(Path(state) / "out.partial", {}, world)
        return set_up(
            checkpoints, make_layout(checkpoints), task, Splits(fit, guard), world, choices, log,
            Clock(), silent,
        )  # fmt: skip


def chart_of(run: Run) -> Chart:
    return Chart(run.fitter.start(run.n), [make_subspace(run.grams.exact.sum(0))])


def plain_passes(run: Run, chosen: range) -> None:
    """What training would do on the same batches with the same model, without an optimizer."""
    module, task = run.engine.live.module, run.engine.task
    module.zero_grad()
    for _, batch, _ in run.fitter.batches.rounds(chosen):
        loss = task.loss(module, to_device(batch, run.world.device)).sum() / len(chosen)
        loss.backward()
        loss.item()


def seconds(work: Callable[[], object], options: argparse.Namespace) -> float:
    begun = time.perf_counter()
    work()
    if options.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
