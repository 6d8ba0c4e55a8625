"""Folders of checkpoints to measure on, made once and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# 134 million parameters: the shape of GPT-2 small and its like, as a Llama.
LLAMA_125M = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 2048,
    "vocab_size": 32000,
}


def llama_run(folder: Path, checkpoints: int, sizes: dict[str, int]) -> tuple[list[Path], int]:
    """A run folder of bfloat16 Llama checkpoints that differ as those of one training run do.

    Made by transformers when it is not there yet: a random start, and steps away from it.

    Returns:
        The checkpoints' folders, and the bytes of all of their weights.
    """
    document: dict[str, Any] = {"checkpoints": checkpoints, "sizes": sizes}
    made = folder / "made.json"
    paths = [folder / f"checkpoint-{100 * (k + 1)}" for k in range(checkpoints)]
    if not made.is_file() or json.loads(made.read_text()) != document:
        _make(paths, sizes)
        made.write_text(json.dumps(document))
    return paths, sum(file.stat().st_size for p in paths for file in p.glob("*.safetensors"))


def _make(paths: list[Path], sizes: dict[str, int]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).to(torch.bfloat16)
    for path in paths:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=2e-3)
        model.save_pretrained(path)
        print(f"made {path}")


def byte_run(folder: Path, checkpoints: int, config: Any, seed: int = 0) -> list[Path]:
    """A run folder of float32 byte-level transformers: a random start, and steps away from it."""
    import torch
    from safetensors.torch import save_file

    from twa_merge.tasks.byte_lm import ByteTransformer

    document = {"checkpoints": checkpoints, "config": str(config), "seed": seed}
    made = folder / "made.json"
    paths = [folder / f"checkpoint-{100 * (k + 1)}" for k in range(checkpoints)]
    if not made.is_file() or json.loads(made.read_text()) != document:
        model = ByteTransformer(config)
        model.reset(seed)
        torch.manual_seed(seed)
        for path in paths:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=2e-3)
            path.mkdir(parents=True, exist_ok=True)
            save_file(model.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
        made.write_text(json.dumps(document))
    return paths
