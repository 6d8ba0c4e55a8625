"""Suite 5: a small Llama trained with the Hugging Face Trainer, then fine-tuned on other text.

It is trained on the standard library's source, and fine-tuned on the prose in it: its docstrings.
Source files are divided first, so that no prose is in two parts.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from runs import Suite, cached, numbered
from torch import Tensor
from torch.utils.data import Dataset

from twa_merge.tasks.byte_lm import standard_library_text
from twa_merge.tasks.causal_lm import CausalLM

LENGTH = 128
VOCABULARY = 1024
END = "<|end|>"
BATCH_SIZE = 16


class ProseTask(CausalLM):
    """``causal-lm`` on the held-out prose, with test data of its own."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        super().__init__(folder / "held_out.jsonl", checkpoint, max_length=LENGTH)
        self._tested = CausalLM(folder / "test.jsonl", checkpoint, max_length=LENGTH)

    def test_dataset(self) -> Dataset[Any]:
        return self._tested.dataset()


class Windows(Dataset[dict[str, Tensor]]):
    """Stretches of LENGTH tokens of the joined documents, without overlap."""

    def __init__(self, tokenizer: Any, documents: Sequence[str]) -> None:
        ids = [
            i
            for document in documents
            for i in (*tokenizer(document, verbose=False)["input_ids"], tokenizer.eos_token_id)
        ]
        rows = len(ids) // LENGTH
        self.rows = torch.tensor(ids[: rows * LENGTH]).view(rows, LENGTH)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def fine_tuning(
    cache: Path,
    seed: int,
    *,
    steps: int = 1000,
    tuning_steps: int = 600,
    every: int = 30,
    learning_rate: float = 3e-3,
    tuning_rate: float = 3e-3,
) -> Suite:
    """Checkpoints of the fine-tuning, at a constant rate; the reference is where it started.

    Args:
        steps, tuning_steps: of training and of fine-tuning, in batches of 16 × 128 tokens.
        every: steps between the checkpoints of the fine-tuning.
    """

    def make(folder: Path) -> None:
        from transformers import LlamaForCausalLM, set_seed

        text = standard_library_text(seed)
        code = [d.decode("utf-8", "replace") for d in text.train]
        tokenizer = make_tokenizer(code)
        set_seed(seed)
        model = LlamaForCausalLM(make_config(len(tokenizer)))
        _train(model, tokenizer, code, folder / "trained", steps, steps, learning_rate, seed)
        prose = [docstrings(d) for d in text.train]
        tuned = folder / "tuned"
        _train(model, tokenizer, prose, tuned, tuning_steps, every, tuning_rate, seed)
        for name, part in (("held_out", text.held_out), ("test", text.test)):
            rows = [json.dumps({"text": d}) for d in map(docstrings, part) if d]
            (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")

    settings = {
        "seed": seed,
        "steps": [steps, tuning_steps, every],
        "rates": [learning_rate, tuning_rate],
    }
    folder = cached(cache / f"llama-{steps}-{tuning_steps}-{seed}", settings, make)
    checkpoints = numbered(folder / "tuned")
    start = numbered(folder / "trained")[-1]
    return Suite(
        "fine-tuning", seed, checkpoints, ProseTask(folder, checkpoints[-1]), {"start": start}
    )


def docstrings(source: bytes) -> str:
    """All docstrings of a source file, a blank line between them; empty if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if text)


def make_tokenizer(texts: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer trained on ``texts``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def make_config(vocabulary: int) -> Any:
    """A Llama of 0.4 million parameters."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def _train(
    model: Any,
    tokenizer: Any,
    documents: Sequence[str],
    folder: Path,
    steps: int,
    every: int,
    learning_rate: float,
    seed: int,
) -> None:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=50,
        weight_decay=0.1,
        adam_beta2=0.95,
        save_strategy="steps",
        save_steps=every,
        save_only_model=True,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    data = Windows(tokenizer, documents)
    Trainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer).train()
