"""Project and combine in every width, against a plain copy on the same machine.

    python bench/scale/kernels.py [--device cuda] [--numbers 4194304] [--offsets 16]

The copy, the projection and the combination take turns, and the fastest of each counts: a neighbour
on the machine only ever slows them. "stored" counts the bytes of the
offsets alone, scales included. "touched" adds what the operation cannot do without: the gradient
(project), the centre and the result (combine). The copy counts bytes read and bytes written. The
bar is half of the copy, in bytes touched.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from twa_merge.checkpoints.base import TensorInfo
from twa_merge.config import STORE_DTYPES
from twa_merge.dtypes import DTYPES
from twa_merge.layout import Entry, Layout, global_block
from twa_merge.store.memory import MemoryStore
from twa_merge.stream import row_slices

NAME, ROW = "weight", 4096
WIDTHS = STORE_DTYPES[1:]


def seconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def filled(dtype: str, args: argparse.Namespace, compiled: bool) -> tuple[MemoryStore, float]:
    """A store of random offsets, and how many million numbers a second it took in."""
    rows = args.numbers // ROW
    layout = Layout({NAME: Entry(NAME, TensorInfo((rows, ROW), DTYPES["float32"]), True)})
    store = MemoryStore(
        dtype,
        args.offsets,
        layout,
        global_block(layout),
        share=lambda _: (0, rows),
        device=torch.device(args.device),
        on_host=args.host,
        compiled=compiled,
        progress=lambda event: print(f"  ({event.text})"),  # type: ignore[union-attr]
    )
    generator = torch.Generator().manual_seed(0)
    took, count = 0.0, 0
    for cut in row_slices(layout, [NAME]):
        shape = (args.offsets, (cut.stop - cut.start) * ROW)
        offsets = torch.randn(shape, generator=generator).double() * 1e-3
        start = time.perf_counter()
        store.put(cut, offsets[0], offsets)
        took += time.perf_counter() - start
        count += offsets.numel()
    return store, count / took / 1e6


def measure(dtype: str, compiled: bool, args: argparse.Namespace) -> str:
    device = torch.device(args.device)
    store, rate = filled(dtype, args, compiled)
    shape = (args.numbers // ROW, ROW)
    gradient, target = (torch.randn(shape, device=device) for _ in range(2))
    alphas = torch.randn(1, args.offsets, dtype=torch.float64)
    source = torch.randn(args.offsets * args.numbers, device=device)
    copied = torch.empty_like(source)
    calls = {
        "copy": lambda: copied.copy_(source),
        "project": lambda: store.project({NAME: gradient}),
        "combine": lambda: store.combine(alphas, {NAME: target}),
    }
    first = {what: seconds(call, device) for what, call in calls.items()}
    took: dict[str, list[float]] = {what: [] for what in calls}
    for _ in range(args.rounds):
        for what, call in calls.items():
            took[what].append(seconds(call, device))
    best = {what: min(values) for what, values in took.items()}
    centre = 4 * args.numbers
    stored = store.nbytes - centre
    copy = 2 * source.nbytes / best["copy"] / 1e9
    cells = [f"{dtype:9}", "compiled" if compiled else "eager   ", f"{copy:6.1f}"]
    for what, more in (("project", gradient.nbytes), ("combine", centre + target.nbytes)):
        touched = (stored + more) / best[what] / 1e9
        cells.append(f"{stored / best[what] / 1e9:7.2f} {touched:7.2f} {touched / copy:6.2f}")
    cells.append(f"{rate:6.0f}")
    cells.append(f"{first['project'] + first['combine']:6.1f}" if compiled else "     –")
    return " | ".join(cells)


def where(args: argparse.Namespace) -> str:
    if args.device.startswith("cuda"):
        name = torch.cuda.get_device_name(torch.device(args.device))
    else:
        lines = (
            Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
        )
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
    place = ", offsets in host memory" if args.host else ""
    what = f"{args.offsets} offsets of {args.numbers:,} numbers"
    return f"{what} on {name}{place}; torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--host", action="store_true", help="offsets in pinned host memory")
    parser.add_argument("--numbers", type=int, default=1 << 22, help="of one offset")
    parser.add_argument("--offsets", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--widths", nargs="+", default=WIDTHS, choices=WIDTHS)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(where(args))
    print(
        "GB/s, the fastest rounds; share: of the copy, in bytes touched; taken in: million numbers "
        "a second"
    )
    print(
        "width     | kernels  |   copy | project stored, touched | combine stored, touched "
        "|  taken in | compile s"
    )
    for dtype in args.widths:
        for compiled in (False,) if args.no_compile else (False, True):
            print(measure(dtype, compiled, args), flush=True)


if __name__ == "__main__":
    main()
