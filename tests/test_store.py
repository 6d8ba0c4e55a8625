"""Stores against float64 sums that know nothing of tiles, slices, packing or files."""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from runs import save_run, states_of
from torch import Tensor

from twa_merge.checkpoints import open_checkpoints
from twa_merge.config import StoreConfig
from twa_merge.distributed import World
from twa_merge.errors import CheckpointError
from twa_merge.layout import global_block, make_layout, tensor_blocks
from twa_merge.progress import Noted
from twa_merge.store import fused, kernels, make_store, native
from twa_merge.store.fused import Fused, combine_tiles, grouped, in_order, project_tiles
from twa_merge.store.kernels import Kernels
from twa_merge.store.native import Native
from twa_merge.store.quantize import GROUP_BYTES, pack, planes, unpack
from twa_merge.store.tiles import Tiles, allocate, footprint, tile_width
from twa_merge.stream import row_slices

WIDTHS = ("float32", "bfloat16", "int8", "int4", "int1")
# Rows that no group divides, shorter than a group, whole tiles only, tiles and a rest, single
# numbers, nothing.
SHAPES = {
    "odd": (37, 9, 33),
    "short": (150, 127),
    "even": (12, 4096),
    "flat": (9000,),
    "few": (7,),
    "one": (),
    "no": (0, 3),
}
N = 5


class Offsets:
    """A run's checkpoints on disk, and centre and offsets in float64."""

    def __init__(self, folder: Path, *, n: int = N, dtype=torch.float32, shapes=None) -> None:
        self.states = states_of(n, shapes=shapes or SHAPES, dtype=dtype, scale=0.01)
        save_run(folder, self.states)
        self.checkpoints = open_checkpoints([folder])
        self.layout = make_layout(self.checkpoints)
        self.blocks = tensor_blocks(self.layout)
        self.names = list(self.states[0])
        weights = {
            k: torch.stack([s[k].double().flatten() for s in self.states]) for k in self.names
        }
        self.weights = weights
        self.centre = {k: w.mean(0) for k, w in weights.items()}
        self.delta = {k: w - self.centre[k] for k, w in weights.items()}

    def store(self, kind="device", dtype="float32", *, world=None, **more):
        world = world or World()
        config = StoreConfig(kind, dtype)
        store = make_store(self.checkpoints, self.layout, self.blocks, world, config, **more)
        self.fill(store, row_slices(self.layout, self.names, share=world.share))
        return store

    def fill(self, store, slices) -> None:
        for cut in slices:
            size = self.layout[cut.name].info.row_numel
            where = slice(cut.start * size, cut.stop * size)
            offsets = self.delta[cut.name][:, where].clone()
            store.put(cut, self.centre[cut.name][where], offsets)
            # A store may not keep what it was given: the streaming pass uses it again.
            offsets.fill_(float("nan"))

    def gradients(self, seed: int = 1) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            k: torch.randn(s.shape, generator=generator, dtype=torch.float32)
            for k, s in self.states[0].items()
        }

    def projected(self, delta, gradients) -> Tensor:
        return torch.stack([delta[k] @ gradients[k].double().flatten() for k in self.blocks.names])

    def combined(self, delta, alphas: Tensor, name: str) -> Tensor:
        alpha = alphas[self.blocks.index[name] if len(alphas) > 1 else 0]
        total = alpha.sum()
        return total * self.centre[name] + (alpha - total / len(alpha)) @ delta[name]


@pytest.fixture(scope="module")
def offsets(tmp_path_factory) -> Offsets:
    return Offsets(tmp_path_factory.mktemp("run"))


def targets_like(states) -> dict[str, Tensor]:
    return {k: torch.full_like(s, float("nan"), dtype=torch.float32) for k, s in states.items()}


def alphas_of(blocks: int, n: int = N, seed: int = 2) -> Tensor:
    """Any coefficients that add up to one."""
    alphas = torch.randn(
        blocks, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return alphas + (1 - alphas.sum(1, keepdim=True)) / n


def rounded(numbers: Tensor, shape: tuple[int, ...], dtype: str) -> Tensor:
    """One offset as a store of this width keeps it, row by row, group by group."""
    numbers = numbers.float()
    rows = numbers.view(shape).flatten(1) if len(shape) > 1 else numbers[:, None]
    width = rows.shape[1]
    if dtype in GROUP_BYTES and -(-width // 128) * (GROUP_BYTES[dtype] + 4) >= 2 * width:
        dtype = "bfloat16"
    if dtype in ("float32", "bfloat16") or not numbers.numel():
        return numbers.to(getattr(torch, dtype, torch.float32)).double()
    groups = []
    for group in (group for row in rows for group in row.split(128)):
        if dtype == "int1":
            norm = group.square().mean().sqrt()
            groups.append(torch.where(group >= 0, norm, -norm).double())
        else:
            scale = group.abs().max() / (127 if dtype == "int8" else 7)
            groups.append((group / scale).round().double() * scale.double())
    return torch.cat(groups)


def kept(offsets: Offsets, dtype: str) -> dict[str, Tensor]:
    shapes = {k: tuple(s.shape) for k, s in offsets.states[0].items()}
    return {
        k: torch.stack([rounded(x, shapes[k], dtype) for x in d]) for k, d in offsets.delta.items()
    }


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


def project_and_combine(offsets, store, dtype: str) -> None:
    """A store against float64, block by block and tensor by tensor."""
    delta, gradients = kept(offsets, dtype), offsets.gradients()
    found, expected = store.project(gradients), offsets.projected(delta, gradients)
    assert found.dtype == torch.float64
    for block in range(len(offsets.blocks)):
        close(found[block], expected[block], 4e-6)
    alphas, targets = alphas_of(len(offsets.blocks)), targets_like(offsets.states[0])
    store.combine(alphas, targets)
    for name, target in targets.items():
        close(target.flatten().double(), offsets.combined(delta, alphas, name), 1e-6)


@pytest.mark.parametrize("dtype", WIDTHS)
def test_project_and_combine_in_every_width(offsets, dtype):
    project_and_combine(offsets, offsets.store(dtype=dtype), dtype)


@pytest.fixture(params=[torch.float64, torch.bfloat16])
def default_dtype(request):
    """What a task's file may have set for all of torch."""
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", WIDTHS)
def test_torch_may_default_to_another_dtype(offsets, default_dtype, dtype, compiled):
    project_and_combine(offsets, offsets.store(dtype=dtype, compiled=compiled), dtype)


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize(("numel", "threads"), [(100, 1), (130, 4), (5000, 4)])
def test_what_is_stored_does_not_depend_on_how_it_came(offsets, dtype, numel, threads):
    config = StoreConfig("device", dtype)
    store = make_store(offsets.checkpoints, offsets.layout, offsets.blocks, World(), config)
    slices = row_slices(offsets.layout, offsets.names, numel=numel)
    random.Random(0).shuffle(slices)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda k: offsets.fill(store, slices[k::threads]), range(threads)))
    gradients, in_order = offsets.gradients(), offsets.store(dtype=dtype)
    assert torch.equal(store.project(gradients), in_order.project(gradients))
    first, second = targets_like(offsets.states[0]), targets_like(offsets.states[0])
    store.combine(alphas_of(1), first)
    in_order.combine(alphas_of(1), second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def tiles_of(dtype: str, n: int, u: int, width: int) -> tuple[Tiles, Tensor]:
    """Random tiles, and their numbers (u, n, width) in float32."""
    x = torch.randn(u, n, width, generator=torch.Generator().manual_seed(0))
    if dtype not in GROUP_BYTES:
        data = x.to(getattr(torch, dtype))
        return Tiles(data, None, width), data.float()
    data, scales = pack(x.unflatten(-1, (-1, 128)).transpose(1, 2).contiguous(), dtype)
    groups = unpack(data, scales, dtype, torch.empty(u, width // 128, n, 128))
    return Tiles(data, scales, width), groups.transpose(1, 2).flatten(2)


def random_vectors(u: int, n: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient and centre (u, width), and coefficients (n,)."""
    generator = torch.Generator().manual_seed(1)
    gradient, centre = torch.randn(2, u, width, generator=generator)
    return gradient, centre, torch.randn(n, generator=generator)


def agree_with_sums(fast, tiles: Tiles, numbers: Tensor) -> None:
    """Project and combine against float64."""
    u, n, width = numbers.shape
    g, c, beta = random_vectors(u, n, width)
    x = numbers.double()
    for row in (width, 1):  # a tile of one row, and of many
        close(fast.project(tiles, g, row), torch.einsum("unt,ut->un", x, g.double()), 1e-6)
    out = torch.full_like(c, float("nan"))
    fast.combine(tiles, c, beta, torch.tensor([0.5]), out)
    expected = 0.5 * c.double() + torch.einsum("unt,n->ut", x, beta.double())
    close(out.double(), expected, 2e-6)


@pytest.fixture(scope="module", params=["this", "any"])
def processor(request):
    """The C kernels as made for this processor, and as made for any of its kind."""
    patch = pytest.MonkeyPatch()
    if request.param == "any":
        patch.setattr(native, "_WANTED", ((),))
    native._library.cache_clear()
    yield request.param
    patch.undo()
    native._library.cache_clear()


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize(
    ("n", "u", "width"), [(1, 40, 128), (8, 3, 1024), (13, 5, 384), (49, 2, 0)]
)
def test_c_kernels(processor, dtype, n, u, width):
    agree_with_sums(Native(dtype), *tiles_of(dtype, n, u, width or tile_width(dtype)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [1, 31, 65, 1151])
def test_c_kernels_on_plain_tiles_of_any_width(processor, dtype, width):
    agree_with_sums(Native(dtype), *tiles_of(dtype, 3, 2, width))


@pytest.mark.parametrize("dtype", WIDTHS)
def test_c_kernels_give_the_same_on_any_number_of_threads(dtype, monkeypatch):
    monkeypatch.setattr(native, "_A_THREADS", 1)
    tiles, _ = tiles_of(dtype, 6, 7, tile_width(dtype))
    g, c, beta = random_vectors(7, 6, tiles.width)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        out = torch.empty_like(c)
        Native(dtype).combine(tiles, c, beta, torch.tensor([1.0]), out)
        found.append((Native(dtype).project(tiles, g, 1), out))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize(("n", "together"), [(8, 1), (8, 4), (6, 4), (7, 16), (21, 16), (65, 4)])
def test_expressions_for_the_compiler(dtype, n, together):
    """The same functions that torch.compile gets, run as they stand."""
    tiles, numbers = tiles_of(dtype, n, 3, 4096)
    g, c, beta = random_vectors(3, n, 4096)
    x, scales = numbers.double(), tiles.scales
    close(
        in_order(project_tiles(tiles.data, scales, g, dtype, together)).double(),
        torch.einsum("unt,ut->un", x, g.double()),
        1e-6,
    )
    shape, weight = grouped(dtype, 4096), beta if scales is None else scales * beta
    out = torch.empty_like(c)
    views = c.unflatten(-1, shape), torch.tensor([0.5]), out.unflatten(-1, shape)
    combine_tiles(tiles.data, weight, planes(dtype, tiles.data.device), *views)
    close(out.double(), 0.5 * c.double() + torch.einsum("unt,n->ut", x, beta.double()), 1e-6)


@pytest.mark.parametrize(("dtype", "largest"), [("int8", 127), ("int4", 7), ("int1", 1)])
def test_every_value_survives_in_every_place(dtype, largest):
    """Whole numbers from −largest to largest, at each of the 128 places of a group."""
    values = torch.arange(-largest, largest + 1, 2 if dtype == "int1" else 1)
    numbers = values[(torch.arange(128) + torch.arange(len(values))[:, None]) % len(values)].float()
    # So that the scale is 1 in every group.
    numbers[:, 0] = largest * numbers[:, 0].sign() + (numbers[:, 0] == 0) * largest
    for place in range(128):
        moved = numbers.roll(place, 1)
        packed, scale = pack(moved, dtype)
        assert packed.shape[-1] * packed.itemsize == GROUP_BYTES[dtype]
        assert torch.equal(unpack(packed, scale, dtype, torch.empty_like(moved)), moved)


@pytest.mark.parametrize("dtype", ["int8", "int4", "int1"])
@pytest.mark.parametrize("rows", [1, 7, 8, 29])
def test_groups_of_all_offsets_lie_side_by_side(dtype, rows):
    """Rows of 3 groups, the last not filled, put one or two at a time from the end."""
    numel, n = 300, 3
    offsets = torch.randn(n, rows, numel, generator=torch.Generator().manual_seed(0))
    held = allocate(rows, numel, n, dtype, lambda shape, kind: torch.empty(shape, dtype=kind))
    for row in range(rows - rows % 2, -1, -2):
        some = offsets[:, row : row + 2].flatten(1)
        if some.numel():
            held.put(row, some[0], some)
    assert held.missing == 0
    widened = torch.nn.functional.pad(offsets, (0, 384 - numel)).unflatten(-1, (3, 128))
    packed, scales = pack(widened, dtype, torch.tensor([128.0, 128.0, 44.0]))
    data = torch.cat([part.tiles.data.flatten(0, 1) for part in held.parts])
    assert torch.equal(data, packed.flatten(1, 2).transpose(0, 1))
    found = torch.cat([part.tiles.scales.flatten(0, 1) for part in held.parts])
    assert torch.equal(found, scales.flatten(1).T)


@pytest.mark.parametrize("dtype", WIDTHS)
def test_fast_kernels_agree_with_eager_ones(offsets, dtype):
    notes = []
    fast = offsets.store(dtype=dtype, compiled=True, progress=notes.append)
    eager = offsets.store(dtype=dtype, compiled=False)
    gradients, alphas = offsets.gradients(), alphas_of(1)
    close(fast.project(gradients), eager.project(gradients), 1e-6)
    mine, other = targets_like(offsets.states[0]), targets_like(offsets.states[0])
    fast.combine(alphas, mine)
    eager.combine(alphas, other)
    for name in offsets.names:
        torch.testing.assert_close(mine[name], other[name], rtol=1e-5, atol=1e-6)
    assert notes == []


def test_torch_compile_takes_the_expressions():
    """Those for GPUs, compiled for this CPU."""
    dtype = "int4"
    compiled = Fused(dtype, torch.device("cpu"))
    agree_with_sums(compiled, *tiles_of(dtype, 3, 9, tile_width(dtype)))
    tiles, numbers = tiles_of(dtype, 3, 5, tile_width(dtype))
    agree_with_sums(compiled, tiles, numbers)
    assert not compiled.takes(tiles[:3])


def test_a_second_width_in_one_process_makes_no_size_but_the_first_dynamic(monkeypatch):
    compiler, dynamic = torch.compile, []

    def recording(module, inputs):
        dynamic.append(sum(isinstance(x, (int, torch.SymInt)) for x in inputs))
        return module.forward

    def compiled(function, **options):
        return compiler(function, backend=recording, fullgraph=True)

    monkeypatch.setattr(fused.torch, "compile", compiled)
    torch._dynamo.reset()
    for dtype in ("float32", "int8"):
        tiles, _ = tiles_of(dtype, 5, 4, tile_width(dtype))
        Fused(dtype, torch.device("cpu")).project(tiles, random_vectors(4, 5, tiles.width)[0], 1)
    torch._dynamo.reset()
    assert dynamic == [1, 1]


@pytest.fixture
def compilers(monkeypatch):
    """Sets what is found on the path, and forgets what has been compiled."""

    def only(*names: str) -> None:
        monkeypatch.setattr(native, "_COMPILERS", names)
        native._library.cache_clear()

    yield only
    native._library.cache_clear()


@pytest.mark.parametrize("asked", ["", "no-such-compiler", "true", "false"])
def test_without_a_compiler_says_so_once_and_goes_on(offsets, monkeypatch, compilers, asked):
    compilers()
    monkeypatch.setenv("CC", asked)
    notes = []
    store = offsets.store(dtype="int8", compiled=True, progress=notes.append)
    gradients = offsets.gradients()
    expected = offsets.store(dtype="int8", compiled=False).project(gradients)
    assert torch.equal(store.project(gradients), expected)
    store.combine(alphas_of(1), targets_like(offsets.states[0]))
    assert len(notes) == 1
    assert isinstance(notes[0], Noted)
    assert (asked or "missing") in notes[0].text


def test_another_compiler_does_where_the_one_that_cc_names_does_not(monkeypatch, compilers):
    compilers("cc")
    monkeypatch.setenv("CC", "no-such-compiler --flag")
    agree_with_sums(Native("int4"), *tiles_of("int4", 3, 2, 128))


def test_a_compiler_that_hangs_is_ended_with_all_it_has_started(tmp_path, monkeypatch, compilers):
    compilers()
    hanging, child = tmp_path / "hanging", tmp_path / "child"
    hanging.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {child}\nwait\n")
    hanging.chmod(0o755)
    monkeypatch.setenv("CC", str(hanging))
    monkeypatch.setattr(native, "_PATIENCE", 0.5)
    tiles, _ = tiles_of("float32", 3, 2, 128)
    start = time.monotonic()
    with pytest.raises(OSError, match="longer than"):
        Native("float32").project(tiles, torch.zeros(2, 128), 128)
    assert time.monotonic() - start < 30
    # On a busy machine a process that has been killed ends when it gets its turn.
    psutil.wait_procs(_running(int(child.read_text())), timeout=20)
    assert not _running(int(child.read_text()))


def _running(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process] if process.status() != psutil.STATUS_ZOMBIE else []
    except psutil.NoSuchProcess:
        return []


def test_float32_products_keep_six_digits_over_a_million_numbers(tmp_path):
    big = Offsets(tmp_path, n=3, shapes={"w": (1 << 20,)})
    gradients = big.gradients()
    found = big.store().project(gradients)
    close(found, big.projected(big.delta, gradients), 1e-6)
    assert torch.equal(found, big.store().project(gradients))


@pytest.mark.parametrize(
    "made",
    [
        {"kind": "disk"},
        *({"dtype": dtype, "compiled": compiled} for dtype in WIDTHS for compiled in (False, True)),
    ],
    ids=str,
)
def test_where_the_rows_of_ranks_begin_does_not_show(offsets, made):
    gradients, alphas = offsets.gradients(), alphas_of(len(offsets.blocks))
    whole, sums = targets_like(offsets.states[0]), 0.0
    one = offsets.store(**made)
    one.combine(alphas, whole)
    for rank in range(3):
        world = World(rank=rank, size=3)
        store = offsets.store(world=world, **made)

        def mine(tensors, world=world):
            rows = {k: v if v.dim() else v[None] for k, v in tensors.items()}
            return {k: v[slice(*world.share(len(v)))] for k, v in rows.items()}

        sums += store.project(mine(gradients))
        expected = mine(whole)
        targets = {k: torch.empty_like(v) for k, v in expected.items()}
        store.combine(alphas, targets)
        assert all(torch.equal(targets[k], v) for k, v in expected.items())
    expected = one.project(gradients)
    assert float((sums - expected).abs().max()) < 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize("total", [1.0, 2.0])
@pytest.mark.parametrize("dtype", WIDTHS)
def test_equal_coefficients_give_the_centre_itself(offsets, dtype, total):
    """Rounded offsets no longer add up to nothing: they must not get into the mean."""
    store = offsets.store(dtype=dtype)
    targets = targets_like(offsets.states[0])
    store.combine(torch.full((1, N), total / N, dtype=torch.float64), targets)
    for name, target in targets.items():
        assert torch.equal(target.flatten(), total * offsets.centre[name].float())


@pytest.mark.parametrize("kind", ["device", "disk"])
def test_coefficients_need_not_add_up_to_one(offsets, kind):
    store = offsets.store(kind)
    alphas = torch.tensor([[0.5, -0.25, 0.0, 2.0, 0.25]], dtype=torch.float64)
    targets = targets_like(offsets.states[0])
    store.combine(alphas, targets)
    for name, target in targets.items():
        close(target.flatten().double(), alphas[0] @ offsets.weights[name], 1e-6)


@pytest.mark.parametrize("kind", ["device", "disk"])
def test_some_tensors_only(offsets, kind):
    store = offsets.store(kind)
    gradients = offsets.gradients()
    found = store.project({"odd": gradients["odd"], "flat": None})
    expected = offsets.projected(offsets.delta, gradients)
    row = offsets.blocks.index["odd"]
    close(found[row], expected[row], 1e-5)
    assert not found[torch.arange(len(found)) != row].any()
    target = {"few": torch.empty(7)}
    store.combine(alphas_of(1), target)
    close(target["few"].double(), offsets.combined(offsets.delta, alphas_of(1), "few"), 1e-6)


@pytest.mark.parametrize("kind", ["device", "disk"])
def test_holds_what_was_put_and_nothing_else(offsets, kind):
    config = StoreConfig(kind, "float32")
    blocks = global_block(offsets.layout)
    store = make_store(offsets.checkpoints, offsets.layout, blocks, World(), config)
    assert store.names == []
    with pytest.raises(KeyError, match="odd"):
        store.combine(alphas_of(1), {"odd": torch.empty(37, 9, 33)})
    with pytest.raises(KeyError, match="odd"):
        store.project({"odd": torch.empty(37, 9, 33)})
    store.combine(alphas_of(1), {"no": torch.empty(0, 3)})
    assert store.project({}).shape == (1, N)


@pytest.mark.parametrize("kind", ["device", "disk"])
@pytest.mark.parametrize("size", [2, 4, 300])
def test_ranks_add_up_to_one_process(offsets, kind, size):
    gradients, alphas = offsets.gradients(), alphas_of(1)
    total = torch.zeros(len(offsets.blocks), N, dtype=torch.float64)
    whole = targets_like(offsets.states[0])
    for rank in range(0, size, max(1, size - 1) if size > 4 else 1):
        world = World(rank, size)
        store = offsets.store(kind, world=world)

        def mine(tensor: Tensor, world: World = world) -> Tensor:
            a, b = world.share(tensor.shape[0] if tensor.dim() else 1)
            return tensor[a:b] if tensor.dim() else tensor if a < b else tensor.flatten()[:0]

        total += store.project({k: mine(g) for k, g in gradients.items()})
        store.combine(alphas, {k: mine(t) for k, t in whole.items()})
    if size <= 4:
        close(total, offsets.projected(offsets.delta, gradients), 1e-5)
        for name, target in whole.items():
            close(target.flatten().double(), offsets.combined(offsets.delta, alphas, name), 1e-6)
    else:
        # Only the first and the last of more ranks than rows: the last owns no row of anything.
        close(whole["few"][:1].double(), offsets.combined(offsets.delta, alphas, "few")[:1], 1e-6)
        assert whole["few"][1:].isnan().all()


@pytest.mark.parametrize("dtype", ["int8", "int4", "int1"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_what_is_stored_of_a_row_does_not_depend_on_the_ranks(offsets, dtype, size):
    """Bit by bit, though neither the rows of a rank nor those of a tensor are whole groups."""
    alphas = alphas_of(1)
    whole, parts = targets_like(offsets.states[0]), targets_like(offsets.states[0])
    offsets.store(dtype=dtype).combine(alphas, whole)
    gradients = offsets.gradients()
    total = torch.zeros(len(offsets.blocks), N, dtype=torch.float64)
    for rank in range(size):
        world = World(rank, size)
        store = offsets.store(dtype=dtype, world=world)
        mine = {k: slice(*world.share(t.shape[0])) for k, t in parts.items() if t.dim()}
        store.combine(alphas, {k: parts[k][rows] for k, rows in mine.items()})
        total += store.project({k: gradients[k][rows] for k, rows in mine.items()})
    for name in (name for name, target in parts.items() if target.dim()):
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-6, atol=1e-8)
    expected = offsets.store(dtype=dtype).project({k: g for k, g in gradients.items() if g.dim()})
    for block in range(len(offsets.blocks)):
        close(total[block], expected[block], 4e-6)


def test_tied_tensors_follow_the_one_they_are_tied_to(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2):
        shared = torch.randn(30, 20, generator=generator)
        (tmp_path / f"checkpoint-{step}").mkdir()
        torch.save({"in": shared, "out": shared}, tmp_path / f"checkpoint-{step}/model.pt")
    checkpoints = open_checkpoints([tmp_path])
    layout = make_layout(checkpoints)
    blocks = tensor_blocks(layout)
    assert layout["out"].tied_to == "in"
    store = make_store(checkpoints, layout, blocks, World(), StoreConfig("disk"))
    (cut,) = row_slices(layout, ["in"])
    store.put(cut, torch.zeros(600), torch.zeros(2, 600))
    ones = {"in": torch.empty(30, 20), "out": torch.empty(30, 20)}
    store.combine(torch.tensor([[0.0, 1.0]], dtype=torch.float64), ones)
    assert torch.equal(ones["in"], shared)
    assert torch.equal(ones["out"], shared)
    gradient = torch.randn(30, 20, generator=generator)
    both = store.project({"in": gradient, "out": gradient})
    torch.testing.assert_close(both, 2 * store.project({"in": gradient}))


@pytest.mark.parametrize("dtype", ["int8", "int4", "int1"])
def test_packed_for_real(offsets, dtype):
    store = offsets.store(dtype=dtype)
    infos = [offsets.layout[k].info for k in offsets.names]
    sizes = [footprint(info.rows, info.row_numel, N, dtype) for info in infos]
    assert store.nbytes == sum(a + b for a, b in sizes)
    bits = {"int8": 8.25, "int4": 4.25, "int1": 1.25}[dtype]
    assert footprint(12, 4096, N, dtype) == (12 * 4096 * N * bits / 8, 4 * 12 * 4096)
    # Never more than one group too many in a row.
    assert footprint(3, 200, N, dtype)[0] == 3 * 2 * N * (GROUP_BYTES[dtype] + 4)
    # Rows that are not worth a group.
    assert footprint(9000, 1, N, dtype) == (2 * 9000 * N, 4 * 9000)


def test_one_bit_keeps_every_norm(offsets):
    delta = torch.stack([rounded(x, (37, 9, 33), "int1") for x in offsets.delta["odd"]])
    close(delta.norm(dim=1), offsets.delta["odd"].norm(dim=1), 1e-6)


@pytest.mark.parametrize("dtype", ["int8", "int4", "int1"])
def test_groups_of_zeros_stay_zero(dtype):
    packed, scale = pack(torch.zeros(2, 3, 128), dtype)
    assert not unpack(packed, scale, dtype, torch.empty(2, 3, 128)).any()


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_one_bit_keeps_the_norm_of_numbers_whose_squares_float32_cannot_hold(size):
    numbers = torch.linspace(-1.0, 2.0, 128) * size
    packed, scale = pack(numbers[None], "int1")
    found = unpack(packed, scale, "int1", torch.empty(1, 128))
    assert float(found.double().norm()) == pytest.approx(float(numbers.double().norm()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_disk_is_exact(tmp_path, dtype):
    run = Offsets(tmp_path, dtype=dtype)
    store = run.store("disk")
    assert store.nbytes == 0
    gradients = run.gradients()
    close(store.project(gradients), run.projected(run.delta, gradients), 2e-6)
    alphas, targets = alphas_of(len(run.blocks)), targets_like(run.states[0])
    store.combine(alphas, targets)
    for name, target in targets.items():
        expected = (alphas[run.blocks.index[name]] @ run.weights[name]).float()
        torch.testing.assert_close(target.flatten(), expected, rtol=2e-7, atol=1e-8)


def delete(path: Path) -> None:
    path.unlink()


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewrite(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


@pytest.mark.parametrize("harm", [delete, cut_short, rewrite])
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_file_that_is_lost_in_mid_run_is_named(tmp_path, harm, when):
    run = Offsets(tmp_path, shapes={f"layer.{i}": (64, 512) for i in range(40)})
    store = run.store("disk")
    store.project(run.gradients())
    victim = tmp_path / "checkpoint-300" / "model.safetensors"

    def lost_after_a_while():
        read = type(run.checkpoints[0].reader).read
        calls = 0

        def counting(self, *args):
            nonlocal calls
            calls += 1
            if calls == 30:
                harm(victim)
            return read(self, *args)

        return counting

    with pytest.MonkeyPatch.context() as patch:
        if when == "during":
            patch.setattr(type(run.checkpoints[0].reader), "read", lost_after_a_while())
        else:
            harm(victim)
        with pytest.raises(CheckpointError, match="vanished or changed") as caught:
            store.combine(alphas_of(1), targets_like(run.states[0]))
    assert caught.value.details["checkpoint"] == str(victim)
    assert "what to do" in caught.value.details


def test_auto_keeps_small_runs_in_memory_and_exact(tmp_path):
    run = Offsets(tmp_path, dtype=torch.bfloat16)
    notes = []
    store = run.store("auto", "auto", progress=notes.append)
    numbers = sum(w.shape[1] for w in run.weights.values())
    assert store.nbytes == numbers * (4 * N + 4)
    assert notes == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eager_sums_go_through_the_tiles_piece_by_piece(monkeypatch, dtype):
    """On a GPU too, where products of all numbers at once would be as large as the offsets."""
    seen = []

    def keep(tiles):
        for part, numbers in unpacked(tiles):
            seen.append(numbers.numel())
            yield part, numbers

    monkeypatch.setattr(kernels, "_EAGER_CPU", 1000)
    eager = Kernels(dtype, torch.device("cpu"), compiled=False, progress=print)
    eager._wide = torch.float32  # as on a GPU
    unpacked = eager._unpacked
    monkeypatch.setattr(eager, "_unpacked", keep)
    tiles, numbers = tiles_of(dtype, 3, 7, 128)
    g, c, beta = random_vectors(7, 3, 128)
    x = numbers.double()
    close(eager.project(tiles, g, 1), torch.einsum("unt,ut->n", x, g.double()), 1e-5)
    out = torch.empty_like(c)
    eager.combine(tiles, c, beta, torch.tensor([0.5]), out)
    expected = 0.5 * c.double() + torch.einsum("unt,n->ut", x, beta.double())
    close(out.double(), expected, 1e-5)
    assert max(seen) <= 1000


def test_a_compiler_that_cannot_even_be_loaded_is_done_without(offsets, monkeypatch):
    def broken(dtype):
        raise ImportError("no such library")

    monkeypatch.setattr(kernels, "Native", broken)
    notes = []
    store = offsets.store(compiled=True, progress=notes.append)
    assert store.project(offsets.gradients()).isfinite().all()
    assert ["no such library" in note.text for note in notes] == [True]
