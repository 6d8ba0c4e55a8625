"""Peak anonymous memory per rank of 1, 2 and 4 processes, against the memory plan.

    python bench/scale/memory.py --folder FOLDER [--store device] [--store-dtype float32]

Each number of processes is a launch of its own by torchrun, and each rank runs the whole merge:
reading, training, guard, writing. A rank first merges a miniature of the same run and then notes
what it holds: interpreter, libraries, process group and threads, which no plan knows of. The peak
above that is what is compared.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

from launched import Anonymous, anonymous, answer, is_worker, machine, mb, under_torchrun
from layers_task import Layers, make_run

from twa_merge import merge
from twa_merge.checkpoints import open_checkpoints
from twa_merge.config import (
    DataConfig,
    EngineConfig,
    FitConfig,
    GuardConfig,
    OutputConfig,
    StoreConfig,
)
from twa_merge.layout import make_layout
from twa_merge.store import Machine, memory_plan

DEMANDED = 0.10


def main() -> None:
    options = arguments()
    if is_worker():
        worker(options)
        return
    run = make_run(options.folder, options.width, options.layers, options.checkpoints)
    make_run(options.folder, 16, options.layers, options.checkpoints)
    found = open_checkpoints([run])
    layout = make_layout(found)
    print(machine())
    print(
        f"{len(found)} checkpoints of {mb(found[0].nbytes)} MB in float32, {options.layers} "
        f"layers, store {options.store} {options.store_dtype}; MB per rank, the rank with most"
    )
    print(
        "processes | imported | baseline |    peak | above baseline |    plan | found / plan "
        "| 1 process / this"
    )
    first = 0
    for k in options.processes:
        config = StoreConfig(options.store, options.store_dtype)
        plan = memory_plan(layout, len(found), Machine(k, k), config)
        ranks = under_torchrun(k, __file__, options.passed_on)
        most = max(ranks, key=lambda r: r["peak"] - r["baseline"])
        above = most["peak"] - most["baseline"]
        first = first or above
        ratio = above / plan.host_total
        verdict = "" if abs(ratio - 1) <= DEMANDED else f"  (demanded: within {DEMANDED:.0%})"
        cells = [mb(most[key]) for key in ("imported", "baseline", "peak")]
        print(
            f"{k:9} | {cells[0]:>8} | {cells[1]:>8} | {cells[2]:>7} | {mb(above):>14} | "
            f"{mb(plan.host_total):>7} | {ratio:12.3f} | {first / above:.2f}{verdict}",
            flush=True,
        )
        print("  plan: " + ", ".join(f"{use} {mb(b)}" for use, b in plan.host.items()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--checkpoints", type=int, default=12)
    parser.add_argument("--store", default="device", choices=("device", "disk"))
    parser.add_argument("--store-dtype", default="auto")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    options.passed_on = [
        part
        for name in ("folder", "width", "layers", "checkpoints", "store", "store_dtype")
        for part in (f"--{name.replace('_', '-')}", getattr(options, name))
    ]
    return options


def worker(options: argparse.Namespace) -> None:
    # Without its picture of the loss, which takes more evaluations than the fit.
    sys.modules["matplotlib"] = None  # type: ignore[assignment]
    imported = anonymous()
    whole_merge(options, 16)
    gc.collect()
    with Anonymous() as memory:
        whole_merge(options, options.width)
    answer(imported=imported, baseline=memory.before, peak=memory.peak)


def whole_merge(options: argparse.Namespace, width: int) -> None:
    run = make_run(options.folder, width, options.layers, options.checkpoints)
    merge(
        [run],
        Layers(width, options.layers, examples=64),
        options.folder / f"merged-{width}",
        data_config=DataConfig(batch_size=4),
        fit=FitConfig(blocks="global", ridge=0.01, max_evaluations=4),
        guard=GuardConfig(candidates="quick"),
        store=StoreConfig(options.store, options.store_dtype),
        engine=EngineConfig(device="cpu"),
        out=OutputConfig(overwrite=True, fresh=True),
    )


if __name__ == "__main__":
    main()
