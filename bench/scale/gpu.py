"""A transformer of a billion parameters in bfloat16, 16 checkpoints, on one GPU.

    python bench/scale/gpu.py --folder FOLDER [--store-dtype int8] [--small --device cpu]

Prints seconds per evaluation, the share of project and combine in it, what they reach in GB/s
against the device's own copy, and peak memory against the plan. The checkpoints are random, 2 GB
each, and made once; --small is a miniature that shows on any machine that the code works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from launched import Anonymous, machine
from safetensors.torch import save_file
from torch import Tensor

from twa_merge.checkpoints import open_checkpoints
from twa_merge.choices import Choices
from twa_merge.clock import Clock
from twa_merge.config import DataConfig, EngineConfig, FitConfig, StoreConfig
from twa_merge.distributed import World, start
from twa_merge.layout import make_layout
from twa_merge.objective import Objective
from twa_merge.progress import Event, Noted
from twa_merge.resume import EvaluationLog
from twa_merge.run import Run, set_up
from twa_merge.store import memory_plan, this_machine
from twa_merge.subspace import Chart, make_subspace
from twa_merge.task import Splits
from twa_merge.tasks.byte_lm import ByteConfig, ByteTask, ByteTransformer

# 12 · 2048² · 20 = 1.0e9 numbers.
LARGE = {"width": 2048, "layers": 20, "context": 1024, "sequences": 64, "batch": 8}
SMALL = {"width": 128, "layers": 4, "context": 64, "sequences": 16, "batch": 4}


def main() -> None:
    options = arguments()
    sizes = SMALL if options.small else LARGE
    config = ByteConfig(
        sizes["width"], sizes["layers"], sizes["width"] // (32 if options.small else 128),
        sizes["context"],
    )  # fmt: skip
    device = torch.device(options.device)
    run_folder = make_run(options, config, device)
    print(machine() if device.type == "cpu" else torch.cuda.get_device_name(device))
    with tempfile.TemporaryDirectory() as state, Memory(device) as memory:
        world = start(options.device)
        run, took = prepare(run_folder, config, sizes, options, world, Path(state))
        print(f"reading {run.n} checkpoints into the store: {took:.1f} s")
        objective = Objective(
            run.engine,
            Chart(torch.full((1, run.n), 1 / run.n, dtype=torch.float64),
                  [make_subspace(run.grams.exact.sum(0))]),
            run.fitter.batches,
            range(sizes["sequences"]),
        )  # fmt: skip
        parts = Parts(run, device)
        z = torch.zeros(objective.chart.size, dtype=torch.float64)
        rows = []
        for number in range(options.rounds + 2):
            z += 0.01
            parts.seconds = dict.fromkeys(parts.seconds, 0.0)
            whole = seconds(partial(objective, z), device)
            # The first two compile and warm up.
            if number >= 2:
                rows.append({"whole": whole, **parts.seconds})
    report(run, rows, memory.peak, copy_rate(device, options.small), options, world)


def report(
    run: Run,
    rows: list[dict[str, float]],
    peak: int,
    copy: float,
    options: argparse.Namespace,
    world: World,
) -> None:
    median = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    numbers = sum(p.numel() for p in run.engine.live.module.parameters())
    held = run.engine.store.nbytes
    print(
        f"{numbers / 1e9:.3f} G parameters, {run.n} checkpoints in bfloat16, store "
        f"{options.store} {options.store_dtype} of {held / 1e9:.2f} GB; the device's copy reads "
        f"and writes {copy / 1e9:.1f} GB/s; medians of {len(rows)}"
    )
    print(f"evaluation: {median['whole']:.3f} s")
    # Project: offsets and gradient. Combine: offsets, centre (both in what is held) and result.
    touched = {"project": held, "combine": held + 4 * numbers}
    for name, nbytes in touched.items():
        rate = nbytes / median[name]
        print(
            f"{name}: {median[name]:.4f} s, {median[name] / median['whole']:.1%} of it, "
            f"{rate / 1e9:.1f} GB/s, {rate / copy:.2f} of the copy (asked: 0.5)"
        )
    plan = memory_plan(
        run.layout, run.n, this_machine(world), StoreConfig(options.store, options.store_dtype)
    )
    planned = plan.device_total or plan.host_total
    print(
        f"peak memory: {peak / 1e9:.3f} GB, plan {planned / 1e9:.3f} GB without activations: "
        f"{peak / planned:.3f}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--checkpoints", type=int, default=16)
    parser.add_argument("--store", default="device", choices=("device", "host", "disk"))
    parser.add_argument("--store-dtype", default="bfloat16")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def make_run(options: argparse.Namespace, config: ByteConfig, device: torch.device) -> Path:
    """Checkpoints in bfloat16: a random start, and steps away from it."""
    folder = options.folder / f"bf16-{config.width}x{config.layers}-{options.checkpoints}"
    made = folder / "made.json"
    if made.is_file():
        return folder
    model = ByteTransformer(config)
    model.reset(0)
    model.to(device)
    torch.manual_seed(0)
    for k in range(options.checkpoints):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 2e-3 * torch.randn_like(parameter)
        state = {name: t.bfloat16().cpu().contiguous() for name, t in model.state_dict().items()}
        path = folder / f"checkpoint-{100 * (k + 1)}"
        path.mkdir(parents=True, exist_ok=True)
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    made.write_text(json.dumps(str(config)))
    return folder


def prepare(
    folder: Path,
    config: ByteConfig,
    sizes: dict[str, int],
    options: argparse.Namespace,
    world: World,
    state: Path,
) -> tuple[Run, float]:
    """A run as ``twa-merge train`` sets it up, and seconds of the streaming pass."""
    checkpoints, clock = open_checkpoints([folder]), Clock()
    generator = torch.Generator().manual_seed(0)
    length = 2 * sizes["sequences"] * (config.context + 1) + 1
    text = torch.randint(256, (length,), dtype=torch.uint8, generator=generator)
    task = ByteTask([bytes(text.numpy())], config=config)
    fit, guard = torch.utils.data.random_split(task.dataset(), [0.5, 0.5])
    choices = Choices(
        data=DataConfig(batch_size=sizes["batch"]),
        fit=FitConfig(blocks="global"),
        store=StoreConfig(options.store, options.store_dtype),
        engine=EngineConfig(device=options.device, precision=options.precision),
    )

    def note(event: Event) -> None:
        if isinstance(event, Noted):
            print(event.text)

    run = set_up(
        checkpoints, make_layout(checkpoints), task, Splits(fit, guard), world, choices,
        EvaluationLog(state / "out.partial", {}, world), clock, note,
    )  # fmt: skip
    return run, clock.rounded()["ingest"]


class Parts:
    """Seconds of an evaluation in combine and in project."""

    def __init__(self, run: Run, device: torch.device) -> None:
        self.seconds = {"combine": 0.0, "project": 0.0}
        for name in self.seconds:
            self._time(run.engine.store, name, device)

    def _time(self, store: Any, name: str, device: torch.device) -> None:
        function = getattr(store, name)

        def call(*args: Any) -> Any:
            result: list[Any] = []
            self.seconds[name] += seconds(lambda: result.append(function(*args)), device)
            return result[0]

        setattr(store, name, call)


class Memory:
    """Peak memory: the GPU's own counter, or anonymous memory above what there was."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._host = device, Anonymous()

    def __enter__(self) -> Memory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._host.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._host.__exit__(*error)
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self.peak = self._host.peak - self._host.before


def copy_rate(device: torch.device, small: bool) -> float:
    """Bytes a second, read and written, of a plain copy."""
    source: Tensor = torch.randn(1 << (24 if small else 30), device=device)
    target = torch.empty_like(source)
    took = [seconds(lambda: target.copy_(source), device) for _ in range(7)]
    return 2 * source.nbytes / statistics.median(took)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
