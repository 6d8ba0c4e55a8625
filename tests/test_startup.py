"""What the quick start puts off of torch can be had later; the rest is as always."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

PUT_OFF = ("torch._meta_registrations", "torch.export", "torch.distributions")
SHOW = f"print(*(name in sys.modules for name in {PUT_OFF!r}))"


def python(code: str, before: str = "", **environment: str) -> str:
    setup = "import gc, sys\nfrom twa_merge_cli.startup import import_torch\nimport_torch()\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{before}\n{setup}{code}"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


def test_part_of_torch_is_put_off_and_the_collector_works():
    code = f"print('torch' in sys.modules, gc.isenabled())\n{SHOW}"
    assert python(code).split() == ["True", "True", "False", "False", "False"]


def test_nothing_is_put_off_in_processes_of_a_group_and_in_versions_not_tried():
    assert python(SHOW, RANK="0") == "True True True"
    other = "import importlib.metadata as m; m.version = lambda name: '2.99.0'"
    assert python(SHOW, other) == "True True True"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import torch\nprint(torch.distributions.Normal(0.0, 1.0).mean.item())", "0.0"),
        ("import torch\nprint(torch.vmap(torch.sum)(torch.ones(2, 3)).tolist())", "[3.0, 3.0]"),
        (
            "import torch\nprint(torch.optim.SGD.__name__, torch.nested.__name__)",
            "SGD torch.nested",
        ),
        (
            "import torch._meta_registrations\nfrom torch.distributed.tensor import DTensor\n"
            "print(tuple(torch.empty(2, 3, device='meta').logsumexp(1).shape))",
            "(2,)",
        ),
        ("import torch.fx.experimental.proxy_tensor as p\nprint(p.__name__[-12:])", "proxy_tensor"),
        (
            "import torch\nf = torch.compile(lambda x: x + 1, backend='eager')\n"
            "print(f(torch.ones(2)).tolist())",
            "[2.0, 2.0]",
        ),
    ],
)
def test_what_was_put_off_can_be_had(code, said):
    assert python(code) == said


def test_asking_for_a_part_runs_all_that_was_put_off():
    assert python(f"import torch\ntorch.optim.SGD\n{SHOW}") == "True True True"


def test_a_name_that_does_not_exist_is_an_attribute_error():
    assert python("import torch\nprint(hasattr(torch.optim, 'nothing'))") == "False"


def test_averaging_asks_for_nothing_that_was_put_off(tmp_path):
    for step in (1, 2):
        save_file({"w": torch.full((2, 3), float(step))}, tmp_path / f"step-{step}.safetensors")
    code = f"from twa_merge import average\naverage([{str(tmp_path)!r}], {str(tmp_path / 'out')!r})"
    assert python(f"{code}\n{SHOW}") == "False False False"
