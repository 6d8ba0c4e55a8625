"""``twa-merge average`` against ``mergekit-yaml``, as whole processes, on the same checkpoints.

    python bench/speed/average.py --folder FOLDER --mergekit ENV/bin/mergekit-yaml

The inputs are in the page cache, or with --cold dropped from it before every process. Below both
stands the floor: a process without torch that only reads the inputs and writes the output.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from pathlib import Path

from processes import Measured, machine, run, spread
from runs import LLAMA_125M, llama_run

_FLOOR = """
import os, sys
buffer, size = bytearray(1 << 22), int(sys.argv[1])
for path in sys.argv[3:]:
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
with open(sys.argv[2], "wb", buffering=0) as file:
    for begin in range(0, size, len(buffer)):
        file.write(memoryview(buffer)[: size - begin])
    os.fsync(file)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are kept")
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml of an environment of its own")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="inputs not in the page cache")
    options = parser.parse_args()
    paths, nbytes = llama_run(options.folder / "llama-125m", 8, LLAMA_125M)
    inputs = [file for path in paths for file in path.glob("*.safetensors")]
    outputs = {name: options.folder / f"out-{name}" for name in ("ours", "mergekit", "floor")}
    commands = _commands(options, paths, inputs, outputs)
    print(machine())
    print(
        f"8 checkpoints of a 134 M-parameter Llama, bfloat16, {nbytes / 1e9:.2f} GB, "
        f"page cache {'cold' if options.cold else 'warm'}; "
        f"{options.repetitions} timed rounds of all commands in turn; memory is sampled "
        "in two more, before and after"
    )
    for name, command in commands.items():
        print(f"  {name}: {_shown(command)}")
    timed: dict[str, list[Measured]] = {name: [] for name in commands}
    sampled: dict[str, list[Measured]] = {name: [] for name in commands}
    for repetition in range(-1, options.repetitions + 1):
        memory = repetition in (-1, options.repetitions)
        for name, command in commands.items():
            dropped = inputs if options.cold else []
            measured = _once(command, list(outputs.values()), dropped, memory)
            (sampled if memory else timed)[name].append(measured)
    _report(timed, sampled)
    if options.mergekit:
        _compare(commands, outputs)


def _commands(
    options: argparse.Namespace, paths: list[Path], inputs: list[Path], outputs: dict[str, Path]
) -> dict[str, list[str]]:
    size = inputs[0].stat().st_size
    script = shutil.which("twa-merge", path=str(Path(sys.executable).parent))
    ours = [script] if script else [sys.executable, "-m", "twa_merge_cli"]
    commands = {"ours": [*ours, "average", str(paths[0].parent), "-o", str(outputs["ours"])]}
    if options.mergekit:
        config = options.folder / "mergekit.yml"
        models = "".join(
            f"  - model: {p.resolve()}\n    parameters: {{weight: 1.0}}\n" for p in paths
        )
        config.write_text(f"merge_method: linear\ndtype: bfloat16\nmodels:\n{models}")
        commands["mergekit"] = [str(options.mergekit), str(config), str(outputs["mergekit"])]
    floor = [sys.executable, "-I", "-c", _FLOOR, str(size), str(outputs["floor"])]
    commands["floor"] = [*floor, *map(str, inputs)]
    commands["import torch"] = [sys.executable, "-c", "import torch"]
    return commands


def _shown(command: list[str]) -> str:
    words = ["'…'" if "\n" in word else word for word in command]
    return " ".join(words if len(words) < 10 else [*words[:6], "…"])


def _once(
    command: list[str], outputs: list[Path], dropped: list[Path], memory: bool = False
) -> Measured:
    for path in outputs:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    # What earlier processes have left to be written would be charged to this one.
    os.sync()
    for path in dropped:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    # Packages are compiled when they are installed, ours from a checkout when it first runs.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return run(command, {**environment, "HF_HUB_OFFLINE": "1"}, memory=memory)


def _report(timed: dict[str, list[Measured]], sampled: dict[str, list[Measured]]) -> None:
    print(f"{'':14}{'wall s':>24}{'CPU s':>24}{'peak anonymous MB':>24}")
    for name, rows in timed.items():
        wall, cpu = spread([r.wall for r in rows]), spread([r.cpu for r in rows])
        memory = spread([r.anonymous / 1e6 for r in sampled[name]], 0)
        print(f"{name:14}{wall:>24}{cpu:>24}{memory:>24}")
    ours = timed["ours"]
    if "mergekit" in timed:
        pairs = list(zip(ours, timed["mergekit"], strict=True))
        wall, cpu = (
            spread([m.wall / o.wall for o, m in pairs]),
            spread([m.cpu / o.cpu for o, m in pairs]),
        )
        print(f"mergekit / ours, wall clock, round by round: {wall} (demanded: 4)")
        print(f"mergekit / ours, CPU time, round by round: {cpu}")
        # The least favourable pair, whichever rounds they come from.
        least = min(r.anonymous for r in sampled["mergekit"])
        most = max(r.anonymous for r in sampled["ours"])
        print(
            f"ours / mergekit, peak anonymous memory, at worst: {most / least:.3f} (demanded: 0.25)"
        )
    for name in ("floor", "import torch"):
        share = statistics.median(r.wall for r in timed[name]) / statistics.median(
            r.wall for r in ours
        )
        print(f"{name}, as a share of our wall clock: {share:.0%}")


def _compare(commands: dict[str, list[str]], outputs: dict[str, Path]) -> None:
    """Both merges are the same model, up to a rounding of bfloat16."""
    import torch
    from safetensors.torch import load_file

    merged = []
    for name in ("ours", "mergekit"):
        _once(commands[name], [outputs[name]], [])
        merged.append({k: v for f in outputs[name].glob("*.safetensors")
                       for k, v in load_file(f).items()})  # fmt: skip
    first, second = merged
    assert first.keys() == second.keys()
    # bfloat16 has eight digits: neighbours are at most 2⁻⁷ of a number apart.
    apart = max(
        float(((first[k] - second[k]).float().abs() / first[k].float().abs().clamp(1e-3)).max())
        for k in first
    )
    same = sum(int(torch.eq(first[k], second[k]).sum()) for k in first)
    total = sum(t.numel() for t in first.values())
    print(f"the two merges: {same / total:.2%} of all numbers equal, the rest within {apart:.4f}")


if __name__ == "__main__":
    main()
