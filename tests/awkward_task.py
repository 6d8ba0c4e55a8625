"""Models that several processes could come to other gradients of than one; ``--data`` says which.

All have kinks, in which a last bit of a gradient shows.
"""

from __future__ import annotations

from typing import Any

import torch
from small_task import Small
from torch import Tensor, nn

SIDE = 6
WIDTH = 16


class Block(nn.Module):
    def __init__(self, inputs: int = 1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.into = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(inputs))
        self.out = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        inputs = zip(self.into, (self.norm(x), *others), strict=True)
        return x + self.out(sum(part(y) for part, y in inputs).relu())


class Again(nn.Module):
    """Layers that a pass comes to three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(SIDE**2, WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        for layer in (*self.layers, *self.layers, *self.layers):
            x = layer(x)
        return self.head(x)


class Fed(Again):
    """Layers that all make use of one tensor, twice each, as decoders do of their encoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = memory = self.first(x.flatten(1))
        for layer in self.layers:
            x = layer(x, memory, memory)
        return self.head(x + memory)


class ChannelsLast(nn.Sequential):
    """Depthwise and pointwise convolutions, whose weights count as contiguous nevertheless."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, WIDTH, 3, padding=1), nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.Conv2d(WIDTH, WIDTH, 1),
            nn.ReLU(), nn.Flatten(), nn.Linear(WIDTH * SIDE**2, 3),
        )  # fmt: skip
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class Computed(Again):
    """With a table that the constructor computes from a parameter, and no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.linspace(0.1, 2.0, WIDTH), requires_grad=False)
        self.register_buffer("table", self.rates.detach().cos(), persistent=False)
        self.shift = self.rates.detach().sin()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (self.table * self.shift).sum()


class Noted(nn.Module):
    """A layer that writes to the dict that it is given, and to a list in there."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, notes: dict[str, Any]) -> Tensor:
        notes["x"] = x = self.block(notes["x"])
        notes["seen"][-1].append(x)
        return x


class Notes(Again):
    """Layers that tell each other by what they write to a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Noted() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        notes = {"x": x, "seen": (x, [x])}
        for layer in self.layers:
            layer(notes)
        return self.head(notes["x"] + torch.stack(notes["seen"][-1]).sum(0))


class Sharing(Block):
    def __init__(self, common: nn.Module) -> None:
        super().__init__()
        self.common = common

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return super().forward(self.common(x), *others)


class Common(Again):
    """Layers that hold a layer in common."""

    def __init__(self) -> None:
        super().__init__()
        common = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Sharing(common) for _ in range(3))


class Tower(nn.Sequential):
    """A siamese network whose batch norms normalised over processes in training."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(SIDE**2, WIDTH), nn.SyncBatchNorm(WIDTH), nn.ReLU(),
            nn.Linear(WIDTH, WIDTH), nn.SyncBatchNorm(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(3.0 + 2.0 * x)


MODELS = {
    kind.__name__: kind for kind in (Again, Fed, ChannelsLast, Computed, Notes, Common, Tower)
}


class Untold(Noted):
    """What it writes is all that comes out of it."""

    def forward(self, notes: dict[str, Any]) -> None:  # type: ignore[override]
        super().forward(notes)


class InADict(Notes):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Untold() for _ in range(3))


class Held:
    """A class of the user's, of which FSDP2 knows nothing."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Holding(Block):
    def forward(self, held: Held) -> Held:  # type: ignore[override]
        return Held(super().forward(held.x))


class InAClass(Again):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Holding() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        held = Held(self.first(x.flatten(1)))
        for layer in self.layers:
            held = layer(held)
        return self.head(held.x)


class AsArray(Again):
    """Makes use of a layer's weights outside of it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(abs(self.weight().numpy()).mean())

    def weight(self) -> Tensor:
        return self.layers[0].out.weight.detach()


class Functional(Again):
    """Calls a layer with other weights than its own."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        for layer in self.layers:
            halved = {name: 0.5 * p for name, p in layer.named_parameters()}
            x = torch.func.functional_call(layer, halved, (x,))
        return self.head(x)


class AsNumber(AsArray):
    def forward(self, x: Tensor) -> Tensor:
        return Again.forward(self, x) * float(self.weight().square().mean())


class AsNumbers(AsArray):
    def forward(self, x: Tensor) -> Tensor:
        return Again.forward(self, x) * sum(self.weight().amax(0).abs().tolist())


class Normalised(nn.Linear):
    """Puts other numbers in place of its weights as it is called."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = nn.functional.normalize(self.weight.data, dim=1)
        return super().forward(x)


class ReplacedAtTheRoot(Again):
    def __init__(self) -> None:
        super().__init__()
        self.head = Normalised(WIDTH, 3)


class ReplacedInLayers(Again):
    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.out = Normalised(2 * WIDTH, WIDTH)


REPLACING = {kind.__name__: kind for kind in (ReplacedAtTheRoot, ReplacedInLayers)}
REFUSED = {
    kind.__name__: kind for kind in (InADict, InAClass, AsArray, AsNumber, AsNumbers, Functional)
}


class Awkward(Small):
    def __init__(self, data: str | None = None) -> None:
        super().__init__()
        self._build = (MODELS | REFUSED | REPLACING)[data or "Again"]
        self.no_split_modules: list[str] | None = None
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(90, 1, SIDE, SIDE, generator=generator)
        self.y = self.x.flatten(1)[:, :3].argmax(1)

    def build_model(self) -> nn.Module:
        return self._build()


class Penalty(Awkward):
    """A loss that takes gradients itself."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            losses = nn.functional.cross_entropy(model(x), y, reduction="none")
            (slope,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
        return losses + slope.square().sum((1, 2, 3))


class Decayed(Awkward):
    """A loss that makes use of the weights of layers outside of them."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().loss(model, batch) + 1e-4 * sum(p.square().sum() for p in model.parameters())


def task(data: str | None = None) -> Awkward:
    return Awkward(data)


def penalty() -> Awkward:
    return Penalty()


def decayed() -> Awkward:
    return Decayed()


def whole_penalty() -> Awkward:
    return _whole(Penalty())


def whole_decayed() -> Awkward:
    return _whole(Decayed())


def _whole(task: Awkward) -> Awkward:
    task.no_split_modules = []
    return task
