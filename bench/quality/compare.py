"""Every way of merging on the same checkpoints and the same held-out data, as one table.

    python bench/quality/compare.py CACHE                          # all suites, three seeds
    python bench/quality/compare.py CACHE --suites annealing --seeds 1
    python bench/quality/compare.py CACHE --write                  # puts the tables into README.md

The training runs and every result are kept in CACHE, so that what was interrupted goes on and only
what is missing is made. ``written`` is the model that ``merge`` writes with default settings; all
other rows but the authors' algorithm and ``TWA by layer`` are the candidates of the same merge. All
losses are taken on test data that nothing was chosen on. A result is made anew after its file in
CACHE/results is deleted.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from authors import FlatModel, Settings, authors_twa
from language import fine_tuning
from runs import Suite, annealing, head, step_of
from soup import soup
from torch import Tensor

from twa_merge import merge
from twa_merge.checkpoints import Checkpoint, open_checkpoints
from twa_merge.config import DataConfig, FitConfig, GuardConfig
from twa_merge.task import split
from twa_merge.tensors import tensor_rows

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- results: written by compare.py -->", "<!-- end of results -->"
# Candidate (or its family) in the report → row of the table.
ROWS = {
    "last": "last checkpoint",
    "best_single": "best single checkpoint",
    "uniform": "uniform mean",
    "window": "best window",
    "ema": "EMA, best decay",
    "wsm": "warmup-stable-merge, 1-sqrt",
    "greedy": "greedy soup",
    "authors": "authors' algorithm, tuned",
    "twa": "TWA",
    "twa-tensors": "TWA by tensor",
    "twa-layers": "TWA by layer",
    "twa-blocks": "TWA by tensor and by layer",
    "blend": "blend of all",
    "written": "**written (defaults)**",
}
SIZES = (8, 16, 32, 64, 256)
GUARD_FRACTION = DataConfig().guard_fraction


@dataclass(frozen=True)
class Bench:
    """How one suite is made and measured.

    Attributes:
        make: cache folder, seed → suite.
        rates: learning rates that the authors' algorithm is tuned over.
    """

    make: Callable[[Path, int], Suite]
    rates: tuple[float, ...]
    epochs: int = 3


BENCHES: dict[str, Bench] = {
    "annealing": Bench(partial(annealing, merge_every=20), (0.1, 0.3, 1.0, 3.0)),
    "head": Bench(head, (0.1, 0.3, 1.0, 3.0)),
    "soup-conv": Bench(partial(soup, kind="conv"), (0.01, 0.03, 0.1, 0.3, 1.0), 10),
    "soup-vit": Bench(partial(soup, kind="vit"), (0.01, 0.03, 0.1, 0.3, 1.0), 10),
    "fine-tuning": Bench(fine_tuning, (0.1, 0.3, 1.0, 3.0)),
    **{
        f"little-data-{k}": Bench(
            partial(annealing, sequences=round(k / (1 - GUARD_FRACTION)), test_sequences=512),
            (0.1, 0.3, 1.0, 3.0),
            # At least twenty steps, however few examples there are.
            epochs=max(3, 320 // k),
        )
        for k in SIZES
    },
}


def measure(bench: Bench, suite: Suite) -> dict[str, Any]:
    """Test loss of every row, and what the winner was."""
    began = time.perf_counter()
    document = trained(suite, FitConfig())
    seconds = time.perf_counter() - began
    losses = {c["name"].partition(":")[0]: c["test_loss"] for c in document["candidates"]}
    losses["written"] = chosen_loss(document)
    # There is none where it would be the winner itself, or one of its two parts.
    losses.setdefault("blend", losses["written"])
    rows = [c for c in document["candidates"] if c["name"] in ("twa-tensors", "twa-layers")]
    losses.setdefault("twa-blocks", min(rows, key=lambda c: c["selection_loss"])["test_loss"])
    losses["twa-layers"] = layers_loss(suite)
    losses["authors"] = authors_loss(bench, suite)
    return {
        "chosen": document["chosen"],
        "seconds": round(seconds, 1),
        "evaluations": document["optimizer"]["evaluations"],
        "data": document["data"],
        "checkpoints": len(suite.checkpoints),
        "improvement": document["improvement"],
        "losses": losses,
        "references": reference_losses(suite, losses["written"]),
    }


def trained(suite: Suite, fit: FitConfig, candidates: str = "all") -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        return merge(
            suite.checkpoints,
            suite.task,
            Path(folder) / "merged",
            fit=fit,
            data_config=DataConfig(seed=suite.seed),
            guard=GuardConfig(candidates=candidates),
        )


def layers_loss(suite: Suite) -> float:
    document = trained(suite, FitConfig(blocks="layers"), candidates="last,twa-layers")
    rows = document["candidates"]
    return float(next(c["test_loss"] for c in rows if c["name"] == "twa-layers"))


def chosen_loss(document: Mapping[str, Any]) -> float:
    name = document["chosen"]
    return float(next(c["test_loss"] for c in document["candidates"] if c["name"] == name))


def authors_loss(bench: Bench, suite: Suite) -> float:
    """Test loss of the authors' algorithm, tuned on the guard split of the same data."""
    parts = split(suite.task, GUARD_FRACTION, suite.seed)
    settings = Settings(learning_rates=bench.rates, epochs=bench.epochs, seed=suite.seed)
    found = open_checkpoints(suite.checkpoints)
    outcome = authors_twa(found, suite.task, parts.fit, parts.guard, settings)
    return test_loss(suite, outcome.state)


def test_loss(suite: Suite, state: Mapping[str, Tensor]) -> float:
    model = FlatModel(suite.task)
    # Tied tensors are saved once.
    model.module.load_state_dict(state, strict=False)
    return model.loss(suite.task.test_dataset(), 64)  # type: ignore[attr-defined]


def state_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {k: tensor_rows(checkpoint, k) for k in checkpoint.tensors}


def reference_losses(suite: Suite, written: float) -> dict[str, float]:
    """Test losses of the references; of later checkpoints only up to the first as good."""
    losses: dict[str, float] = {}
    for name, path in suite.references.items():
        if name.startswith("step ") and step_of(path) % 100:
            continue
        losses[name] = test_loss(suite, state_of(open_checkpoints([path])[0]))
        if name.startswith("step ") and losses[name] <= written:
            break
    return losses


def results(
    cache: Path, names: Sequence[str], seeds: int, known_only: bool
) -> Iterator[tuple[str, int, Any]]:
    """Measures what is missing, unless told not to, and yields the rest: suite, seed, result."""
    folder = cache / "results"
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        for name in names:
            path = folder / f"{name}-{seed}.json"
            if not path.exists():
                if known_only:
                    continue
                bench = BENCHES[name]
                found = measure(bench, bench.make(cache, seed))
                path.write_text(json.dumps(found, indent=1))
                say(f"{name}, seed {seed}: {found['chosen']}, {found['seconds']} s")
            yield name, seed, json.loads(path.read_text())


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def tables(found: Mapping[str, Sequence[Any]]) -> str:
    """Markdown: a table of mean losses, one column a suite, and what the bars come to."""
    names = list(found)
    lines = [
        "| mean test loss | " + " | ".join(f"{k} ({len(found[k])})" for k in names) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for row, title in ROWS.items():
        cells = [mean_of(found[name], row) for name in names]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += ["", "| suite | seed | written | chosen | last | uniform | best other row |"]
    lines += ["| --- | ---: | ---: | --- | ---: | ---: | --- |"]
    for name, runs in found.items():
        for seed, run in enumerate(runs):
            losses = run["losses"]
            others = {k: v for k, v in losses.items() if k != "written" and v is not None}
            best = min(others, key=lambda k: others[k])
            lines.append(
                f"| {name} | {seed} | {losses['written']:.4f} | {run['chosen']} "
                f"| {losses['last']:.4f} | {losses['uniform']:.4f} "
                f"| {ROWS[best]} {others[best]:.4f} |"
            )
    return "\n".join([*lines, "", *remarks(found)])


def mean_of(runs: Sequence[Any], row: str) -> str:
    values = [run["losses"].get(row) for run in runs]
    return "" if None in values else f"{statistics.fmean(values):.4f}"


def remarks(found: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    for run in found.get("annealing", []):
        last, decayed = run["losses"]["last"], run["references"]["decayed"]
        share = (last - run["losses"]["written"]) / (last - decayed)
        yield (
            f"- annealing: the really decayed run reaches {decayed:.4f}; the merge recovers "
            f"{share:.1%} of that gain over the last checkpoint."
        )
    for run in found.get("head", []):
        reached = {k: v for k, v in run["references"].items() if v <= run["losses"]["written"]}
        first = min(reached, key=lambda k: int(k.split()[1]), default=None)
        yield f"- head: the run itself gets as low as the merge of its first half at {first}."


def machine() -> str:
    return f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares ways of merging.")
    parser.add_argument("cache", type=Path)
    parser.add_argument("--suites", default=",".join(BENCHES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--known", action="store_true", help="only what CACHE holds already")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    arguments = parser.parse_args()
    names = arguments.suites.split(",")
    found: dict[str, list[Any]] = {name: [] for name in names}
    for name, _, result in results(arguments.cache, names, arguments.seeds, arguments.known):
        found[name].append(result)
    found = {name: runs for name, runs in found.items() if runs}
    text = f"{machine()}; number of seeds in parentheses.\n\n{tables(found)}\n"
    print(text)
    if arguments.write:
        before, _, rest = README.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        README.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


if __name__ == "__main__":
    main()
