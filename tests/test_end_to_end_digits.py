"""A convolutional network with batch norm, saved as ``.pt``, merged through a task file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import launches
import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.timeout(560)
def test_digits(tmp_path):
    # Images so small that a second thread costs more than it gives.
    environment = launches.environment()
    run, merged = tmp_path / "run", tmp_path / "merged"
    subprocess.run(
        [sys.executable, str(EXAMPLES / "digits_train.py"), str(run)], check=True, env=environment
    )
    # fmt: off
    done = subprocess.run(
        [sys.executable, "-m", "twa_merge_cli", "train", str(run),
         "--task", str(EXAMPLES / "digits_task.py"), "-o", str(merged), "--device", "cpu",
         "--blocks", "global", "--candidates", "quick", "--batch-size", "64", "--json"],
        capture_output=True, text=True, timeout=500, env=environment,
    )
    # fmt: on
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    rows = {c["name"].partition(":")[0]: c for c in document["candidates"]}
    assert document["chosen"] in ("twa", "blend")
    written = rows[document["chosen"]]
    for other in ("last", "uniform", "window", "best_single"):
        assert written["test_loss"] < rows[other]["test_loss"]

    # The written file, loaded by nothing but torch and safetensors, has the reported test loss.
    sys.path.insert(0, str(EXAMPLES))
    try:
        from digits_task import DigitsTask
    finally:
        sys.path.remove(str(EXAMPLES))
    task = DigitsTask()
    model = task.build_model()
    state = load_file(merged / "model.safetensors")
    model.load_state_dict(state)
    model.eval()
    test = task.test_dataset()
    images = torch.stack([test[i][0] for i in range(len(test))])
    labels = torch.stack([test[i][1] for i in range(len(test))])
    with torch.no_grad():
        loss = float(task.loss(model, [images, labels]).double().mean())
    assert abs(loss - written["test_loss"]) < 1e-4
    # Integers come from the newest checkpoint.
    newest = torch.load(run / "epoch-20.pt", weights_only=True)["model"]
    name = "features.0.1.num_batches_tracked"
    assert state[name] == newest[name]
