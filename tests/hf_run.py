"""A real run of the Hugging Face Trainer, small enough for a test: text, tokenizer, checkpoints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from twa_merge.tasks.byte_lm import standard_library_text

LENGTH = 64
END = "<|end|>"


@dataclass(frozen=True)
class TrainerRun:
    """What a run left behind, and text that it has not seen.

    Attributes:
        folder: the Trainer's output_dir with ``checkpoint-*`` in it.
        fit: ``.jsonl``, one document a row, for --data.
        test: ``.txt`` files in a folder, one document each, for --test-data.
    """

    folder: Path
    fit: Path
    test: Path

    @property
    def checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))


class Windows(Dataset[dict[str, Tensor]]):
    """Stretches of LENGTH tokens without overlap."""

    def __init__(self, tokens: Tensor) -> None:
        n = len(tokens) // LENGTH
        self.rows = tokens[: n * LENGTH].view(n, LENGTH)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def make_tokenizer(texts: Sequence[str], vocabulary: int = 300) -> Any:
    """A byte-level BPE tokenizer trained on ``texts``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def make_config(vocabulary: int, **changes: Any) -> Any:
    """A Llama of about a tenth of a million parameters."""
    from transformers import LlamaConfig

    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return LlamaConfig(**{**sizes, **changes})


def make_trainer_run(
    folder: Path,
    steps: int = 700,
    seed: int = 0,
    *,
    checkpoints: int = 8,
    lr: float = 6e-3,
    batch_size: int = 8,
) -> TrainerRun:
    """Trains a small Llama on the standard library's source at a constant learning rate.

    Args:
        steps: a multiple of ``checkpoints + 2``; the last ``checkpoints`` saves are kept.
        lr: high on purpose: such a run bounces from wall to wall of its valley while it moves
            along it, so that neither one checkpoint nor a plain mean of them is the best there is.
    """
    from transformers import (
        LlamaForCausalLM,
        PrinterCallback,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    text = standard_library_text(seed, held_out=0.15, test=0.15)
    train, held_out, test = (
        [d.decode("utf-8", "replace") for d in part]
        for part in (text.train, text.held_out, text.test)
    )
    tokenizer = make_tokenizer(train[:60])
    windows = Windows(_tokens(tokenizer, train, steps * batch_size * LENGTH))
    set_seed(seed)
    model = LlamaForCausalLM(make_config(len(tokenizer)))
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=steps // 20,
        weight_decay=0.1,
        adam_beta2=0.95,
        save_strategy="steps",
        save_steps=steps // (checkpoints + 2),
        save_total_limit=checkpoints,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=windows, processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    # Matrices are so small that a second thread costs more than it gives.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer.train()
    finally:
        torch.set_num_threads(threads)
    return TrainerRun(folder / "run", *_write(folder, _excerpts(held_out), _excerpts(test)))


def _tokens(tokenizer: Any, documents: Sequence[str], limit: int) -> Tensor:
    """The documents' tokens, END after each: (T,) int64, no more documents than the run needs."""
    ids: list[int] = []
    for document in documents:
        ids += [*tokenizer(document, verbose=False)["input_ids"], tokenizer.eos_token_id]
        if len(ids) > limit:
            break
    return torch.tensor(ids)


def _excerpts(documents: Sequence[str]) -> list[str]:
    """A page from inside of each of up to 40 documents: little text, but of many kinds."""
    return [d[len(d) // 4 :][:2000] for d in documents[:40] if len(d) > 3000]


def _write(folder: Path, held_out: Sequence[str], test: Sequence[str]) -> tuple[Path, Path]:
    fit = folder / "fit.jsonl"
    fit.write_text("".join(json.dumps({"text": d}) + "\n" for d in held_out), encoding="utf-8")
    tests = folder / "test"
    tests.mkdir()
    for number, document in enumerate(test):
        (tests / f"{number}.txt").write_text(document, encoding="utf-8")
    return fit, tests


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    made = make_trainer_run(given.folder, given.steps, given.seed)
    print(made.folder, made.fit, made.test, *made.checkpoints, sep="\n")
