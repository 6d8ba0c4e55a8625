"""Commands that only read files do not wait for torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import save_run, states_of
from safetensors.torch import load_file

# What takes long to import; each in a process of its own, as a user starts it.
SLOW = ("torch", "transformers", "huggingface_hub", "matplotlib", "safetensors")


def loaded_by(*arguments: object) -> set[str]:
    """Top-level modules that the command had imported when it was done."""
    code = (
        "import sys\n"
        "from twa_merge_cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as exit_:\n    assert exit_.code == 0, exit_.code\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_average_of_safetensors_needs_no_torch(tmp_path: Path, dtype: torch.dtype) -> None:
    states = states_of(3, dtype=dtype)
    save_run(tmp_path / "run", states)
    loaded = loaded_by("average", tmp_path / "run", "-o", tmp_path / "out")
    assert "numpy" in loaded
    assert not loaded & set(SLOW)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in merged.items():
        mean = torch.stack([s[name].double() for s in states]).mean(0)
        torch.testing.assert_close(tensor.double(), mean, rtol=2**-8, atol=0)
    again = tmp_path / "out" / "twa_merge.json"
    rest = ("--weights", f"@{again}", "-o", tmp_path / "again", "--dtype", "float32", "--json")
    assert not loaded_by("average", tmp_path / "run", *rest) & set(SLOW)


def test_inspect_needs_torch_for_the_geometry_alone(tmp_path: Path) -> None:
    save_run(tmp_path / "run", states_of(3))
    assert not loaded_by("inspect", tmp_path / "run") & set(SLOW)
    assert "torch" in loaded_by("inspect", tmp_path / "run", "--geometry")


def test_pickles_need_torch(tmp_path: Path) -> None:
    for i, state in enumerate(states_of(2)):
        torch.save(state, tmp_path / f"step-{i}.pt")
    assert "torch" in loaded_by("average", tmp_path, "-o", tmp_path / "out")
