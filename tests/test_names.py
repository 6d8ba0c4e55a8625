"""Names without the prefixes of wrappers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from twa_merge.checkpoints import open_checkpoints, resolve_names
from twa_merge.layout import make_layout
from twa_merge.tensors import tensor_rows


@pytest.mark.parametrize(
    ("raw", "resolved"),
    [
        (["a.w", "b"], ["a.w", "b"]),
        (["module.a.w", "module.b"], ["a.w", "b"]),
        (["_orig_mod.module.a", "_orig_mod.module.b"], ["a", "b"]),
        (["module._orig_mod.a", "module._orig_mod.b"], ["a", "b"]),
        (["module.module._orig_mod.a.w"], ["a.w"]),
        (["layers.0._orig_mod.weight", "head.weight"], ["layers.0.weight", "head.weight"]),
        (["_fsdp_wrapped_module.a._checkpoint_wrapped_module.w"], ["a.w"]),
        (["n_averaged", "module.w", "module.b"], ["n_averaged", "w", "b"]),
        (["module.w", "head.w", "tail.w"], ["module.w", "head.w", "tail.w"]),
        (["block.module.w", "block.module.b"], ["block.module.w", "block.module.b"]),
        (["_orig_mod.a", "a"], ["_orig_mod.a", "a"]),
        (["module.", "_orig_mod"], ["module.", "_orig_mod"]),
        ([], []),
    ],
)
def test_wrappers_leave_no_trace_in_names(raw: list[str], resolved: list[str]) -> None:
    assert resolve_names(raw) == dict(zip(raw, resolved, strict=True))


def test_wrapped_and_plain_checkpoints_are_of_one_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    plain = model.state_dict()
    save_file(plain, tmp_path / "step_1.safetensors")
    ddp = {f"module._orig_mod.{k}": v for k, v in plain.items()}
    save_file(ddp, tmp_path / "step_2.safetensors")
    compiled = {k.replace("0.", "0._orig_mod."): v for k, v in plain.items()}
    torch.save({"model": compiled}, tmp_path / "step_3.pt")
    torch.save(nn.DataParallel(model).state_dict(), tmp_path / "step_4.pt")
    checkpoints = open_checkpoints([tmp_path])
    assert len(make_layout(checkpoints).averaged) == 4
    for checkpoint in checkpoints:
        for name, tensor in plain.items():
            assert torch.equal(tensor_rows(checkpoint, name), tensor)
    file = checkpoints[1].files[0]
    assert [f"module._orig_mod.{n}" for n in file.names] == list(file.raw_names)
    averaged = tmp_path / "averaged.pt"
    torch.save(AveragedModel(model).state_dict(), averaged)
    assert set(open_checkpoints([averaged])[0].tensors) == {*plain, "n_averaged"}
