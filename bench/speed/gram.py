"""The Gram pass (`twa-merge inspect --geometry`) against reading the same bytes.

    python bench/speed/gram.py --folder FOLDER

Both in one process, in turn, with the files in the page cache. Reading is `readinto` of 4 MB
pieces in one thread; the pass is ``ingest`` without a store, as `inspect --geometry` calls it but
for the second matrix of rounded offsets, which --check adds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from processes import machine, spread
from runs import LLAMA_125M, llama_run

from twa_merge.checkpoints import open_checkpoints
from twa_merge.distributed import World
from twa_merge.ingest import Grams, ingest
from twa_merge.layout import make_layout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--check", action="store_true", help="with the matrix of rounded offsets")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    paths, nbytes = llama_run(options.folder / "llama-125m", 8, LLAMA_125M)
    files = [file for path in paths for file in path.glob("*.safetensors")]
    print(machine())
    print(
        f"8 checkpoints of a 134 M-parameter Llama, bfloat16, {nbytes / 1e9:.2f} GB, page cache "
        f"warm; torch {torch.__version__}, {options.threads} threads; {options.repetitions} rounds "
        "in turn after one that does not count"
    )
    reads: list[tuple[float, float]] = []
    passes: list[tuple[float, float]] = []
    for repetition in range(-1, options.repetitions):
        read = timed(lambda: read_all(files))
        gram = timed(lambda: gram_pass(paths, options.check))
        if repetition >= 0:
            reads.append(read)
            passes.append(gram)
    for name, rows in (("read", reads), ("Gram pass", passes)):
        wall, cpu = spread([w for w, _ in rows]), spread([c for _, c in rows])
        rate = nbytes / 1e9 / min(w for w, _ in rows)
        print(f"{name:10} wall {wall} s, CPU {cpu} s, at best {rate:.2f} GB/s")
    for what, k in (("wall clock", 0), ("CPU time", 1)):
        shares = [g[k] / r[k] for g, r in zip(passes, reads, strict=True)]
        print(f"Gram pass / read, {what}, round by round: {spread(shares)}")


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def read_all(files: list[Path]) -> None:
    buffer = bytearray(1 << 22)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def gram_pass(paths: list[Path], check: bool) -> Grams:
    checkpoints = open_checkpoints(paths)
    grams = ingest(checkpoints, make_layout(checkpoints), World(), check=check)
    for checkpoint in checkpoints:
        checkpoint.close()
    return grams


if __name__ == "__main__":
    main()
