"""Offsets several times larger than the memory allowed: trained from disk, and from memory.

    python bench/scale/disk.py --folder FOLDER

The command line is the real one, in a process that ends itself the moment its anonymous memory
(RssAnon) passes the limit, imports included. Resource limits cannot do that: RLIMIT_AS and
RLIMIT_DATA also count the checkpoint files as soon as they are mapped. The same command with the
offsets in memory is run without a limit for its coefficients, and with the limit to see it fail.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from launched import anonymous, machine, mb
from layers_task import make_run

DEMANDED = 1e-5
OVER = 99


def main() -> None:
    if sys.argv[1:2] == ["--limited"]:
        limited(int(sys.argv[2]), sys.argv[3:])
    options = arguments()
    run = make_run(options.folder, options.width, options.layers, options.checkpoints)
    size = 4 * options.layers * options.width * (options.width + 1)
    limit = options.limit << 20
    print(machine())
    print(
        f"{options.checkpoints} offsets of {mb(size)} MB: {mb(options.checkpoints * size)} MB; "
        f"limit {mb(limit)} MB with everything, {options.checkpoints * size / limit:.1f} times less"
    )
    memory, peak, took = train(options, run, "device", 1 << 60)
    print(f"from memory, no limit:  peak {mb(peak):>7} MB, {took:5.1f} s")
    code, peak, took = train(options, run, "device", limit)
    print(f"from memory, limited:   ended by the limit after {took:.1f} s" if code == OVER
          else f"from memory, limited:   exit code {code}, peak {mb(peak)} MB")  # fmt: skip
    disk, peak, took = train(options, run, "disk", limit)
    print(f"from disk, limited:     peak {mb(peak):>7} MB, {took:5.1f} s, exit code {disk}")
    if memory or disk:
        sys.exit("a run failed")
    one, other = (coefficients(options.folder / f"merged-{store}") for store in ("device", "disk"))
    distance = max(abs(a - b) for a, b in zip(one, other, strict=True))
    print(f"coefficients: largest difference {distance:.1e} (demanded: {DEMANDED:g})")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--checkpoints", type=int, default=40)
    parser.add_argument("--limit", type=int, default=420, help="MiB")
    return parser.parse_args()


def train(options: argparse.Namespace, run: Path, store: str, limit: int) -> tuple[int, int, float]:
    """Exit code, peak RssAnon and seconds of one run of the command line."""
    # fmt: off
    command = [
        sys.executable, __file__, "--limited", limit, "train", run,
        "--task", Path(__file__).with_name("layers_task.py"),
        "--data", f"{options.width}x{options.layers}", "-o", options.folder / f"merged-{store}",
        "--store", store, "--blocks", "global", "--ridge", 0.01, "--max-evaluations", 4,
        "--start", "mean", "--candidates", "uniform,twa", "--device", "cpu", "--overwrite",
        "--fresh",
    ]
    # fmt: on
    begun = time.perf_counter()
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        out, err = process.communicate()
    peak = next((int(line.split()[1]) for line in out.splitlines() if line.startswith("PEAK")), 0)
    if process.returncode not in (0, OVER):
        print(err)
    return process.returncode, peak, time.perf_counter() - begun


def limited(limit: int, argv: list[str]) -> None:
    """The command line, in this process, under the limit."""
    peak = 0

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, anonymous())
            if peak > limit:
                os._exit(OVER)
            time.sleep(0.002)

    # Without its picture of the loss, which takes more evaluations than the fit.
    sys.modules["matplotlib"] = None  # type: ignore[assignment]
    threading.Thread(target=watch, daemon=True).start()
    from twa_merge_cli.main import main as command_line

    try:
        command_line(argv)
    finally:
        print(f"\nPEAK {peak}", flush=True)


def coefficients(folder: Path) -> list[float]:
    """Of the trained merge, whichever candidate won."""
    document = json.loads((folder / "twa_merge.json").read_text())
    return next(row["coefficients"] for row in document["candidates"] if row["name"] == "twa")


if __name__ == "__main__":
    main()
