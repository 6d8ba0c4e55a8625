"""The task ``causal-lm``: model, text, split, packing, loss, and what goes wrong with them."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hf_run
import pytest
import torch
from runs import LinearTask, Pairs
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from twa_merge import evaluate
from twa_merge.building import parameters_on_meta
from twa_merge.errors import TaskError
from twa_merge.sharding import layers_of
from twa_merge.tasks import causal_lm
from twa_merge.tasks.causal_lm import CausalLM, token_losses
from twa_merge.tasks.documents import read_documents
from twa_merge.tasks.packing import cut_few

WORDS = [f"w{number:04d}" for number in range(4000)]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return hf_run.make_tokenizer([" ".join(WORDS), "def f(x):\n    return x\n"])


@pytest.fixture(scope="session")
def saved(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with random weights, as `save_pretrained` leaves it: tied, in bfloat16."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("hf") / "run" / "checkpoint-5"
    torch.manual_seed(0)
    model = LlamaForCausalLM(hf_run.make_config(len(tokenizer)))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make(saved: Path, tmp_path: Path) -> Callable[..., CausalLM]:
    """`CausalLM` on documents given as strings."""

    def build(*documents: str, checkpoint: Path = saved, **options: Any) -> CausalLM:
        data = tmp_path / f"{abs(hash(documents))}.jsonl"
        data.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
        return CausalLM(data, checkpoint, **options)

    return build


def unique_documents(count: int, words: int) -> list[str]:
    """Documents that have no word in common."""
    return [" ".join(WORDS[i * words : (i + 1) * words]) for i in range(count)]


def text_of(task: CausalLM, side: Any) -> str:
    return task.tokenizer.decode(torch.cat([e["input_ids"] for e in side]))


def words_of(task: CausalLM, side: Any) -> set[str]:
    # The first and last word of a sequence may be cut in two.
    return {w for w in text_of(task, side).replace(hf_run.END, " ").split() if len(w) == 5}


def tokens_in(side: Any) -> int:
    return sum(e["input_ids"].numel() for e in side)


# The model


def loaded(task: CausalLM, folder: Path) -> Any:
    from safetensors.torch import load_file

    model = task.build_model()
    missing = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not missing.unexpected_keys
    return model


def reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_model_is_the_one_that_transformers_loads(make: Any, saved: Path) -> None:
    model, ids = loaded(make("abc"), saved), torch.arange(60)[None] * 3 + 1
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert torch.equal(model(ids).logits, reference(saved)(ids).logits)


def test_no_cache_is_kept(make: Any) -> None:
    model = make("abc").build_model()
    assert model(torch.ones(1, 8, dtype=torch.long)).past_key_values is None


def test_building_draws_no_random_numbers(make: Any) -> None:
    task, before = make("abc"), torch.get_rng_state()
    model = task.build_model()
    assert torch.equal(before, torch.get_rng_state())
    assert {type(layer).__name__ for layer in layers_of(model, task)} == {"LlamaDecoderLayer"}


def accelerates_context() -> Any:
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)


@pytest.mark.parametrize("context", [parameters_on_meta, accelerates_context])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_parameters_alone_can_be_on_meta(
    context: Any, kind: str, saved: Path, make: Any, tmp_path: Path
) -> None:
    folder = saved if kind == "llama" else _gpt2(saved, tmp_path / "gpt2")
    task = make("abc", checkpoint=folder)
    with context():
        model = task.build_model()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    buffers = dict(reference(folder).named_buffers())
    assert buffers or kind == "gpt2"
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def _gpt2(like: Path, folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=300, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(like / name, folder)
    return folder


def test_learned_positions_limit_the_length(saved: Path, make: Any, tmp_path: Path) -> None:
    folder = _gpt2(saved, tmp_path / "gpt2")
    task = make(*unique_documents(30, 20), checkpoint=folder)
    assert task.max_length == 32
    model, data = loaded(task, folder), task.dataset()
    batch = {"input_ids": torch.stack([data[i]["input_ids"] for i in range(3)])}
    assert task.loss(model, batch).shape == (3,)
    with pytest.raises(TaskError, match="max-length"):
        make("abc", checkpoint=folder, max_length=33)


# Loss and metrics


def batch_of(task: CausalLM, count: int) -> dict[str, Tensor]:
    data = task.dataset()
    return {"input_ids": torch.stack([data[i]["input_ids"] for i in range(count)])}


def test_loss_is_that_of_transformers(make: Any, saved: Path) -> None:
    task = make(*unique_documents(30, 20))
    batch = batch_of(task, 4)
    losses = task.loss(loaded(task, saved), batch)
    assert losses.dtype == torch.float32
    model = reference(saved)
    expected = [model(row[None], labels=row[None]).loss for row in batch["input_ids"]]
    torch.testing.assert_close(losses, torch.stack(expected))


def test_loss_does_not_depend_on_the_rest_of_the_batch(make: Any, saved: Path) -> None:
    task = make(*unique_documents(30, 20))
    model, batch = loaded(task, saved), batch_of(task, 6)
    one = torch.cat([task.loss(model, {"input_ids": row[None]}) for row in batch["input_ids"]])
    torch.testing.assert_close(task.loss(model, batch), one, rtol=0, atol=2e-6)


def test_metrics_count_the_tokens_ranked_first(make: Any, saved: Path) -> None:
    task = make(*unique_documents(30, 20))
    model, ids = loaded(task, saved), batch_of(task, 3)["input_ids"]
    best = reference(saved)(ids).logits.argmax(-1).tolist()
    right = [[best[i][t] == int(ids[i, t + 1]) for t in range(ids.shape[1] - 1)] for i in range(3)]
    expected = torch.tensor([sum(row) / len(row) for row in right])
    losses, both = task.loss_and_metrics(model, {"input_ids": ids})
    assert torch.equal(task.metrics(model, {"input_ids": ids})["accuracy"], both["accuracy"])
    torch.testing.assert_close(both["accuracy"], expected)
    assert torch.equal(losses, task.loss(model, {"input_ids": ids}))


def test_smoothing_is_for_gradients_only(make: Any, saved: Path) -> None:
    documents = unique_documents(30, 20)
    plain, smooth = make(*documents), make(*documents, label_smoothing=0.2)
    model, batch = loaded(plain, saved), batch_of(plain, 2)
    with torch.no_grad():
        assert torch.equal(plain.loss(model, batch), smooth.loss(model, batch))
    logits = model(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    nll = -logits.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    expected = (0.8 * nll - 0.2 * logits.mean(-1)).mean(1)
    torch.testing.assert_close(smooth.loss(model, batch), expected)
    with pytest.raises(TaskError, match="label-smoothing"):
        make("abc", label_smoothing=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_in_chunks_are_the_same(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, smoothing: float
) -> None:
    torch.manual_seed(0)
    raw, targets = torch.randn(23, 50).to(dtype), torch.randint(50, (23,))
    weights = torch.rand(23)

    def both(logits: Tensor, losses: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        logits = logits.clone().requires_grad_()
        value = losses(logits)
        return value.detach(), torch.autograd.grad((value * weights).sum(), logits)[0]

    value, gradient = both(
        raw,
        lambda x: F.cross_entropy(x.float(), targets, reduction="none", label_smoothing=smoothing),
    )
    monkeypatch.setattr(causal_lm, "_CHUNK", 5 * 50)
    chunked, chunked_gradient = both(raw, lambda x: token_losses(x, targets, smoothing))
    assert type(token_losses(raw.requires_grad_(), targets).grad_fn).__name__.startswith("_Chunk")
    assert torch.equal(chunked, value)
    assert chunked_gradient.dtype == dtype
    assert torch.equal(chunked_gradient, gradient)


# Reading


def test_documents_of_every_format(tmp_path: Path) -> None:
    from pyarrow import parquet, table

    (tmp_path / "b.txt").write_text("two\n\nlines\n")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"n": 1, "text": "j1"}\n{"text": null}\n{"text": "ü"}\n')
    parquet.write_table(table({"text": ["p1", " ", "p2"], "n": [1, 2, 3]}), tmp_path / "t.parquet")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "[c].txt").write_text("in a folder")
    (tmp_path / ".hidden.txt").write_text("unseen")
    (tmp_path / "README.md").write_text("other things may lie there")
    texts = ["with a mark", "two\n\nlines\n", "in a folder"]
    assert read_documents(tmp_path) == [*texts, "j1", "ü", "p1", "p2"]
    assert read_documents(tmp_path / "*.txt") == texts[:2]
    assert read_documents(str(tmp_path / "**" / "*.txt")) == texts
    assert read_documents(tmp_path / "t.parquet") == ["p1", "p2"]
    assert read_documents(tmp_path / "sub" / "[c].txt") == texts[2:]


def test_text_field_and_files_with_other_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one", "n": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"k": [1], "body": "two"}\n')
    assert read_documents(tmp_path, "body") == ["one", "two"]


def test_nothing_is_left_in_the_users_cache(tmp_path: Path) -> None:
    import datasets

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    before = set(cache.rglob("*")) if cache.exists() else set()
    (tmp_path / "a.jsonl").write_text('{"text": "something"}\n')
    assert read_documents(tmp_path) == ["something"]
    assert (set(cache.rglob("*")) if cache.exists() else set()) == before
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"fine\n\xff bad", ["a.txt", "UTF-8", "offset 5", "iconv"]),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "\xff"}', ["a.jsonl", "UTF-8", "offset 27"]),
        ("a.jsonl", b'{"text": "fine"}\n{"text', ["a.jsonl", "cannot be read"]),
        ("a.parquet", b"no parquet", ["a.parquet", "cannot be read", "magic bytes"]),
        ("a.jsonl", b'{"body": "x", "n": 1}', ["'text'", "body, n", "--text-field"]),
        ("a.jsonl", b'{"text": 3}', ["does not hold text", "int: 3"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}', ["does not hold text", "int: 3"]),
        ("a.txt", b" \n", ["holds no text"]),
        ("a.txt", b"", ["holds no text"]),
        ("a.jsonl", b"\n\n", ["a.jsonl"]),
        ("a.csv", b"text\nx\n", [".txt, .jsonl, .parquet", "a.csv"]),
    ],
)  # fmt: skip
def test_wrong_data_is_named(tmp_path: Path, name: str, content: bytes, said: list[str]) -> None:
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append  # type: ignore[method-assign]
    logging.getLogger("datasets").addHandler(handler)
    (tmp_path / name).write_bytes(content)
    for data in (tmp_path / name, tmp_path):
        with pytest.raises(TaskError) as caught:
            read_documents(data)
        assert [part for part in said if part not in str(caught.value)] == []
    logging.getLogger("datasets").removeHandler(handler)
    assert not logged, "said twice"


def test_the_one_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_bytes(b"abc \xff" if number == 2 else b"abc")
    with pytest.raises(TaskError, match=r"2\.txt is not valid UTF-8"):
        read_documents(tmp_path)


def test_no_such_data(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="There is no file"):
        read_documents(tmp_path / "none.txt")
    with pytest.raises(TaskError, match="There is no file"):
        read_documents(tmp_path / "*.txt")


# Splitting and packing


def test_sequences_are_packed_to_the_length(make: Any, tokenizer: Any) -> None:
    documents = unique_documents(5, 9)
    data = make(*documents, max_length=16).dataset()
    ids: list[int] = []
    for document in documents:
        ids += [*tokenizer.encode(document), tokenizer.eos_token_id]
    ids.pop()
    expected = [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    assert [example["input_ids"].tolist() for example in data] == expected
    assert len(ids) % 16, "a remainder must be there to be dropped"
    assert data[0]["input_ids"].dtype == torch.int64


def test_a_short_text_is_one_short_sequence(make: Any, tokenizer: Any) -> None:
    task = make("def f(x):")
    (example,) = task.dataset()
    assert example["input_ids"].tolist() == tokenizer.encode("def f(x):")
    with pytest.raises(TaskError, match="too short"):
        make("d").dataset()


def test_what_the_tokenizer_puts_around_a_text(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    import copy

    from tokenizers.processors import TemplateProcessing

    begins = copy.deepcopy(tokenizer)
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"! $A {hf_run.END}", special_tokens=[("!", 5), (hf_run.END, 0)]
    )
    begins.save_pretrained(tmp_path / "tokenizer")
    task = make("ab", "cd", tokenizer=str(tmp_path / "tokenizer"))
    a, b = (tokenizer.encode(t, add_special_tokens=False) for t in ("ab", "cd"))
    assert task.dataset()[0]["input_ids"].tolist() == [5, *a, 0, 5, *b]


@pytest.mark.parametrize("count", [1, 2, 19, 20, 60])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_no_word_is_on_both_sides(make: Any, count: int, fraction: float) -> None:
    documents = unique_documents(count, 3600 // count)
    task = make(*documents, max_length=8)
    fit, guard = task.split(fraction, 0)
    assert not words_of(task, fit) & words_of(task, guard)
    total = tokens_in(fit) + tokens_in(guard)
    assert tokens_in(guard) / total == pytest.approx(fraction, abs=0.04)
    everything = sum(len(task.tokenizer.encode(d)) for d in documents)
    assert total >= 0.99 * everything, "only remainders are dropped"


def test_whole_documents_stay_on_one_side_where_there_are_many(make: Any) -> None:
    task = make(*unique_documents(30, 50), max_length=8)
    fit, guard = task.split(0.3, 1)
    sides = [{int(w[1:]) // 50 for w in words_of(task, side)} for side in (fit, guard)]
    assert not sides[0] & sides[1]


def test_sequences_of_one_document_are_a_group(make: Any) -> None:
    task = make(*unique_documents(30, 50), max_length=8)
    for side in (*task.split(0.3, 1), task.dataset()):
        found: dict[int, set[int]] = {}
        for group, example in zip(side.groups, side, strict=True):
            words = words_of(task, [example])
            # A sequence over the end of a document is of the one it has more of.
            if len({int(w[1:]) // 50 for w in words}) == 1:
                found.setdefault(group, set()).update(int(w[1:]) // 50 for w in words)
        assert all(len(documents) == 1 for documents in found.values())
        assert len(found) == len({d for documents in found.values() for d in documents})
    copies = make(*unique_documents(30, 50), *unique_documents(30, 50), max_length=8).dataset()
    assert len(set(copies.groups)) == 30


def test_stretches_of_few_documents_are_groups(make: Any) -> None:
    task = make(*unique_documents(2, 800), max_length=8)
    data = task.dataset()
    assert data.groups == sorted(data.groups)
    assert len(set(data.groups)) == 32
    fit, guard = task.split(0.25, 0)
    assert len(set(fit.groups)) + len(set(guard.groups)) == pytest.approx(32, abs=2)


def test_split_follows_the_seed(make: Any) -> None:
    task = make(*unique_documents(40, 30))
    first, again, other = (
        [text_of(task, side) for side in task.split(0.25, seed)] for seed in (3, 3, 4)
    )
    assert first == again
    assert first[1] != other[1]


@pytest.mark.parametrize("count", [3, 40])
def test_identical_documents_stay_together(make: Any, count: int) -> None:
    documents = unique_documents(count, 1200 // count)
    task = make(*documents, *documents, *documents, max_length=8)
    fit, guard = task.split(0.25, 0)
    assert not words_of(task, fit) & words_of(task, guard)


def test_one_huge_document_does_not_swallow_the_split(make: Any) -> None:
    documents = [
        " ".join(WORDS[:3000]),
        *(" ".join(WORDS[3000 + 25 * i :][:25]) for i in range(30)),
    ]
    for seed in range(5):
        fit, guard = make(*documents, max_length=8).split(0.1, seed)
        share = tokens_in(guard) / (tokens_in(fit) + tokens_in(guard))
        assert share == pytest.approx(0.1, abs=0.03)


def test_pieces_are_contiguous_and_end_after_lines() -> None:
    lines = "".join(f"line {i} {'x' * (i % 7)}\n" for i in range(300))
    text = "word " * 400
    solid = "z" * 900
    pieces = cut_few([lines, "short", text, solid])
    for number, document in enumerate([lines, "short", text, solid]):
        assert "".join(p.text for p in pieces if p.document == number) == document
    counts = Counter(p.document for p in pieces)
    assert counts[1] == 1
    assert len(pieces) >= 20
    assert all(p.text.endswith("\n") for p in pieces if p.document == 0)
    assert all(p.text.endswith(" ") for p in pieces if p.document == 2)


def test_neighbouring_pieces_are_joined_without_a_separator(make: Any, tokenizer: Any) -> None:
    task = make(" ".join(WORDS), max_length=8)
    fit, guard = task.split(0.25, 0)
    breaks = [text_of(task, side).count(hf_run.END) for side in (fit, guard)]
    pieces = len(cut_few([" ".join(WORDS)]))
    assert 0 < breaks[0] < 0.5 * pieces


def test_tensors_that_transformers_renames_as_it_loads_them(
    make: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """GPT-NeoX, and so Pythia, says `embed_out` in its files and `lm_head` in its model."""
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    folder = tmp_path / "neox" / "checkpoint-1"
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "embed_out.weight" in file.keys()  # noqa: SIM118
    task = make(" ".join(WORDS[:300]), checkpoint=folder)
    document = evaluate([folder], task)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    rows = task.dataset()
    losses = task.loss(model, default_collate([rows[i] for i in range(len(rows))]))
    assert document["models"][0]["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)


def test_text_is_read_again_only_for_another_configuration_or_tokenizer(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [shutil.copytree(saved, tmp_path / "run" / f"checkpoint-{step}") for step in (1, 2, 3)]
    elsewhere = shutil.copytree(saved, tmp_path / "elsewhere" / "checkpoint-1")
    other = shutil.copytree(saved, tmp_path / "run" / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    (run[1] / "trainer_state.json").write_text("{}")
    (tmp_path / "text.txt").write_text(" ".join(WORDS[:300]))
    read = []
    monkeypatch.setattr(
        "twa_merge.tasks.causal_lm.read_documents",
        lambda *given: (read.append(given), read_documents(*given))[1],
    )
    models = [*run, other, elsewhere]
    document = evaluate(models, "causal-lm", data=str(tmp_path / "text.txt"))
    assert len(read) == 3
    losses = [row["loss"] for row in document["models"]]
    assert losses[0] == losses[1] == losses[2] == losses[4]
    assert losses[3] != losses[0]


def test_a_task_file_may_bring_a_model_that_transformers_saves_under_other_names(
    tmp_path: Path,
) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4, num_labels=3,
    )  # fmt: skip

    class Images(LinearTask):
        def build_model(self) -> Any:
            return ViTForImageClassification(config)

        def dataset(self) -> Pairs:
            generator = torch.Generator().manual_seed(0)
            return Pairs(torch.randn(9, 3, 8, 8, generator=generator), torch.arange(9) % 3)

        def loss(self, model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
            logits = model(pixel_values=batch[0]).logits
            return torch.nn.functional.cross_entropy(logits, batch[1], reduction="none")

    torch.manual_seed(0)
    saved = ViTForImageClassification(config)
    saved.save_pretrained(tmp_path / "vit")
    with safe_open(tmp_path / "vit" / "model.safetensors", "pt") as file:
        assert set(file.keys()) != set(saved.state_dict())
    task = Images()
    found = evaluate([tmp_path / "vit"], task)["models"][0]["loss"]
    loss = task.loss(saved.eval(), default_collate(list(task.dataset())))
    assert found == pytest.approx(loss.mean().item(), abs=1e-5)


def test_adapters_are_said_to_be_for_average(make: Any, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(TaskError, match="adapters") as caught:
        make("text " * 50, checkpoint=tmp_path / "lora", model=str(saved)).build_model()
    assert "merge_and_unload" in caught.value.details["what to do"]


def test_one_text_again_and_again_cannot_be_split(make: Any) -> None:
    task = make("same\n" * 512)
    with pytest.raises(TaskError, match="too little data"):
        task.split(0.25, 0)


# What is missing


def test_tokenizer_of_the_runs_folder(make: Any, saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved, run / "checkpoint-9")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(run / "checkpoint-9" / name, run / name)
    # A bare file of weights has its folder's configuration.
    for checkpoint in (run / "checkpoint-9", run / "checkpoint-9" / "model.safetensors"):
        assert len(make("abc def", checkpoint=checkpoint).dataset()) == 1
    (run / "tokenizer.json").unlink()
    (run / "tokenizer_config.json").unlink()
    with pytest.raises(TaskError, match=r"no tokenizer[\s\S]*--tokenizer[\s\S]*--model"):
        make("abc", checkpoint=run / "checkpoint-9")
    assert make("abc", checkpoint=run / "checkpoint-9", tokenizer=str(saved)).tokenizer
    assert make("abc", checkpoint=run / "checkpoint-9", model=str(saved)).tokenizer


def test_model_instead_of_the_checkpoints_folder(make: Any, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"")
    with pytest.raises(TaskError, match=r"no config\.json[\s\S]*--model"):
        make("abc", checkpoint=tmp_path / "w.pt")
    assert make("abc", checkpoint=tmp_path / "w.pt", model=str(saved)).build_model()
    assert make("abc", checkpoint=None, model=str(saved)).build_model()
    with pytest.raises(TaskError, match="cannot be read from"):
        make("abc", model=str(tmp_path / "nowhere" / "at" / "all"))


def test_configurations_that_are_no_language_model(make: Any, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "vit")
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(TaskError, match="no causal language model"):
        make("abc", checkpoint=folder).build_model()
    (folder / "config.json").write_text('{"model_type": "never-heard-of"}')
    with pytest.raises(TaskError, match="configuration cannot be read"):
        make("abc", checkpoint=folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(TaskError, match="configuration cannot be read"):
        make("abc", checkpoint=folder)


@pytest.fixture
def with_code(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkpoint whose model is defined by a file beside it; that file leaves a mark."""
    from transformers import dynamic_module_utils

    folder = shutil.copytree(saved, tmp_path / "own")
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(tmp_path / 'mark')!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    modules, path = dict(sys.modules), list(sys.path)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield folder
    sys.path[:] = path
    for name in set(sys.modules) - set(modules):
        if "transformers_modules" in name:
            del sys.modules[name]


def test_code_of_a_checkpoint_is_run_only_when_allowed(
    make: Any, with_code: Path, tmp_path: Path
) -> None:
    with pytest.raises(TaskError, match=r"code of its own[\s\S]*--trust-remote-code"):
        make("abc", checkpoint=with_code)
    assert not (tmp_path / "mark").exists()
    model = make("abc", checkpoint=with_code, trust_remote_code=True).build_model()
    assert type(model).__name__ == "OwnModel"
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_tokenizer_of_another_model(make: Any, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(TaskError, match=r"below 100[\s\S]*--tokenizer"):
        make(*unique_documents(30, 20), checkpoint=folder).split(0.25, 0)


@pytest.mark.parametrize("package", ["transformers", "datasets"])
def test_a_package_that_is_not_installed(
    make: Any, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TaskError, match=rf'{package}[\s\S]*pip install "twa-merge\[hf\]"'):
        make("abc")
