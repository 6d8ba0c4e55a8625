"""The streaming pass: sums against a plain float64 computation, however many threads there are."""

from __future__ import annotations

import pytest
import torch
from runs import save_run, states_of

from twa_merge.checkpoints import open_checkpoints
from twa_merge.distributed import World
from twa_merge.errors import CheckpointError
from twa_merge.ingest import ingest
from twa_merge.layout import make_layout
from twa_merge.progress import Advanced, Started

# One tensor of several slices, one whose rows are wider than a piece, one without dimensions.
SHAPES = {"long": (40_000, 12), "wide": (2, 200_000), "scalar": (), "empty": (0, 3)}


class Kept:
    """A store that keeps float64 copies."""

    nbytes = 0

    def __init__(self) -> None:
        self.centres: dict[tuple[str, int, int], torch.Tensor] = {}
        self.offsets: dict[tuple[str, int, int], torch.Tensor] = {}

    def put(self, cut, centre, offsets) -> None:
        key = (cut.name, cut.start, cut.stop)
        assert key not in self.centres
        self.centres[key], self.offsets[key] = centre.clone(), offsets.clone()

    def whole(self, of: dict[tuple[str, int, int], torch.Tensor], name: str) -> torch.Tensor:
        keys = sorted(key for key in of if key[0] == name)
        assert [k[1] for k in keys[1:]] == [k[2] for k in keys[:-1]]
        return torch.cat([of[key] for key in keys], -1)


@pytest.fixture
def threads():
    """Sets the number of torch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def opened(folder, n=5, dtype=torch.bfloat16):
    states = states_of(n, shapes=SHAPES, dtype=dtype)
    save_run(folder, states)
    checkpoints = open_checkpoints([folder])
    return states, checkpoints, make_layout(checkpoints)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_slices_are_those_of_plain_float64(tmp_path, dtype):
    states, checkpoints, layout = opened(tmp_path, dtype=dtype)
    store, events = Kept(), []
    grams = ingest(checkpoints, layout, World(), store=store, progress=events.append)
    centre_square, cross = 0.0, torch.zeros(5, dtype=torch.float64)
    for k, name in enumerate(grams.names):
        weights = torch.stack([s[name].double().reshape(-1) for s in states])
        centre = weights.mean(0)
        offsets = weights - centre
        torch.testing.assert_close(grams.exact[k], offsets @ offsets.T, rtol=1e-11, atol=1e-15)
        rounded = offsets.float().double()
        torch.testing.assert_close(grams.stored[k], rounded @ rounded.T, rtol=1e-11, atol=1e-15)
        centre_square += float(centre @ centre)
        cross += offsets @ centre
        if weights.numel():
            assert torch.equal(store.whole(store.centres, name), centre)
            assert torch.equal(store.whole(store.offsets, name), offsets)
    assert float(grams.centre) == pytest.approx(centre_square, rel=1e-12)
    torch.testing.assert_close(grams.cross, cross, rtol=1e-9, atol=1e-9)
    started = next(e for e in events if isinstance(e, Started))
    assert started.total == sum(e.amount for e in events if isinstance(e, Advanced))


def test_the_sums_do_not_depend_on_threads(tmp_path, threads):
    _, checkpoints, layout = opened(tmp_path)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(ingest(checkpoints, layout, World(), store=Kept()))
        assert torch.get_num_threads() == count
    for other in results[1:]:
        for what in ("exact", "stored", "centre", "cross"):
            assert torch.equal(getattr(other, what), getattr(results[0], what))


def test_a_complex_number_counts_as_two(tmp_path):
    generator = torch.Generator().manual_seed(0)
    states = [
        {"w": torch.randn(5, 3, generator=generator), "z": torch.randn(4, 2, generator=generator)}
        for _ in range(3)
    ]
    save_run(tmp_path, [{"w": s["w"], "z": torch.view_as_complex(s["z"])} for s in states])
    checkpoints = open_checkpoints([tmp_path])
    grams = ingest(checkpoints, make_layout(checkpoints), World())
    for k, name in enumerate(grams.names):
        weights = torch.stack([s[name].double().reshape(-1) for s in states])
        offsets = weights - weights.mean(0)
        torch.testing.assert_close(grams.exact[k], offsets @ offsets.T)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_blamed_on_its_place(tmp_path, threads, value):
    states = states_of(3, shapes=SHAPES)
    states[1]["long"][33_333, 7] = value
    save_run(tmp_path, states)
    checkpoints = open_checkpoints([tmp_path])
    threads(2)
    with pytest.raises(CheckpointError) as caught:
        ingest(checkpoints, make_layout(checkpoints), World())
    assert caught.value.details["checkpoint"].endswith("checkpoint-200")
    assert caught.value.details["tensor"] == "long"
    assert "[33333, 7]" in caught.value.details["found"]
    assert torch.get_num_threads() == 2


def test_numbers_whose_squares_overflow_are_no_error(tmp_path):
    save_run(tmp_path, [{"w": torch.tensor([x], dtype=torch.float64)} for x in (1e200, 2e200)])
    checkpoints = open_checkpoints([tmp_path])
    store = Kept()
    ingest(checkpoints, make_layout(checkpoints), World(), store=store)
    assert float(store.whole(store.centres, "w")) == 1.5e200


def test_an_error_of_the_store_ends_the_pass(tmp_path, threads):
    class Full(Kept):
        def put(self, cut, centre, offsets) -> None:
            raise MemoryError("no room")

    _, checkpoints, layout = opened(tmp_path)
    threads(2)
    with pytest.raises(MemoryError, match="no room"):
        ingest(checkpoints, layout, World(), store=Full())
    assert torch.get_num_threads() == 2
