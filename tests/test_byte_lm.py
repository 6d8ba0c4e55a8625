"""The byte-level task, the text that it is made of, and the demo's training run."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from twa_merge import demo
from twa_merge.errors import ConfigError, TaskError
from twa_merge.progress import Advanced, Started
from twa_merge.task import check_task, split
from twa_merge.tasks.byte_lm import (
    ByteConfig,
    ByteTask,
    ByteTransformer,
    Sequences,
    Text,
    standard_library_text,
)

SMALL = ByteConfig(width=16, layers=2, heads=2, context=12)


def prose(number: int, size: int = 600) -> bytes:
    """A document that tells its own bytes from those of other documents."""
    return bytes([97 + number] * 3) + random.Random(number).randbytes(size)


def small_text() -> Text:
    words = " ".join(["def", "return", "self", "import", "None"] * 40).encode()
    return Text((words, words[::-1]), (prose(1), prose(2)), (prose(3),))


def small_run(folder, **options):
    return demo.train_run(folder, config=SMALL, text=small_text(), batch_size=4, **options)


def weights(checkpoint):
    return {k: v for f in checkpoint.glob("*.safetensors") for k, v in load_file(f).items()}


def same(first, second):
    return all(torch.equal(first[k], second[k]) for k in first.keys() | second.keys())


def test_the_default_model_has_four_tenths_of_a_million_parameters():
    model = ByteTransformer()
    assert 350_000 < sum(p.numel() for p in model.parameters()) < 450_000
    assert isinstance(model.layers, nn.ModuleList)


def test_no_position_sees_the_bytes_after_it():
    model = ByteTransformer(SMALL)
    model.reset(0)
    x = torch.randint(0, 256, (1, 12))
    changed = x.clone()
    changed[0, 7] = (x[0, 7] + 1) % 256
    before, after = model(x), model(changed)
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-6)
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-3)


def test_the_loss_is_nats_per_byte_of_each_sequence():
    task = ByteTask([prose(1)], config=SMALL)
    model = task.build_model()
    batch = task.dataset().bytes[:3]
    losses = task.loss(model, batch).tolist()
    assert len(losses) == 3
    for i, sequence in enumerate(batch.tolist()):
        total = 0.0
        for at in range(12):
            logits = model(torch.tensor([sequence[: at + 1]]))[0, -1].double().tolist()
            total += math.log(sum(map(math.exp, logits))) - logits[sequence[at + 1]]
        assert losses[i] == pytest.approx(total / 12, abs=1e-5)


def test_sequences_are_cut_without_overlap_and_know_their_document():
    documents = [prose(0, 97), b"too short", prose(1, 60)]
    sequences = Sequences(documents, 25)
    assert sequences.documents == [0] * 4 + [2] * 2
    for number in (0, 2):
        rows = zip(sequences, sequences.documents, strict=True)
        own = [bytes(s.tolist()) for s, d in rows if d == number]
        assert documents[number].startswith(b"".join(own))
    few = Sequences(documents, 25, limit=3, seed=1)
    assert len(few) == 3
    assert torch.equal(few.bytes, Sequences(documents, 25, limit=3, seed=1).bytes)
    rows = [s.tolist() for s in sequences]
    assert all(s.tolist() in rows for s in few)


def test_too_short_documents_are_an_error():
    with pytest.raises(TaskError, match="too little text"):
        Sequences([b"short"], 129)


def test_no_document_is_on_both_sides_of_the_split():
    documents = [prose(i) for i in range(8)]
    task = check_task(ByteTask(documents, [prose(9)], config=SMALL), "bytes")
    parts = split(task, 0.25, seed=3)
    fit, guard = (
        {d for d in documents for s in part if bytes(s.tolist()) in d}
        for part in (parts.fit, parts.guard)
    )
    assert len(fit) == 6
    assert len(guard) == 2
    assert not fit & guard
    assert len(parts.test) == 603 // 13


@pytest.fixture
def library(tmp_path):
    """A standard library of 40 files, one of them twice, and what does not belong to it."""
    folder = tmp_path / "lib"
    for i in range(40):
        path = folder / ("package" if i % 2 else "") / f"file{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(prose(i, 40_000))
    (folder / "again.py").write_bytes(prose(7, 40_000))
    for place in ("site-packages/x", "test", "package/tests", "idlelib", "encodings"):
        (folder / place).mkdir(parents=True)
        (folder / place / "stranger.py").write_bytes(b"stranger" * 1000)
    (folder / "notes.txt").write_bytes(b"stranger" * 1000)
    (folder / "_sysconfigdata_linux.py").write_bytes(b"stranger" * 1000)
    return folder


def test_the_standard_library_is_divided_by_file(library):
    text = standard_library_text(3, folder=library)
    parts = [text.train, text.held_out, text.test]
    everything = [d for part in parts for d in part]
    assert sorted(everything) == sorted(prose(i, 40_000) for i in range(40))
    assert [len(p) for p in parts] == [32, 4, 4]
    assert text == standard_library_text(3, folder=library)
    assert text != standard_library_text(4, folder=library)


def test_a_python_without_its_source_is_an_error(tmp_path):
    with pytest.raises(TaskError, match="too little Python source") as caught:
        standard_library_text(folder=tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_this_python_has_enough_text():
    text = standard_library_text()
    parts = [set(text.train), set(text.held_out), set(text.test)]
    assert not any(a & b for a, b in itertools.combinations(parts, 2))
    sizes = [sum(map(len, part)) for part in parts]
    assert sizes[0] > 7 * max(sizes[1:])
    assert min(sizes) > 0.08 * sum(sizes)


def test_a_run_saves_shards_as_real_runs_do(tmp_path):
    events = []
    saved = small_run(tmp_path / "run", steps=7, checkpoints=3, progress=events.append)
    assert [p.name for p in saved] == ["checkpoint-5", "checkpoint-6", "checkpoint-7"]
    assert sum(isinstance(e, Advanced) for e in events) == 7
    assert isinstance(events[0], Started)
    config = json.loads((saved[0] / "config.json").read_text())
    assert config["width"] == 16
    model = ByteTransformer(SMALL)
    model.load_state_dict(weights(saved[-1]))


def test_a_model_of_the_default_size_comes_in_several_shards(tmp_path):
    folder = demo.Training(small_text()).save(tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) == 3
    assert files == {p.name for p in folder.glob("*.safetensors")}


def test_the_same_seed_gives_the_same_run(tmp_path):
    first, again, other = (
        small_run(tmp_path / name, steps=3, checkpoints=1, seed=seed)[0]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert same(weights(first), weights(again))
    assert not same(weights(first), weights(other))


def test_another_seed_draws_other_batches():
    first, second = (
        demo.Training(small_text(), config=SMALL, batch_size=4, seed=seed) for seed in (0, 1)
    )
    for one in (first, second):
        one.model.reset(7)
        one.advance()
    assert not same(first.model.state_dict(), second.model.state_dict())


def test_a_decaying_run_is_the_constant_one_up_to_its_last_fifth(tmp_path):
    constant, decaying = (
        small_run(tmp_path / schedule, steps=10, checkpoints=5, schedule=schedule)
        for schedule in ("constant", "decay")
    )
    agree = [same(weights(a), weights(b)) for a, b in zip(constant, decaying, strict=True)]
    assert agree == [True] * 3 + [False] * 2
    assert [demo.decay_factor(k, 10) for k in (8, 9, 10)] == [1.0, 2 / 3, 1 / 3]


def test_a_copy_of_a_training_goes_the_same_way():
    training = demo.Training(small_text(), config=SMALL, batch_size=4)
    training.advance()
    copied = copy.deepcopy(training)
    for one in (training, copied):
        one.advance()
    assert same(training.model.state_dict(), copied.model.state_dict())


def test_training_lowers_the_loss():
    training = demo.Training(small_text(), config=SMALL, learning_rate=0.01)
    task = ByteTask(small_text().train, config=SMALL)

    def loss():
        with torch.no_grad():
            return float(task.loss(training.model, task.dataset().bytes).mean())

    before = loss()
    for _ in range(60):
        training.advance()
    assert before > 5.4
    assert loss() < 3.5


@pytest.mark.parametrize("options", [{"schedule": "cosine"}, {"checkpoints": 5}])
def test_wrong_arguments_are_clear_errors(tmp_path, options):
    with pytest.raises(ConfigError):
        small_run(tmp_path, **{"steps": 8, **options})
    assert not list(tmp_path.iterdir())


def test_the_demo_merges_on_text_that_its_run_has_not_seen(monkeypatch):
    monkeypatch.setattr(demo, "standard_library_text", small_text)
    task = demo.task(sequences=5, test_sequences=2)
    texts = {"held_out": task.dataset(), "test": task.test_dataset()}
    assert {k: len(v) for k, v in texts.items()} == {"held_out": 5, "test": 2}
    for part, sequences in texts.items():
        for sequence in sequences:
            assert any(bytes(sequence.tolist()) in d for d in getattr(small_text(), part))


def test_starting_weights_depend_on_the_seed_alone():
    first, second = ByteTransformer(SMALL), ByteTransformer(SMALL)
    first.reset(5)
    second.reset(5)
    assert same(first.state_dict(), second.state_dict())
    second.reset(6)
    assert not same(first.state_dict(), second.state_dict())
