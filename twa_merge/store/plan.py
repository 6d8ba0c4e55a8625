"""What a run will take, before anything is loaded: memory, passes over the files, minutes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..config import StoreConfig
from ..layout import Layout
from .memory import STAGED
from .needs import gram_bytes, model_bytes, own_dtype, passing_bytes, store_bytes
from .quantize import PLAIN

# Shares of the memory that a plan may fill; the rest goes to fragments, workspaces and neighbours.
DEVICE_SHARE = 0.92
HOST_SHARE = 0.85

# More processes than that are not thought of.
_DOUBLINGS = 12

NO_DTYPE_ON_DISK = "--store-dtype changes nothing on disk: the files are read as they are."


@dataclass(frozen=True)
class Rates:
    """Bytes a second that a plan counts on.

    The defaults are assumptions, not measurements: a local solid-state disk, two processor cores,
    PCIe 4, a data-centre GPU. Give measured ones where minutes matter.

    Attributes:
        files: read by one node.
        cpu, gpu: of offsets that one process projects or combines from its own memory.
        link: from host to device, per process.
    """

    files: float = 2e9
    cpu: float = 5e9
    gpu: float = 1e12
    link: float = 2e10


@dataclass(frozen=True)
class Work:
    """What a plan has to reckon with besides the checkpoints.

    Attributes:
        evaluations: of loss and gradient: a projection and a combination each. Default settings
            took 100 to 780 on runs of 12 to 60 checkpoints, most of them to choose the ridge, and
            the most where the loss is the hardest to minimise.
        combinations: further ones, for candidates: 200 to 300 there.
        pictures: further ones, of the fit's own offsets, for the report.
        seconds: forward and backward passes of one evaluation.
        activations: bytes they take at most, per process.
        whole_model: a process gathers all of the model at once, not a layer.
        layer_numel: numbers in the largest layer that is gathered by itself, and in what is not;
            None goes by the tensors' names.
    """

    evaluations: int = 200
    combinations: int = 250
    pictures: int = 0
    seconds: float = 0.0
    activations: int = 0
    whole_model: bool = False
    layer_numel: tuple[int, int] | None = None


@dataclass(frozen=True)
class Machine:
    """What there is: ``size`` processes, ``per_node`` of them on a node.

    Attributes:
        device_type: ``cpu`` or ``cuda``.
        device_memory: bytes of one GPU; None if there is none, or it is not known.
        host_memory: bytes of one node; None if not known.
    """

    size: int = 1
    per_node: int = 1
    device_type: str = "cpu"
    device_memory: int | None = None
    host_memory: int | None = None


@dataclass(frozen=True)
class Plan:
    """Where the offsets will live, and what that takes on the rank that takes most.

    Attributes:
        kind: ``device``, ``host`` or ``disk``.
        dtype: of the offsets; on disk, of the files.
        machine: that it was made for.
        device: bytes on the device by kind of use; empty where the device is the CPU.
        host: bytes in host memory by kind of use, per process.
        passes: over all checkpoint files, the first and the writing one included.
        minutes: expected, apart from what ``Work`` does not know.
        fits: as far as the memory is known.
        advice: what to know or to change, in sentences.
    """

    kind: str
    dtype: str
    machine: Machine
    device: Mapping[str, int]
    host: Mapping[str, int]
    passes: int
    minutes: float
    fits: bool
    advice: tuple[str, ...] = ()

    @property
    def device_total(self) -> int:
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())


def memory_plan(
    layout: Layout,
    n: int,
    machine: Machine,
    config: StoreConfig,
    *,
    work: Work | None = None,
    rates: Rates | None = None,
    shared: Mapping[str, bool] | None = None,
) -> Plan:
    """Chooses where the offsets live and says what everything takes. Looks at nothing else.

    What ``auto`` stands for, in this order, the first that fits: the checkpoints' own width on the
    device, then in host memory; 8 bits on the device, on the host; 4 bits likewise; the files.
    Quality comes first, so a slower place beats a narrower width. Files would be exact, but every
    evaluation reads them twice: 8 and 4 bits come before them, one bit is never chosen by itself.
    Before all that comes float32 for checkpoints in bfloat16, where it takes half of the device's
    memory at most: narrow offsets differ from what is written by a rounding in the last digit.

    Args:
        n: checkpoints.
        shared: tensors that every rank holds whole.
    """
    work, rates = work or Work(), rates or Rates()
    planner = _Planner(layout, n, work, rates, shared or {})
    exact = planner.roomy(machine, config)
    plans = [planner.plan(machine, kind, dtype) for kind, dtype in choices(layout, config, machine)]
    best = exact or next((plan for plan in plans if plan.fits), plans[-1])
    advice = planner.advice(best, config, wished=exact or plans[0])
    return dataclasses.replace(best, advice=tuple(advice))


def choices(layout: Layout, config: StoreConfig, machine: Machine) -> list[tuple[str, str]]:
    """Place and dtype, most wanted first. The CPU's own memory counts as the device."""
    own = own_dtype(layout)
    dtypes = (own, "int8", "int4") if config.dtype == "auto" else (config.dtype,)
    places = ("device", "host") if machine.device_type != "cpu" else ("device",)
    if config.kind != "auto":
        places = (config.kind,)
    found = [(place, dtype) for dtype in dtypes for place in places if place != "disk"]
    return [*found, ("disk", own)] if config.kind in ("auto", "disk") else found


@dataclass(frozen=True)
class _Planner:
    layout: Layout
    n: int
    work: Work
    rates: Rates
    shared: Mapping[str, bool]

    def plan(self, machine: Machine, kind: str, dtype: str) -> Plan:
        memory = model_bytes(
            self.layout,
            machine.size,
            self.shared,
            self.work.layer_numel,
            on_cpu=machine.device_type == "cpu",
            whole_model=self.work.whole_model,
        )
        memory["activations"] = self.work.activations
        held = {"offsets": 0, "centre": 0}
        if kind != "disk":
            held = store_bytes(self.layout, self.n, dtype, machine.size, self.shared)
        # Candidates are compared exactly: where the store rounds, by the files.
        again = kind == "disk" or dtype not in PLAIN
        judging = self.work.combinations if again else 0
        passing = {
            "slices in flight": passing_bytes(self.layout, self.n, again=again),
            "Gram matrices": gram_bytes(self.layout, self.n),
        }
        device: dict[str, int] = {}
        if machine.device_type == "cpu":
            host = memory | held | passing
        elif kind == "device":
            device, host = memory | held, passing
        else:
            host = held | passing
            device = memory | ({"offsets in flight": 2 * STAGED} if kind == "host" else {})
        fits = _fits(sum(device.values()), machine.device_memory, DEVICE_SHARE) and _fits(
            sum(host.values()) * machine.per_node, machine.host_memory, HOST_SHARE
        )
        fitting = 2 * self.work.evaluations + self.work.pictures
        passes = 2 + judging + (fitting if kind == "disk" else 0)
        touched = (fitting + self.work.combinations - judging) * sum(held.values())
        minutes = self._minutes(machine, kind, passes, touched)
        device, host = _without_zeros(device), _without_zeros(host)
        return Plan(kind, dtype, machine, device, host, passes, minutes, fits)

    def roomy(self, machine: Machine, config: StoreConfig) -> Plan | None:
        """float32 offsets on the device, where nothing narrower is asked for and half would do."""
        on_cpu = machine.device_type == "cpu"
        half, there = _half(machine), machine.host_memory if on_cpu else machine.device_memory
        if config.dtype != "auto" or config.kind not in ("auto", "device") or there is None:
            return None
        plan = self.plan(half, "device", "float32")
        return dataclasses.replace(plan, machine=machine) if plan.fits else None

    def advice(self, plan: Plan, config: StoreConfig, wished: Plan) -> Iterator[str]:
        machine = plan.machine
        if config.kind == "disk" and config.dtype != "auto":
            yield NO_DTYPE_ON_DISK
        if plan.device and machine.device_memory is None:
            yield f"Each GPU needs {gigabytes(plan.device_total)}; its memory is not known here."
        if machine.host_memory is None:
            needed = gigabytes(plan.host_total * machine.per_node)
            yield f"Each node needs {needed} of its own memory, which is not known here."
        if plan.fits and plan == wished:
            return
        where = "the GPU" if wished.device else "memory"
        needed = gigabytes(wished.device_total or wished.host_total)
        yield (
            f"With {wished.dtype} offsets a process needs {needed}, which is more than {where} has."
            if wished.kind != "disk"
            else f"Even with the offsets left on disk a process needs {needed}."
        )
        more = self._processes_for(wished)
        if more:
            yield f"{more} processes with as much memory each would hold it."
        if not plan.fits:
            yield from self._ways_out(plan, config, more)

    def _ways_out(self, plan: Plan, config: StoreConfig, more: int | None) -> Iterator[str]:
        fewest = self._processes_for(plan)
        if fewest is None and more is None:
            many = dataclasses.replace(plan.machine, size=plan.machine.size << _DOUBLINGS)
            least = self.plan(many, plan.kind, plan.dtype)
            needed = gigabytes(least.device_total or least.host_total)
            yield f"No number of processes would do: each needs {needed} at least."
        if plan.kind == "disk" and fewest and (more is None or fewest < more):
            yield f"{fewest} processes would do with the offsets left on disk."
        if self.work.whole_model:
            by_layer = dataclasses.replace(
                self, work=dataclasses.replace(self.work, whole_model=False)
            )
            if by_layer.plan(plan.machine, plan.kind, plan.dtype).fits:
                yield "--gather layer fits."
        tried = choices(self.layout, config, plan.machine)
        for kind, dtype in choices(self.layout, StoreConfig(), plan.machine):
            if (kind, dtype) not in tried and self.plan(plan.machine, kind, dtype).fits:
                option = "" if kind == "disk" else f" --store-dtype {dtype}"
                yield f"--store {kind}{option} fits."
        if plan.machine.size > 1 or fewest is None:
            yield "Layers are counted in float32: --precision bf16 gathers about half of that."
        yield (
            "What activations take comes on top; --activation-checkpointing and a smaller "
            "--batch-size lower it."
        )

    def _processes_for(self, wished: Plan) -> int | None:
        """The least doubling of the processes, on more nodes alike, with which ``wished`` fits."""
        machine = wished.machine
        for doubling in range(1, _DOUBLINGS + 1):
            more = dataclasses.replace(machine, size=machine.size << doubling)
            if self.plan(more, wished.kind, wished.dtype).fits:
                return more.size
        return None

    def _minutes(self, machine: Machine, kind: str, passes: int, touched: int) -> float:
        nodes = machine.size / machine.per_node
        saved = sum(self.layout[name].info.nbytes for name in self.layout.averaged)
        seconds = passes * self.n * saved / (self.rates.files * nodes)
        rate = self.rates.cpu if machine.device_type == "cpu" else self.rates.gpu
        seconds += touched / (rate if kind == "device" else min(rate, self.rates.link))
        return (seconds + self.work.evaluations * self.work.seconds) / 60


def gigabytes(nbytes: float) -> str:
    """``12.3 GB``, in powers of ten as the makers of memory cards and disks count."""
    if nbytes >= 1e12:
        return f"{nbytes / 1e12:.3g} TB"
    return f"{nbytes / 1e9:.3g} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.3g} MB"


def _fits(needed: int, there: int | None, share: float) -> bool:
    return there is None or needed <= share * there


def _half(machine: Machine) -> Machine:
    device, host = machine.device_memory, machine.host_memory
    return dataclasses.replace(
        machine,
        device_memory=None if device is None else device // 2,
        host_memory=None if host is None else host // 2,
    )


def _without_zeros(uses: Mapping[str, int]) -> dict[str, int]:
    return {use: nbytes for use, nbytes in uses.items() if nbytes}
