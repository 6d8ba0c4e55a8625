"""The two large parts of ``inspect``: the geometry of the checkpoints, and the memory plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .console import plain
from .figures import amount, duration, number, size
from .pictures import bars, distance_map, fitted, new_table

# Directions beyond this are noise to the eye; the document has them all.
_MOST_DIRECTIONS = 16


def show_geometry(geometry: Mapping[str, Any], labels: list[str], console: Console) -> None:
    """Distances as a shaded square, each checkpoint against the mean, the spectrum as bars."""
    width, ascii_only = console.width, console.options.ascii_only
    console.print(Text("Distance between checkpoints", "bold"))
    for line in distance_map(labels, geometry["distances"], width=width, ascii_only=ascii_only):
        console.print(line)
    console.print(fitted(_table(geometry, labels), width))
    shares = [share for share in geometry["spectrum"] if share is not None]
    rank = geometry["rank"]
    shown = shares[: max(1, min(rank, _MOST_DIRECTIONS))]
    console.print(Text("Share of the variance by direction", "bold"))
    names = [f"direction {k + 1}" for k in range(len(shown))]
    if shown:
        for line in bars(names, shown, width=min(width, 80), ascii_only=ascii_only):
            console.print(line)
    if len(shown) < rank:
        console.print(
            Text(f"  and {rank - len(shown)} more: {sum(shares[len(shown) :]):.4f}", "dim")
        )
    error = geometry.get("orthogonality_error")
    said = f"\nrank {rank} from {len(labels)} checkpoints"
    if error is not None:
        said += f"; the basis is orthonormal within {error:.1e}"
    console.print(Text(said))


def _table(geometry: Mapping[str, Any], labels: Sequence[str]) -> Table:
    # Offsets are what is left of checkpoints without their mean.
    table = new_table(
        "checkpoint", "norm", "distance to mean", "to the one before", "cosine of offsets"
    )
    distances, cosines = geometry["distances"], geometry["cosines"]
    for i, label in enumerate(labels):
        table.add_row(
            Text(label),
            f"{geometry['norms'][i]:.4g}",
            f"{geometry['distance_to_mean'][i]:.4g}",
            f"{distances[i][i - 1]:.4g}" if i else "",
            number(cosines[i][i - 1], 3) if i else "",
        )
    return table


def show_plan(plan: Mapping[str, Any], console: Console) -> None:
    """Whatever the plan says, one line a figure; bytes and seconds as people read them."""
    console.print(Text("\nMemory plan", "bold"))
    _show_level(plan, console, "  ")


def _show_level(level: Mapping[str, Any], console: Console, indent: str) -> None:
    width = max((len(str(key)) for key in level), default=0)
    for key, value in level.items():
        name = plain(key).replace("_", " ").replace("minutes", "time")
        if isinstance(value, Mapping):
            if not any(value.values()):
                continue  # the CPU is no device of its own
            console.print(Text(f"{indent}{name}"))
            _show_level(
                {k: _read(f"{key}_{k}" if "bytes" in str(key) else k, v) for k, v in value.items()},
                console,
                indent + "  ",
            )
        elif isinstance(value, (list, tuple)):
            for sentence in value:
                console.print(Text.assemble(indent, (f"{name}: ", "yellow"), plain(sentence)))
        else:
            console.print(Text(f"{indent}{name:<{width}}  {plain(_read(str(key), value))}"))


def _read(key: str, value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return value
    if "bytes" in key or "memory" in key:
        return size(value)
    if "minutes" in key:
        return f"{duration(60 * value)}, and forward and backward passes on top"
    if "seconds" in key:
        return duration(value)
    return amount(value) if isinstance(value, int) else f"{value:.3g}"
