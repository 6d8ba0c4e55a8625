"""How much memory this process may still take."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch


def device_memory(device: torch.device) -> int | None:
    """Bytes of the GPU that are free or held by this process; None for a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def host_memory(processes: int = 1, root: Path = Path("/")) -> int | None:
    """Bytes that all of this run's processes on this node may still take together.

    The least of what the system has available, what the control groups leave (version 2 and 1),
    and what resource limits leave to each process.

    Args:
        processes: of this run on this node.
        root: where /proc and /sys are.

    Returns:
        None where none of it can be read.
    """
    found = [
        *_available(root),
        *_groups(root),
        *(processes * left for left in _resources(root)),
    ]
    return max(0, min(found)) if found else None


def _available(root: Path) -> Iterator[int]:
    table = _table(root / "proc/meminfo")
    if "MemAvailable" in table:
        yield table["MemAvailable"] * 1024
    elif root == Path("/"):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _groups(root: Path) -> Iterator[int]:
    mounted = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, found, path = rest.partition(":")
        if not found:
            continue
        if controllers == "":
            yield from _group(mounted, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _group(mounted / "memory", path, *names)


def _group(mounted: Path, path: str, limit: str, usage: str, cached: str) -> Iterator[int]:
    """What a group and the groups around it leave; inside a container only the root may show."""
    inner = mounted / path.lstrip("/")
    for folder in (inner, *inner.parents):
        if folder == mounted or mounted in folder.parents:
            most, used = _number(folder / limit), _number(folder / usage)
            if most is not None and used is not None:
                # Cached files are given up before anybody is refused memory.
                yield most - used + _table(folder / "memory.stat").get(cached, 0)


def _resources(root: Path) -> Iterator[int]:
    """What resource limits leave to this process."""
    try:
        import resource
    except ImportError:  # Windows
        return
    status = _table(root / "proc/self/status")
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            yield most - status.get(used, 0) * 1024


def _table(path: Path) -> dict[str, int]:
    """``Name: 123 kB`` or ``name 123`` by lines; lines of another kind are left out."""
    table = {}
    for line in _read(path).splitlines():
        name, *value = line.replace(":", " ").split() or [""]
        if value and value[0].isdigit():
            table[name] = int(value[0])
    return table


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
