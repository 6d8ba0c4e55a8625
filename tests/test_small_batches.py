"""Batches that are too little work for several threads: one works through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import save_run
from small_task import Small, train
from torch import Tensor, nn

from twa_merge import merge
from twa_merge.config import FitConfig, GuardConfig


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Images(Small):
    """Convolutions, whose gradients torch adds up by thread, and kinks, which that shows in."""

    def __init__(self, data: str | None = None) -> None:
        super().__init__(data)
        self.x = torch.randn(120, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        self.y = self.x.flatten(1)[:, :3].argmax(1)

    def build_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(1024, 3),
        )  # fmt: skip


def test_the_coefficients_do_not_hang_on_the_number_of_threads(tmp_path: Path) -> None:
    task = Images()
    train(tmp_path / "run", of=Images, lr=0.1)

    def coefficients(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        document = merge(
            [tmp_path / "run"], task, tmp_path / str(threads),
            fit=FitConfig(blocks="tensors", ridge=1e-3), guard=GuardConfig(candidates="twa-layers"),
        )  # fmt: skip
        rows = {row["name"]: row["coefficients"] for row in document["candidates"]}
        return torch.tensor(list(rows["twa-tensors"].values()), dtype=torch.float64)

    torch.testing.assert_close(coefficients(1), coefficients(2), rtol=0, atol=1e-9)
    assert torch.get_num_threads() == 2


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4096), nn.Tanh(), nn.Linear(4096, 512), nn.Linear(512, 3))


def fails_when_counted(model: nn.Module, x: Tensor) -> Tensor:
    if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
        raise RuntimeError("not with strangers")
    return model(x)


@pytest.mark.parametrize(
    ("build", "use", "expected"),
    [
        (lambda: nn.Linear(6, 3), None, {1}),
        (wide, None, {2}),
        (Recurrent, None, {2}),
        (lambda: nn.Linear(6, 3), fails_when_counted, {2}),
    ],
    ids=["small", "large", "recurrent", "not to be counted"],
)
def test_threads_of_a_batch(
    tmp_path: Path,
    build: Callable[[], nn.Module],
    use: Callable[[nn.Module, Tensor], Tensor] | None,
    expected: set[int],
) -> None:
    threads: list[int] = []

    class Watched(Small):
        def build_model(self) -> nn.Module:
            return build()

        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            x, y = batch
            losses = nn.functional.cross_entropy(
                use(model, x) if use else model(x), y, reduction="none"
            )
            threads.append(torch.get_num_threads())
            return losses

    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append(build().state_dict())
    save_run(tmp_path / "run", states)
    uniform = GuardConfig(candidates="uniform")
    merge([tmp_path / "run"], Watched(), tmp_path / "out", guard=uniform)
    # Not the first, which is counted.
    assert set(threads[1:]) == expected
