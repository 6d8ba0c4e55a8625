"""The memory plan: arithmetic by hand, the order of choices, and what a machine says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import LinearTask, save_run

from twa_merge import inspect
from twa_merge.checkpoints.base import TensorInfo
from twa_merge.config import EngineConfig, StoreConfig
from twa_merge.distributed import World
from twa_merge.dtypes import DTYPES
from twa_merge.errors import ConfigError
from twa_merge.layout import Entry, Layout
from twa_merge.store import Machine, Rates, Work, gathering, memory_plan, this_machine
from twa_merge.store.limits import host_memory
from twa_merge.store.plan import gigabytes

GB = 10**9
# 24 layers of 40 M numbers and 80 M outside: 1.04 G numbers, in rows of 4,096.
NUMBERS = 24 * 40_960_000 + 81_920_000
LAYER, ROOT = 40_960_000, 81_920_000
N = 16


def layout_of(dtype=DTYPES["bfloat16"]) -> Layout:
    entries = {"embed.weight": Entry("embed.weight", TensorInfo((20_000, 4096), dtype), True)}
    for i in range(24):
        name = f"model.layers.{i}.weight"
        entries[name] = Entry(name, TensorInfo((10_000, 4096), dtype), True)
    entries["tied"] = Entry("tied", TensorInfo((20_000, 4096), dtype), True, tied_to="embed.weight")
    entries["step"] = Entry("step", TensorInfo((), DTYPES["int64"]), False)
    return Layout(entries)


def plan_for(machine: Machine, config: StoreConfig | None = None, dtype=DTYPES["bfloat16"], **more):
    return memory_plan(layout_of(dtype), N, machine, config or StoreConfig(), **more)


def gpus(size: int = 1, memory: float = 80, host: float | None = 1000) -> Machine:
    on_host = None if host is None else int(host * GB)
    return Machine(size, min(size, 8), "cuda", int(memory * GB), on_host)


def test_bytes_by_kind_on_one_gpu():
    plan = plan_for(gpus(), work=Work(activations=5 * GB))
    assert (plan.kind, plan.dtype, plan.fits, plan.advice) == ("device", "bfloat16", True, ())
    assert plan.device == {
        "parameters": 4 * NUMBERS + 8,
        "gradients": 4 * NUMBERS,
        "activations": 5 * GB,
        "offsets": 2 * N * NUMBERS,
        "centre": 4 * NUMBERS,
    }
    assert plan.passes == 2


def test_bytes_fall_with_the_number_of_ranks():
    plan = plan_for(gpus(8))
    assert plan.device["offsets"] == 4 * N * NUMBERS // 8
    assert plan.device["parameters"] == 4 * NUMBERS // 8 + 8
    assert plan.device["gathered layer"] == 4 * (3 * LAYER + 2 * ROOT)
    shared = plan_for(gpus(8), shared={"embed.weight": True})
    more = 4 * (ROOT - ROOT // 8)
    assert shared.device["parameters"] == plan.device["parameters"] + more


def test_a_model_that_is_gathered_whole_does_not_get_smaller_with_the_ranks():
    """All parameters, all gradients before they are summed, and a layer that is being summed."""
    plan = plan_for(gpus(8), work=Work(whole_model=True))
    assert plan.device["gathered model"] == 4 * (2 * NUMBERS + LAYER)
    assert "gathered layer" not in plan.device
    assert not {"gathered model", "gathered layer"} & set(
        plan_for(gpus(), work=Work(whole_model=True)).device
    )


# Over 8 processes: 1.06 GB of parameters and gradients, 9.05 GB of offsets in float32 and centre,
# 8.68 GB of the gathered model: 18.80 GB.
@pytest.mark.parametrize(
    ("machine", "store", "engine", "expected"),
    [
        (gpus(8), StoreConfig(), EngineConfig(), "model"),
        (gpus(8, memory=41), StoreConfig(), EngineConfig(), "model"),
        (gpus(8, memory=40.8), StoreConfig(), EngineConfig(), "layer"),
        # Offsets on the host leave the GPU to the model.
        (gpus(8, memory=23), StoreConfig("host"), EngineConfig(), "model"),
        (gpus(8, memory=21), StoreConfig("disk"), EngineConfig(), "layer"),
        (gpus(8), StoreConfig(), EngineConfig(gather="layer"), "layer"),
        (gpus(8, memory=1), StoreConfig(), EngineConfig(gather="model"), "model"),
        (gpus(8), StoreConfig(), EngineConfig(precision="bf16"), "layer"),
        (gpus(1), StoreConfig(), EngineConfig(), "layer"),
        (Machine(8, 8, "cuda"), StoreConfig(), EngineConfig(), "layer"),
        (Machine(8, 8, "cpu", None, 10**13), StoreConfig(), EngineConfig(), "layer"),
    ],
)  # fmt: skip
def test_gpus_gather_the_whole_model_where_there_is_ample_room(machine, store, engine, expected):
    assert gathering(layout_of(), N, machine, store, engine) == expected


def test_only_files_that_are_read_again_and_again_are_copied_into_memory():
    row = 16 * N * 4096
    grams = 4 * 8 * N**2 * 25  # exact and stored ones of each tensor, and the axes of both
    assert plan_for(gpus()).host == {
        "slices in flight": (16 << 20) + row,
        "Gram matrices": grams,
    }
    for config in (StoreConfig("disk"), StoreConfig("device", "int8"), StoreConfig("host", "int1")):
        assert plan_for(gpus(), config).host["slices in flight"] == (64 << 20) + row


@pytest.mark.parametrize(
    ("memory", "host", "kind", "dtype"),
    [
        (60, 1000, "device", "bfloat16"),
        (40, 1000, "host", "bfloat16"),
        (40, 30, "device", "int8"),
        (30, 30, "host", "int8"),
        (30, 20, "device", "int4"),
        (15, 30, "host", "int8"),
        (15, 17, "host", "int4"),
        (12, 2, "disk", "bfloat16"),
    ],
)
def test_auto_puts_width_before_place_and_disk_last(memory, host, kind, dtype):
    plan = plan_for(gpus(memory=memory, host=host))
    assert (plan.kind, plan.dtype, plan.fits) == (kind, dtype, True)
    # Whoever does not get the first choice is told what would.
    assert bool(plan.advice) == (kind != "device" or dtype != "bfloat16")


def test_the_checkpoints_own_width():
    assert plan_for(gpus(memory=200), dtype=DTYPES["float32"]).dtype == "float32"
    assert plan_for(gpus(memory=100), dtype=DTYPES["float16"]).dtype == "float32"
    assert plan_for(gpus(memory=100)).dtype == "bfloat16"
    # Where there is room the offsets are exact.
    for roomy in (gpus(memory=200), Machine(1, 1, "cpu", None, 220 * GB)):
        plan = plan_for(roomy)
        assert (plan.kind, plan.dtype, plan.machine, plan.advice) == (
            "device",
            "float32",
            roomy,
            (),
        )
    (unknown,) = plan_for(gpus(memory=200, host=None)).advice
    assert "Each node needs" in unknown
    assert plan_for(gpus(memory=200), StoreConfig("host")).dtype == "bfloat16"
    assert plan_for(Machine(1, 1, "cpu", None, None)).dtype == "bfloat16"


def test_a_cpu_has_one_memory():
    plan = plan_for(Machine(2, 2, "cpu", None, 100 * GB))
    assert (plan.kind, plan.dtype, dict(plan.device)) == ("device", "bfloat16", {})
    assert plan.host["offsets"] == 2 * N * NUMBERS // 2
    # Sums of all batches' gradients are in float64 there.
    assert plan.host["gradients"] == 8 * NUMBERS // 2
    # Both processes share the node.
    assert plan_for(Machine(2, 2, "cpu", None, 50 * GB)).dtype == "int8"
    assert plan_for(Machine(2, 1, "cpu", None, 50 * GB)).dtype == "bfloat16"


def test_disk_takes_no_memory_for_offsets_and_a_pass_for_every_operation():
    plan = plan_for(gpus(), StoreConfig("disk"), work=Work(evaluations=10, combinations=7))
    assert "offsets" not in plan.device | plan.host
    assert "centre" not in plan.device | plan.host
    assert plan.passes == 2 + 2 * 10 + 7
    work = Work(evaluations=10, combinations=7, pictures=81)
    assert plan_for(gpus(), StoreConfig("disk"), work=work).passes == 2 + 2 * 10 + 7 + 81
    assert plan_for(gpus(), work=work).passes == 2


def test_candidates_of_a_packed_store_are_compared_by_the_files():
    work, rates = Work(evaluations=10, combinations=7), Rates(files=1e9, gpu=1e10)
    plan = plan_for(gpus(), StoreConfig("device", "int8"), work=work, rates=rates)
    assert plan.passes == 2 + 7
    held = plan.device["offsets"] + plan.device["centre"]
    assert plan.minutes == pytest.approx((9 * saved_of() / 1e9 + 20 * held / 1e10) / 60)


def test_minutes_from_given_rates():
    rates = Rates(files=1e9, gpu=1e10, link=1e9)
    work = Work(evaluations=10, combinations=0, seconds=3.0)
    plan = plan_for(gpus(), work=work, rates=rates)
    touched = 20 * (2 * N + 4) * NUMBERS
    assert plan.minutes == pytest.approx((2 * saved_of() / 1e9 + touched / 1e10 + 30) / 60)
    on_disk = plan_for(gpus(), StoreConfig("disk"), work=work, rates=rates)
    assert on_disk.minutes == pytest.approx((22 * saved_of() / 1e9 + 30) / 60)


def saved_of() -> int:
    """Bytes in the files: the tied tensor's name stands in every one of them as well."""
    return 2 * N * (NUMBERS + ROOT)


def test_what_does_not_fit_says_what_would():
    plan = plan_for(gpus(memory=20), StoreConfig("device", "bfloat16"))
    assert not plan.fits
    text = " ".join(plan.advice)
    assert "more than the GPU has" in text
    assert "4 processes" in text
    assert "--store host --store-dtype bfloat16 fits" in text
    assert "--store disk fits" in text
    hopeless = plan_for(gpus(memory=1, host=1))
    assert not hopeless.fits
    assert hopeless.kind == "disk"


def test_the_fewest_processes_and_gathering_by_layer_are_ways_out():
    """1.065 G numbers over k processes: 8.52 GB / k on disk, 46.9 GB / k on the device, and 1.15 GB
    of gathered layer; 3.68 of 4 GB may be filled."""
    text = " ".join(plan_for(gpus(memory=4)).advice)
    assert "32 processes with as much memory each would hold it" in text
    assert "4 processes would do with the offsets left on disk" in text
    assert "No number of processes" not in text
    # What is gathered by layer stays.
    text = " ".join(plan_for(gpus(8, memory=1)).advice)
    assert "No number of processes would do: each needs 1.15 GB at least" in text
    whole = plan_for(gpus(8, memory=8), work=Work(whole_model=True))
    assert not whole.fits
    assert any("--gather layer fits" in line for line in whole.advice)
    assert not any("--gather" in line for line in plan_for(gpus(8, memory=1)).advice)


def test_large_figures_are_readable():
    assert gigabytes(2.21e12) == "2.21 TB"
    assert gigabytes(233e9) == "233 GB"
    assert gigabytes(69.2e6) == "69.2 MB"


def test_memory_that_is_not_known_is_said_to_be_needed():
    plan = plan_for(gpus(memory=40, host=None))
    assert (plan.kind, plan.fits) == ("host", True)
    assert any("which is not known here" in line for line in plan.advice)


def test_this_machine_knows_its_memory():
    machine = this_machine(World())
    assert (machine.size, machine.per_node, machine.device_type) == (1, 1, "cpu")
    assert machine.host_memory is None or machine.host_memory > 1 << 20


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = "MemTotal:  9000 kB\nMemFree:  100 kB\nMemAvailable:  8000 kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/meminfo": MEMINFO}, 8_192_000),
        (  # version 2: the group around has less left, and its cached files count as free
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
                "sys/fs/cgroup/job/step/memory.current": "5\n",
                "sys/fs/cgroup/job/memory.max": "1000000\n",
                "sys/fs/cgroup/job/memory.current": "600000\n",
                "sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 200000\n",
            },
            600_000,
        ),
        (  # version 1, in a container that shows its own group as the root
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/docker/abc\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "500000\n",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 100\n",
            },
            1_500_100,
        ),
        ({"proc/self/cgroup": "garbage\n"}, None),
        ({}, None),
    ],
)
def test_the_least_of_all_limits_counts(tmp_path, files, expected):
    write(tmp_path, files)
    assert host_memory(root=tmp_path) == expected


def test_resource_limits_hold_for_each_process(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    limits = {resource.RLIMIT_AS: 3_000_000, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], limits[kind]))
    write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/status": "VmSize:\t  1000 kB\n"})
    assert host_memory(1, tmp_path) == 3_000_000 - 1_024_000
    assert host_memory(3, tmp_path) == 3 * (3_000_000 - 1_024_000)


def test_inspect_plans_for_gpus_for_this_cpu_and_for_a_gathered_model(tmp_path):
    save_run(tmp_path / "run", LinearTask().states(2))

    def bytes_of(**wanted: object) -> dict[str, dict[str, int]]:
        plan = inspect([tmp_path / "run"], plan=wanted)["plan"]
        return {place: plan[f"{place} bytes per process"] for place in ("device", "host")}

    wanted = {"gpus": 2, "store": "host", "store_dtype": "int4"}
    packed = inspect([tmp_path / "run"], plan=wanted)["plan"]
    assert (packed["store"], packed["store dtype"]) == ("host", "int4")
    # Evaluations, candidates, and the report's picture of the loss.
    little = inspect([tmp_path / "run"], plan={"gpus": 1, "gpu_memory": 1})["plan"]
    work = Work()
    passes = 2 + 2 * work.evaluations + work.combinations + 81
    assert little["passes over the files"] == passes
    assert any(f"read some {passes} times" in sentence for sentence in little["advice"])
    numbers = sum(t.numel() for t in LinearTask().states(1)[0].values())
    assert set(bytes_of(gpus=0)["device"]) == {"total"}
    assert bytes_of(gpus=0)["host"]["parameters"] == 4 * numbers
    assert "gathered layer" in bytes_of(gpus=2)["device"]
    assert "gathered model" in bytes_of(gpus=2, gather="model")["device"]
    assert "gathered model" in bytes_of(gpus=2, gpu_memory=GB)["device"]
    assert "gathered layer" in bytes_of(gpus=2, gpu_memory=GB, gather="layer")["device"]


def test_gpus_are_on_one_node_unless_nodes_are_named(tmp_path):
    save_run(tmp_path / "run", LinearTask().states(2))

    def plan(**wanted: object) -> dict[str, object]:
        return inspect([tmp_path / "run"], plan=wanted)["plan"]

    def on_host(found: dict[str, object]) -> str:
        return next(s for s in found["advice"] if s.startswith("Each node"))

    assert (plan(gpus=16)["nodes"], plan(gpus=16, nodes=2)["nodes"]) == (1, 2)
    assert on_host(plan(gpus=16)) != on_host(plan(gpus=16, nodes=2))
    assert plan(gpus=0)["nodes"] == 1


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"gpus": 0, "gpu_memory": GB}, "a plan for GPUs"),
        ({"gpu_memory": GB}, "a plan for GPUs"),
        ({"gpus": 0, "nodes": 2}, "a plan for GPUs"),
        ({"gpus": 2, "nodes": 3}, "more nodes than GPUs"),
    ],
)
def test_plans_that_contradict_themselves_are_refused(tmp_path, wanted, said):
    with pytest.raises(ConfigError, match=said):
        inspect([tmp_path / "nowhere"], plan=wanted)
