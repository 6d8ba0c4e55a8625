"""The whole way, as it will be used: a Trainer run in, a model that transformers loads out."""

from __future__ import annotations

import json
import subprocess
import sys

import launches
import pytest
import torch
from hf_run import make_trainer_run
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.timeout(580),
    # Of torch and transformers themselves; nothing of ours is silenced.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def test_a_trainer_run_becomes_a_better_model(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = make_trainer_run(tmp_path)
    merged = tmp_path / "merged"
    # fmt: off
    done = subprocess.run(
        [sys.executable, "-m", "twa_merge_cli", "train", str(run.folder), "--task", "causal-lm",
         "--data", str(run.fit), "--test-data", str(run.test), "--max-length", "64",
         "-o", str(merged), "--device", "cpu", "--json",
         "--blocks", "global", "--candidates", "quick"],
        capture_output=True, text=True, timeout=500,
        # Matrices so small that a second thread costs more than it gives.
        env=launches.environment(),
    )
    # fmt: on
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    losses = {c["name"].partition(":")[0]: c["test_loss"] for c in document["candidates"]}
    chosen = document["chosen"]
    assert chosen.startswith("twa")
    for other in ("last", "uniform", "window", "best_single"):
        assert losses[chosen] < losses[other], losses

    # The file is Σ α_i w_i, rounded once, by an independent float64 computation.
    states = [load_file(c / "model.safetensors") for c in run.checkpoints]
    written = load_file(merged / "model.safetensors")
    assert list(written) == list(states[0])
    block_of = {
        tensor: block
        for block, tensors in document.get("blocks", {"members": {}})["members"].items()
        for tensor in tensors
    }
    expected = {}
    for name in states[0]:
        coefficients = document["coefficients"]
        alphas = (
            coefficients["blocks"][block_of[name]]
            if "blocks" in coefficients
            else coefficients["global"]
        )
        total = sum(a * s[name].double() for a, s in zip(alphas, states, strict=True))
        expected[name] = total.to(states[0][name].dtype)
        assert torch.equal(written[name], expected[name]), name

    # transformers loads the folder, and its logits are those of a model built from the sum.
    model = AutoModelForCausalLM.from_pretrained(merged).eval()
    reference = AutoModelForCausalLM.from_pretrained(run.checkpoints[-1]).eval()
    missing = reference.load_state_dict(expected, strict=False)
    assert not missing.unexpected_keys
    tokenizer = AutoTokenizer.from_pretrained(merged)
    tokens = tokenizer("def merge(checkpoints):", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, reference(tokens).logits)
    for sidecar in ("config.json", "tokenizer.json", "generation_config.json"):
        original = (run.checkpoints[-1] / sidecar).read_bytes()
        assert (merged / sidecar).read_bytes() == original
    for stateful in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        assert not (merged / stateful).exists()
