"""What write_merge puts on the disk, against independent computations and on disks that fail."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from twa_merge import leftovers, output_folder
from twa_merge.checkpoints import open_checkpoints
from twa_merge.distributed import World
from twa_merge.dtypes import DTYPES
from twa_merge.errors import CheckpointError, OutputError, TwaMergeError
from twa_merge.layout import global_block, grouped_blocks, make_layout
from twa_merge.progress import Advanced, Event, Started
from twa_merge.writer import check_output, write_merge

State = dict[str, Tensor]
ALPHAS = [0.7, -0.45, 1 / 3, 0.4]
# The document of an earlier merge of ``save_run``.
RECORD = json.dumps(output_folder.record(["model.safetensors", "config.json"]))


def states(dtype: torch.dtype = torch.float32, n: int = 4, rows: int = 700) -> list[State]:
    """Small models; with 150,000 rows ``big`` is cut into several slices and pieces."""
    found = []
    for i in range(n):
        draw = torch.Generator().manual_seed(i)
        found.append(
            {
                "embed.weight": torch.randn(rows, 3, generator=draw).to(dtype),
                "layers.0.weight": torch.randn(40, 30, generator=draw).to(dtype),
                "layers.0.bias": torch.randn(40, generator=draw).to(dtype),
                "layers.1.weight": torch.randn(2, 3, 4, 5, generator=draw).to(dtype),
                "layers.1.scale": torch.randn((), generator=draw).to(dtype),
                "layers.1.none": torch.zeros(0, 3).to(dtype),
                "steps": torch.tensor(100 + i),
                "mask": torch.tensor([True, i % 2 == 0, False]),
            }
        )
    return found


def save_run(run: Path, models: Sequence[State], metadata: Mapping[str, str] | None = None) -> Path:
    """Hugging Face folders of one file each."""
    for i, state in enumerate(models):
        folder = run / f"checkpoint-{100 * (i + 1)}"
        folder.mkdir(parents=True)
        save_file(state, folder / "model.safetensors", {"format": "pt", **(metadata or {})})
        (folder / "config.json").write_text(json.dumps({"step": i}))
    return run


def save_sharded(run: Path, models: Sequence[State], prefix: str = "") -> Path:
    """Hugging Face folders of three shards and an index."""
    for i, state in enumerate(models):
        folder = run / f"checkpoint-{100 * (i + 1)}"
        folder.mkdir(parents=True)
        weight_map = {}
        for k in range(3):
            name = f"model-{k + 1:05d}-of-00003.safetensors"
            part = {prefix + t: state[t] for t in list(state)[k::3]}
            save_file(part, folder / name, {"format": "pt", "shard": str(k)})
            weight_map |= dict.fromkeys(part, name)
        metadata = {"total_parameters": 7, "total_size": sum(t.nbytes for t in state.values())}
        index = {"metadata": metadata, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))
        (folder / "config.json").write_text("{}")
    return run


def merge(
    run: Path | Sequence[Path], output: Path, alphas: object = ALPHAS, **options: object
) -> None:
    checkpoints = open_checkpoints([run] if isinstance(run, Path) else run)
    layout = make_layout(checkpoints)
    rows = np.array(alphas, dtype=np.float64)
    overrides = options.pop("overrides", {})
    options["overrides"] = {
        k: (t.double() if t.is_floating_point() else t).detach().numpy()
        for k, t in overrides.items()
    }
    blocks = options.pop("blocks", None) or global_block(layout)
    write_merge(checkpoints, layout, blocks, rows.reshape(-1, len(checkpoints)), output, **options)


def combined(tensors: Sequence[Tensor], alphas: Sequence[float], dtype: torch.dtype) -> Tensor:
    """The sum in numpy's float64, without a fused multiply-add, rounded once."""
    total = np.float64(0.0)
    for alpha, tensor in zip(alphas, tensors, strict=True):
        total = total + np.float64(alpha) * tensor.double().numpy()
    return rounded(torch.from_numpy(np.asarray(total)), dtype)


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of a narrower dtype, the even one of two.

    Torch rounds to float32 on the way, so it may be off by one place: the nearer neighbour then.
    """
    best = exact.to(dtype)
    if best.element_size() > 2:
        return best
    codes = torch.int8 if best.element_size() == 1 else torch.int16
    for step in (-1, 1):
        here, there = best.view(codes), best.view(codes) + step
        before, after = ((c.view(dtype).double() - exact).abs() for c in (here, there))
        nearer = (after < before) | ((after == before) & (here % 2 != 0))
        best = torch.where(nearer, there, here).view(dtype)
    return best


def same(a: Tensor, b: Tensor) -> bool:
    raw = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def assert_nothing_left(parent: Path, *names: str) -> None:
    assert sorted(p.name for p in parent.iterdir()) == sorted(names)


# --- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("alphas", [ALPHAS, [0.25] * 4, [1 / 3, 1 / 3, 1 / 3, 0.0], [0, 0, 1, 0]])
def test_sums_are_those_of_float64(tmp_path: Path, dtype: torch.dtype, alphas: list[float]) -> None:
    models = states(dtype, rows=150_000)
    merge(save_run(tmp_path / "run", models), tmp_path / "out", alphas)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == models[0].keys()
    for name in models[0]:
        if models[0][name].is_floating_point():
            expected = combined([m[name] for m in models], alphas, dtype)
            assert same(merged[name] + 0.0, expected + 0.0), name


def test_sums_are_right_to_the_last_bit_by_exact_arithmetic(tmp_path: Path) -> None:
    models = states(torch.float32)
    merge(save_run(tmp_path / "run", models), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["layers.0.bias"]
    for k, value in enumerate(merged.tolist()):
        exact = sum(
            Fraction(a) * Fraction(m["layers.0.bias"][k].item())
            for a, m in zip(ALPHAS, models, strict=True)
        )
        above, below = (np.nextafter(np.float32(value), np.float32(s)) for s in (9e9, -9e9))
        error = abs(exact - Fraction(value))
        assert error <= abs(exact - Fraction(float(above)))
        assert error <= abs(exact - Fraction(float(below)))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    models = [{"w": torch.randn(50, 3).to(dtype)} for _ in range(4)]
    merge(save_run(tmp_path / "run", models), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert same(merged, combined([m["w"] for m in models], ALPHAS, dtype))


def test_complex_numbers(tmp_path: Path) -> None:
    models = [{"w": torch.randn(200_000, 2, dtype=torch.complex64)} for _ in range(4)]
    merge(save_run(tmp_path / "run", models), tmp_path / "out", dtype=DTYPES["bfloat16"])
    merged = load_file(tmp_path / "out" / "model.safetensors")["w"]
    parts = [torch.view_as_real(m["w"]) for m in models]
    assert same(merged, torch.view_as_complex(combined(parts, ALPHAS, torch.float32)))


def test_rows_longer_than_a_slice(tmp_path: Path) -> None:
    models = [{"w": torch.randn(2, 600_001)} for _ in range(4)]
    merge(save_run(tmp_path / "run", models), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert same(merged, combined([m["w"] for m in models], ALPHAS, torch.float32))


def test_all_coefficients_zero(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", states())
    merge(run, tmp_path / "out", [0, 0, 0, 0])
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert not merged["embed.weight"].any()


def test_integers_are_the_newest(tmp_path: Path) -> None:
    models = states()
    merge(save_run(tmp_path / "run", models), tmp_path / "out", [1, 0, 0, 0])
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged["steps"].item() == 103
    assert same(merged["mask"], models[-1]["mask"])
    assert same(merged["embed.weight"], models[0]["embed.weight"])


def test_every_block_has_its_own_coefficients(tmp_path: Path) -> None:
    models = states()
    run = save_run(tmp_path / "run", models)
    layout = make_layout(open_checkpoints([run]))
    blocks = grouped_blocks("layers", {n: n.split(".")[0] for n in layout.averaged})
    rows = [[0.5, 0.5, 0, 0], [0.1, 0.2, 0.3, 0.4]]
    merge(run, tmp_path / "out", rows, blocks=blocks)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name in layout.averaged:
        row = rows[0] if name.startswith("embed") else rows[1]
        assert same(merged[name], combined([m[name] for m in models], row, torch.float32))


def test_overrides_replace_the_result(tmp_path: Path) -> None:
    models = states(torch.bfloat16)
    bias = torch.nn.Parameter(torch.randn(40))
    overrides = {"layers.0.bias": bias, "steps": torch.tensor(5), "layers.1.scale": torch.ones(())}
    merge(save_run(tmp_path / "run", models), tmp_path / "out", overrides=overrides)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert same(merged["layers.0.bias"], bias.detach().bfloat16())
    assert merged["steps"].item() == 5
    assert merged["layers.1.scale"].item() == 1.0
    overrides = {"layers.0.bias": bias * torch.nan}
    with pytest.raises(OutputError) as caught:
        merge(tmp_path / "run", tmp_path / "no", overrides=overrides)
    assert caught.value.details["tensor"] == "layers.0.bias"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    models = states(torch.bfloat16, rows=150_000)
    models[2]["embed.weight"][149_000, 1] = value
    run = save_run(tmp_path / "run", models)
    with pytest.raises(CheckpointError) as caught:
        merge(run, tmp_path / "deep" / "er" / "out")
    assert caught.value.details["checkpoint"].endswith("checkpoint-300")
    assert caught.value.details["tensor"] == "embed.weight"
    assert "[149000, 1]" in caught.value.details["found"]
    assert_nothing_left(tmp_path, "run")
    # With a coefficient of zero the checkpoint is not read at all.
    merge(run, tmp_path / "out", [0.5, 0.25, 0, 0.25])
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_infinities_that_cancel_and_odd_nans_are_named_too(tmp_path: Path) -> None:
    for k, codes in enumerate(([0x7F80, 0xFF80], [0x7F81, 0x3F80])):
        # Opposite infinities in one place; a signalling NaN.
        models = [
            {
                "w": torch.tensor([0x3F80, code], dtype=torch.int32)
                .to(torch.uint16)
                .view(torch.bfloat16)
            }
            for code in codes
        ]
        run = save_run(tmp_path / f"run{k}", models)
        with pytest.raises(CheckpointError) as caught:
            merge(run, tmp_path / "out", [0.5, 0.5])
        assert caught.value.details["checkpoint"].endswith("checkpoint-100")
        assert "at index [1]" in caught.value.details["found"]
    # Rounding must not carry from here into the sign.
    odd = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    run = save_run(tmp_path / "odd", [{"w": odd}, {"w": torch.ones(1)}])
    with pytest.raises(CheckpointError, match="not finite"):
        merge(run, tmp_path / "out", [0.5, 0.5], dtype=DTYPES["bfloat16"])


def test_overflow_in_the_saved_dtype_is_an_error(tmp_path: Path) -> None:
    models = [{"w": torch.full((9,), 60_000.0, dtype=torch.float16)} for _ in range(2)]
    run = save_run(tmp_path / "run", models)
    with pytest.raises(CheckpointError, match="overflows"):
        merge(run, tmp_path / "out", [2.0, -0.5])
    merge(run, tmp_path / "out", [2.0, -0.5], dtype=DTYPES["float32"])
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [90_000.0] * 9


# --- the files -----------------------------------------------------------------------------------


def test_shards_names_and_metadata_stay(tmp_path: Path) -> None:
    models = states()
    run = save_sharded(tmp_path / "run", models, prefix="_orig_mod.")
    merge(run, tmp_path / "out")
    first = run / "checkpoint-100"
    names = sorted(p.name for p in first.iterdir())
    assert_nothing_left(tmp_path / "out", *names)
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (first / index).read_bytes()
    for name in names[2:]:
        if name.endswith(".safetensors"):
            with (
                safe_open(first / name, "pt") as old,
                safe_open(tmp_path / "out" / name, "pt") as new,
            ):
                assert new.metadata() == old.metadata()
                assert new.keys() == old.keys()
                assert new.offset_keys() == old.offset_keys()
            for key, tensor in load_file(tmp_path / "out" / name).items():
                plain = key.removeprefix("_orig_mod.")
                if tensor.is_floating_point():
                    expected = combined([m[plain] for m in models], ALPHAS, torch.float32)
                    assert same(tensor, expected)


def test_the_header_is_that_of_the_format(tmp_path: Path) -> None:
    for i in range(2):
        # Written by hand, without any metadata and with an odd number of bytes in front.
        (tmp_path / f"{i}.safetensors").write_bytes(
            _raw_file({"a": ("U8", [3], b"abc"), "w": ("F32", [2], struct.pack("<2f", 1, i))})
        )
    merge([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], tmp_path / "out", [0.5, 0.5])
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert [s[0] for s in spans] == [0] + [s[1] for s in spans[:-1]]
    assert len(raw) == 8 + length + spans[-1][1]
    # Mapped tensors can only be used in place where their dtype's alignment is kept.
    assert header["w"]["data_offsets"] == [0, 8]
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged["w"].tolist() == [1.0, 0.5]
    assert bytes(merged["a"].tolist()) == b"abc"


def _raw_file(tensors: Mapping[str, tuple[str, list[int], bytes]]) -> bytes:
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_another_dtype_changes_sizes_and_one_key_of_the_config(tmp_path: Path) -> None:
    models = states(torch.float32)
    run = save_sharded(tmp_path / "run", models)
    config = '{\n\t"torch_dtype" : "float32",  "é": "float32",\n\t"text": {"dtype": "float32"}}'
    (run / "checkpoint-400" / "config.json").write_text(config)
    merge(run, tmp_path / "out", dtype=DTYPES["bfloat16"])
    merge(run, tmp_path / "kept")
    new = config.replace('"torch_dtype" : "float32"', '"torch_dtype" : "bfloat16"')
    new = new.replace('"dtype": "float32"', '"dtype": "bfloat16"')
    assert (tmp_path / "out" / "config.json").read_text() == new
    assert (tmp_path / "kept" / "config.json").read_text() == config
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    merged = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        merged |= load_file(path)
    assert index["metadata"] == {
        "total_parameters": 7,
        "total_size": sum(t.nbytes for t in merged.values()),
    }
    assert index["weight_map"].keys() == merged.keys()
    for name, tensor in merged.items():
        if models[0][name].is_floating_point():
            tensors = [m[name] for m in models]
            assert same(tensor, combined(tensors, ALPHAS, torch.bfloat16)), name
    assert merged["steps"].dtype == torch.int64


def test_pickles_become_safetensors_with_every_name(tmp_path: Path) -> None:
    models = states(torch.bfloat16)
    paths = []
    for i, state in enumerate(models):
        state["head.weight"] = state["embed.weight"]
        state["turned.weight"] = torch.randn(30, 20).bfloat16().t()
        prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
        paths.append(tmp_path / f"step-{i}.pt")
        torch.save({"model": prefixed}, paths[-1])
    merge(paths, tmp_path / "out")
    assert_nothing_left(tmp_path / "out", "model.safetensors")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == models[0].keys()
    assert same(merged["head.weight"], merged["embed.weight"])
    for name in ("embed.weight", "turned.weight", "layers.1.scale"):
        assert same(merged[name], combined([m[name] for m in models], ALPHAS, torch.bfloat16))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tied_tensors_follow_one_row_of_coefficients(tmp_path: Path) -> None:
    paths = []
    for i in range(2):
        weight = torch.randn(5, 4)
        paths.append(tmp_path / f"step-{i}.pt")
        torch.save({"embed": weight, "head": weight}, paths[-1])
    layout = make_layout(open_checkpoints(paths))
    blocks = grouped_blocks("layers", {"embed": "first", "head": "last"})
    assert layout["head"].tied_to == "embed"
    merge(paths, tmp_path / "out", [[0.5, 0.5], [2.0, -1.0]], blocks=blocks)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert same(merged["embed"], merged["head"])


def test_large_pickles_become_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = partial(huggingface_hub.split_state_dict_into_shards_factory, max_shard_size=5000)
    monkeypatch.setattr(huggingface_hub, "split_state_dict_into_shards_factory", split)
    models = states()
    paths = [tmp_path / f"step-{i}.pt" for i in range(4)]
    for path, state in zip(paths, models, strict=True):
        torch.save(state, path)
    merge(paths, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in models[0].values())
    assert len(set(index["weight_map"].values())) > 1
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)


def test_a_dtype_that_safetensors_lacks_is_refused_early(tmp_path: Path) -> None:
    paths = [tmp_path / f"step-{i}.pt" for i in range(2)]
    for path in paths:
        torch.save({"w": torch.randn(3), "z": torch.randn(3, dtype=torch.complex128)}, path)
    with pytest.raises(OutputError) as caught:
        check_output(tmp_path / "out", open_checkpoints(paths))
    assert caught.value.details["tensor"] == "z"
    assert caught.value.details["found"] == "complex128"


def test_sidecars_are_the_newest_byte_for_byte_and_documents_come_first(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", states())
    newest = run / "checkpoint-400"
    odd = b'{\r\n "dtype": "float32", "x": 1e5,}\xff\x00'
    for name in ("config.json", "tokenizer.json", "modeling_x.py", "notes.txt"):
        (newest / name).write_bytes(odd + name.encode())
    (newest / "additional_chat_templates").mkdir()
    (newest / "additional_chat_templates" / "tool.jinja").write_bytes(odd)
    (newest / "optimizer.pt").write_bytes(odd)
    merge(run, tmp_path / "out", documents={"twa_merge.json": "{}", "notes.txt": "näin"})
    for name in ("config.json", "tokenizer.json", "modeling_x.py"):
        assert (tmp_path / "out" / name).read_bytes() == odd + name.encode()
    template = tmp_path / "out" / "additional_chat_templates" / "tool.jinja"
    assert template.read_bytes() == odd
    assert (tmp_path / "out" / "notes.txt").read_text("utf-8") == "näin"
    assert not (tmp_path / "out" / "optimizer.pt").exists()


def test_transformers_loads_the_merge_with_the_logits_of_the_sum(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    models = []
    for i in range(4):
        torch.manual_seed(i)
        models.append(transformers.LlamaForCausalLM(config).eval())
        folder = tmp_path / "run" / f"checkpoint-{i + 1}"
        models[-1].save_pretrained(folder, max_shard_size="20KB")
    merge(tmp_path / "run", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    dicts = [m.state_dict() for m in models]
    sums = {k: combined([d[k] for d in dicts], ALPHAS, torch.float32) for k in dicts[0]}
    models[0].load_state_dict(sums)
    tokens = torch.arange(32).reshape(2, 16)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, models[0](tokens).logits)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("anonymous memory cannot be told apart here")
    models = [{"w": torch.randn(6_000_000), "x": torch.randn(1, 6_000_000)} for _ in range(4)]
    run = save_run(tmp_path / "run", models)
    del models
    seen: list[int] = []
    merge(run, tmp_path / "out", progress=lambda event: seen.append(_anonymous_bytes()))
    assert len(seen) > 20
    assert max(seen) - seen[0] < 12e6  # the file has 48 MB


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    models = states()
    events: list[Event] = []
    merge(save_sharded(tmp_path / "run", models), tmp_path / "out", progress=events.append)
    assert isinstance(events[0], Started)
    assert events[0].total == sum(t.nbytes for t in models[0].values())
    assert events[0].total == sum(e.amount for e in events if isinstance(e, Advanced))


# --- complete or not at all ----------------------------------------------------------------------


def test_only_an_earlier_merge_is_replaced_and_only_when_asked(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", states())
    out = tmp_path / "out"
    out.mkdir()
    merge(run, out, documents={"twa_merge.json": RECORD})
    first = (out / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="exists already") as caught:
        merge(run, out, [1, 0, 0, 0])
    assert "--overwrite" in caught.value.details["what to do"]
    merge(run, out, [1, 0, 0, 0], overwrite=True)
    assert (out / "model.safetensors").read_bytes() != first
    # This one was written without a report, so it might be anything.
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="exists already") as caught:
            merge(run, out, overwrite=overwrite)
        assert "--overwrite" not in caught.value.details["what to do"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        merge(run, tmp_path / "file", overwrite=True)
    with pytest.raises(OutputError, match="cannot be written"):
        merge(run, tmp_path / "file" / "out")
    assert_nothing_left(tmp_path, "run", "out", "file")


@pytest.mark.parametrize("name", ["notes.txt", "evals/mmlu.json", "evals/link"])
def test_what_an_earlier_merge_did_not_write_is_not_deleted(tmp_path: Path, name: str) -> None:
    run, out = save_run(tmp_path / "run", states()), tmp_path / "out"
    merge(run, out, documents={"twa_merge.json": RECORD})
    mine = out / name
    mine.parent.mkdir(exist_ok=True)
    if name.endswith("link"):
        mine.symlink_to(tmp_path / "nowhere")
    else:
        mine.write_text("mine")
    for write in (lambda: check_output(out, open_checkpoints([run]), overwrite=True),
                  lambda: merge(run, out, overwrite=True)):  # fmt: skip
        with pytest.raises(OutputError, match="holds more than an earlier merge") as caught:
            write()
        assert caught.value.details["found"] == name
    assert mine.is_symlink() or mine.read_text() == "mine"
    assert_nothing_left(tmp_path, "run", "out")


def test_folders_that_cannot_be_replaced_are_refused_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(tmp_path / "run", states())
    here = tmp_path / "work" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    for output in (Path("."), Path(".."), here, Path("../../work")):
        with pytest.raises(OutputError, match="cannot be replaced") as caught:
            check_output(output, open_checkpoints([run]))
        assert str(output / "merged") in caught.value.details["what to do"]
    check_output(Path("merged"), open_checkpoints([run]))
    mounted = next(Path(p) for p in ("/proc", "/dev", "/") if os.path.ismount(p))
    with pytest.raises(OutputError, match="cannot be replaced") as caught:
        check_output(mounted, open_checkpoints([run]))
    assert "mounted" in caught.value.details["found"]


def test_the_output_keeps_away_from_the_checkpoints(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", states())
    link = tmp_path / "link"
    link.symlink_to(run / "checkpoint-100", target_is_directory=True)
    for path in (run / "checkpoint-200", run / "checkpoint-100" / "out", link, run, tmp_path):
        with pytest.raises(OutputError, match="cannot be the output"):
            check_output(path, open_checkpoints([run]), overwrite=True)
    check_output(run / "merged", open_checkpoints([run]))
    # A folder of links, as downloads make them, into what would be replaced.
    merge(run, tmp_path / "out", documents={"twa_merge.json": RECORD})
    (tmp_path / "linked").mkdir()
    linked = tmp_path / "linked" / "model.safetensors"
    linked.symlink_to(tmp_path / "out" / "model.safetensors")
    with pytest.raises(OutputError, match="holds a checkpoint"):
        check_output(tmp_path / "out", open_checkpoints([linked.parent]), overwrite=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    run = save_run(tmp_path / "run", states())
    merge(run, tmp_path / "old", documents={"twa_merge.json": RECORD})
    before = (tmp_path / "old" / "model.safetensors").read_bytes()

    def interrupt(event: Event) -> None:
        if isinstance(event, Advanced):
            raise error

    for output in (tmp_path / "new" / "out", tmp_path / "old"):
        with pytest.raises(error):
            merge(run, output, [1, 0, 0, 0], overwrite=True, progress=interrupt)
    assert_nothing_left(tmp_path, "run", "old")
    assert (tmp_path / "old" / "model.safetensors").read_bytes() == before
    assert not any("twa-merge" in thread.name for thread in threading.enumerate())


def test_a_failed_swap_puts_the_earlier_merge_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(tmp_path / "run", states())
    merge(run, tmp_path / "out", documents={"twa_merge.json": RECORD})
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if "writing" in Path(source).name:
            raise PermissionError(13, "Permission denied", str(target))
        rename(source, target)

    monkeypatch.setattr(output_folder.os, "rename", fail)
    with pytest.raises(OutputError, match="cannot be written"):
        merge(run, tmp_path / "out", overwrite=True)
    assert_nothing_left(tmp_path, "run", "out")
    assert (tmp_path / "out" / "twa_merge.json").is_file()


def test_something_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", states())

    def intrude(event: Event) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "thesis.txt").write_text("mine")

    with pytest.raises(OutputError, match="exists already"):
        merge(run, tmp_path / "out", progress=intrude)
    assert_nothing_left(tmp_path, "run", "out")
    assert_nothing_left(tmp_path / "out", "thesis.txt")


def test_a_folder_that_the_ranks_do_not_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(tmp_path / "run", states())
    monkeypatch.setattr(output_folder.Staging, "create", lambda self: None)
    with pytest.raises(OutputError, match="not the same folder for all processes"):
        merge(run, tmp_path / "out")
    assert_nothing_left(tmp_path, "run")


SCRIPT = """
import os, resource, signal, sys
from pathlib import Path
import numpy
from twa_merge.checkpoints import open_checkpoints
from twa_merge.distributed import start, stop
from twa_merge.dtypes import DTYPES
from twa_merge.errors import TwaMergeError
from twa_merge.layout import global_block, make_layout
from twa_merge.progress import Advanced, silent
from twa_merge.writer import write_merge

def merge(run, output, **options):
    checkpoints = open_checkpoints([run])
    layout = make_layout(checkpoints)
    alphas = numpy.full((1, len(checkpoints)), 1 / len(checkpoints))
    write_merge(checkpoints, layout, global_block(layout), alphas, Path(output), **options)
"""


def run_script(
    body: str, *arguments: object, launch: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launch]
    code = SCRIPT + textwrap.dedent(body)
    if launch:
        script = Path(str(arguments[0])).parent / "script.py"
        script.write_text(code)
        command.append(str(script))
    else:
        command += ["-c", code]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )


def test_what_killed_runs_have_left_is_cleared_away(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", states())
    killed = run_script(
        """
        def kill(event):
            if isinstance(event, Advanced):
                os.kill(os.getpid(), signal.SIGKILL)
        merge(sys.argv[1], sys.argv[2], progress=kill)
        """,
        run,
        tmp_path / "out",
    )
    assert killed.returncode == -signal.SIGKILL
    (left,) = (p for p in tmp_path.iterdir() if p.name != "run")
    assert left.name.startswith(".out.writing-")
    # What belongs to a living process, or to another output, stays.
    alive = left.with_name(left.name.rpartition("-")[0] + f"-{os.getppid()}")
    other = left.with_name(left.name.replace(".out.", ".other."))
    alive.mkdir()
    other.mkdir()
    merge(run, tmp_path / "out")
    assert_nothing_left(tmp_path, "run", "out", alive.name, other.name)


def killed_between_the_renames(run: Path, output: Path) -> Path:
    """Where the earlier merge is, of which a killed run has left nothing but that."""
    merge(run, output, documents={"twa_merge.json": RECORD})
    killed = run_script(
        """
        rename = os.rename
        def kill(source, target):
            rename(source, target)
            os.kill(os.getpid(), signal.SIGKILL)
        os.rename = kill
        merge(sys.argv[1], sys.argv[2], overwrite=True)
        """,
        run,
        output,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists()
    (earlier,) = output.parent.glob(f".{output.name}.replaced-*")
    return earlier


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("host", ["", "another-host-2"])
def test_a_merge_that_a_killed_run_has_moved_aside(
    tmp_path: Path, empty: bool, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = save_run(tmp_path / "run", states()), tmp_path / "out"
    earlier = killed_between_the_renames(run, out)
    if host:
        earlier = earlier.rename(tmp_path / f".out.replaced-{host}-1")
    if empty:
        out.mkdir()
    before = (earlier / "model.safetensors").read_bytes()
    # The checks before the work and whoever asks for the merge say where it is.
    move = f"mv {earlier} {out}"
    command = f"rmdir {out} && {move}" if empty else move
    checkpoints = open_checkpoints([run])
    for ask in (lambda: check_output(out, checkpoints), lambda: open_checkpoints([out])):
        with pytest.raises(TwaMergeError, match="another name") as caught:
            ask()
        assert str(earlier) in caught.value.details["found"]
        assert command in caught.value.details["what to do"]
        assert out.exists() == empty
    # A run that fails has it back, whole.
    check_output(out, checkpoints, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(output_folder.Staging, "require_shared", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge(run, out, [1, 0, 0, 0], overwrite=True)
    assert_nothing_left(tmp_path, "run", "out")
    assert (out / "model.safetensors").read_bytes() == before
    merge(run, out, [1, 0, 0, 0], overwrite=True)
    assert_nothing_left(tmp_path, "run", "out")
    assert (out / "model.safetensors").read_bytes() != before


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_killed_run_s_merge_can_be_moved_back_as_advised(tmp_path: Path) -> None:
    run, out = save_run(tmp_path / "run", states()), tmp_path / "my out"
    killed_between_the_renames(run, out)
    out.mkdir()
    with pytest.raises(TwaMergeError) as caught:
        open_checkpoints([out])
    command = caught.value.details["what to do"].partition(": ")[2]
    subprocess.run(command, shell=True, check=True)
    assert len(open_checkpoints([out])) == 1


def test_an_earlier_merge_goes_only_when_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being deleted has another name, so that a kill leaves nothing half under the old."""
    run, out = save_run(tmp_path / "run", states()), tmp_path / "out"
    merge(run, out, documents={"twa_merge.json": RECORD})
    deleted = []

    def note(folder: Path, **_: object) -> None:
        deleted.append(Path(folder).name)
        assert (out / "model.safetensors").exists()

    monkeypatch.setattr(leftovers.shutil, "rmtree", note)
    merge(run, out, overwrite=True)
    assert [name.rpartition("-")[0].partition("-")[0] for name in deleted] == [".out.deleted"]
    monkeypatch.undo()
    # The next one clears it away, but nothing that another host has left beside a merge.
    (tmp_path / ".out.replaced-another-1").mkdir()
    (out / "twa_merge.json").write_text(RECORD)
    merge(run, out, overwrite=True)
    assert_nothing_left(tmp_path, "run", "out", ".out.replaced-another-1")


def test_a_file_size_limit_is_one_message_and_leaves_nothing(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", states(rows=150_000))
    limited = run_script(
        """
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        try:
            merge(sys.argv[1], sys.argv[2])
        except TwaMergeError as error:
            sys.exit(f"{type(error).__name__}: {error}")
        """,
        run,
        tmp_path / "out",
    )
    assert limited.returncode == 1, limited.stderr
    assert "OutputError: There is too little space" in limited.stderr
    assert "Traceback" not in limited.stderr
    assert_nothing_left(tmp_path, "run")


def test_a_disk_that_is_really_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path / "run", states(rows=150_000))
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("only root can make a small disk")
    try:
        with pytest.raises(OutputError, match="too little space") as early:
            check_output(disk / "out", open_checkpoints([run]))
        assert "bytes free" in early.value.details["found"]
        # Another process takes the space after the check.
        monkeypatch.setattr("twa_merge.writer.require_space", lambda output, needed: None)
        with pytest.raises(OutputError, match="too little space") as late:
            merge(run, disk / "deep" / "out")
        assert "No space left" in late.value.details["found"]
        assert "1,8" in late.value.details["expected"]
        assert_nothing_left(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- several ranks -------------------------------------------------------------------------------


class Threads:
    """Ranks of one world as threads; only what the writer asks of a World."""

    def __init__(self, rank: int, shared: list[object], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.is_zero = rank, len(shared), rank == 0
        self._shared, self._barrier = shared, barrier

    def gather(self, value: object) -> list[object]:
        self._shared[self.rank] = value
        self._barrier.wait(30)
        found = list(self._shared)
        self._barrier.wait(30)
        return found

    def broadcast(self, value: object) -> object:
        return self.gather(value)[0]


def merge_on_ranks(size: int, run: Path, output: Path) -> list[BaseException | None]:
    shared: list[object] = [None] * size
    barrier = threading.Barrier(size)
    errors: list[BaseException | None] = [None] * size

    def work(rank: int) -> None:
        try:
            merge(run, output, world=Threads(rank, shared, barrier))
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("size", [2, 5])
def test_ranks_write_the_same_files_as_one(tmp_path: Path, size: int) -> None:
    run = save_sharded(tmp_path / "run", states())
    merge(run, tmp_path / "one")
    assert merge_on_ranks(size, run, tmp_path / "out") == [None] * size
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert_nothing_left(tmp_path / "out", *names)
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_an_error_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    models = states()
    models[1]["layers.1.weight"].fill_(torch.nan)
    run = save_sharded(tmp_path / "run", models)
    errors = merge_on_ranks(3, run, tmp_path / "out")
    assert {type(e) for e in errors} == {CheckpointError}
    assert {e.details["tensor"] for e in errors} == {"layers.1.weight"}
    assert_nothing_left(tmp_path, "run")
    (tmp_path / "out").write_text("")
    assert {type(e) for e in merge_on_ranks(2, run, tmp_path / "out")} == {OutputError}


def test_torchrun(tmp_path: Path) -> None:
    models = states()
    run = save_sharded(tmp_path / "run", models)
    models[1]["layers.1.weight"].fill_(torch.nan)
    bad = save_sharded(tmp_path / "bad", models)
    done = run_script(
        """
        world = start("cpu")
        merge(sys.argv[1], sys.argv[3], world=world)
        try:
            merge(sys.argv[2], sys.argv[4], world=world)
        except TwaMergeError as error:
            # At once: what two processes write in parts is mixed.
            os.write(1, f"rank {world.rank}: {error.details['tensor']}\\n".encode())
        stop()
        """,
        run,
        bad,
        tmp_path / "out",
        tmp_path / "no",
        launch=["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")[:2]) == [f"rank {r}: layers.1.weight" for r in (0, 1)]
    merge(run, tmp_path / "one", [0.25] * 4)
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert not (tmp_path / "no").exists()
    assert World().is_zero
