"""What the quick start leaves out of torch can be had later; the rest is as always."""

from __future__ import annotations

import os
import subprocess
import sys

LEFT_OUT = "torch._meta_registrations"


def python(code: str, **environment: str) -> str:
    setup = "import gc, sys\nfrom twa_merge_cli.startup import import_torch\nimport_torch()\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", setup + code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


def test_part_of_torch_is_left_out_and_the_collector_works():
    code = f"print('torch' in sys.modules, {LEFT_OUT!r} in sys.modules, gc.isenabled())"
    assert python(code) == "True False True"


def test_nothing_is_left_out_of_processes_of_a_group_and_of_versions_not_tried():
    code = f"print({LEFT_OUT!r} in sys.modules)"
    assert python(code, RANK="0") == "True"
    other = "import importlib.metadata as m; m.version = lambda name: '2.99.0'"
    done = subprocess.run(
        [sys.executable, "-c", f"{other}\nimport sys\nfrom twa_merge_cli import startup\n"
         f"startup.import_torch()\n{code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "True"


def test_what_was_left_out_can_be_imported():
    code = """
import torch._meta_registrations
from torch.distributed.tensor import DTensor
print(tuple(torch.empty(2, 3, device="meta").logsumexp(1).shape))
"""
    assert python(code) == "(2,)"
