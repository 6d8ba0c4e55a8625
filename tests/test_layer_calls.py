"""What layers write to what they are given, where a hook has put copies in its place."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from twa_merge.layer_calls import OwnWeights, keep_writes


@dataclass
class State:
    x: Tensor
    log: list[Any] = field(default_factory=list)


class Pair(NamedTuple):
    tensor: Tensor
    notes: dict[str, Any]


class Writing(nn.Module):
    def forward(self, state: State, pair: Pair, *, rest: OrderedDict[str, Any]) -> Tensor:
        self.saw = (state.x, pair.tensor, rest["kept"])
        state.x = state.x + 1.0
        state.log.insert(0, "state")
        pair.notes["x"] = pair.notes["x"] * 2.0
        rest["lists"][0].append(state.x)
        del rest["gone"]
        if state.log[-1] == "fails":
            raise ValueError
        return state.x


def given() -> tuple[State, Pair, OrderedDict[str, Any]]:
    x = torch.ones(2)
    rest = OrderedDict(kept=x, gone=torch.ones(1), lists=([x],))
    return State(x, ["before"]), Pair(x, {"x": x, "kept": x}), rest


def copied(layer: nn.Module) -> nn.Module:
    """The layer, with a hook as those of FSDP2."""
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: copy.deepcopy((args, kwargs)), with_kwargs=True
    )
    keep_writes(layer)
    return layer


def test_what_a_layer_writes_reaches_what_it_was_given_and_copies_do_not() -> None:
    layer = copied(Writing())
    for _ in range(2):
        state, pair, rest = given()
        x = state.x
        result = layer(state, pair, rest=rest)
        assert all(seen is not x for seen in layer.saw)
        assert state.x is result
        assert state.log == ["state", "before"]
        assert pair.notes["x"].tolist() == [2.0, 2.0]
        assert pair.notes["kept"] is pair.tensor is rest["kept"] is x
        assert [*rest] == ["kept", "lists"]
        assert rest["lists"][0][0] is x
        assert rest["lists"][0][1] is result


def test_a_call_that_failed_leaves_nothing_behind() -> None:
    layer = copied(Writing())
    state, pair, rest = given()
    state.log.append("fails")
    with pytest.raises(ValueError):
        layer(state, pair, rest=rest)
    # Nor copies in what it was given.
    assert pair.notes["kept"] is pair.tensor
    other, pair, rest = given()
    layer(other, pair, rest=rest)
    assert len(state.log) == 3
    assert len(other.log) == 2


class Recursive(nn.Module):
    """Calls itself, with a dict of its own, before it writes."""

    def forward(self, state: dict[str, Tensor], depth: int) -> Tensor:
        if depth:
            inner = {"x": state["x"] + 1.0}
            self(inner, depth - 1)
            state["inner"] = inner["inner"] if depth > 1 else inner["x"]
        return state["x"]


def test_a_layer_may_call_itself() -> None:
    layer = copied(Recursive())
    x = torch.ones(2)
    state = {"x": x}
    layer(state, 2)
    assert state["x"] is x
    assert state["inner"].tolist() == [3.0, 3.0]


def test_a_pass_leaves_the_methods_of_sharded_tensors_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(DTensor, "item", lambda _: 7.0, raising=False)
    before = {name: getattr(DTensor, name) for name in ("item", "tolist")}
    with OwnWeights(nn.Linear(2, 2), []).used():
        assert DTensor.item is not before["item"]
    assert {name: getattr(DTensor, name) for name in before} == before
