"""The real command line: help, exit codes, the error boundary, interruptions, --nproc."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from twa_merge_cli.boundary import run
from twa_merge_cli.main import COMMANDS, cli

import twa_merge
from twa_merge import config
from twa_merge.candidates import ALL
from twa_merge.errors import CheckpointError, ConfigError, NoImprovement

DOCUMENT = Path(__file__).parent / "documents" / "train.json"
TRAIN = ["train", "run", "--task", "t", "-o", "out"]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Replaces the library's functions by one that does ``act``; returns the calls it got."""

    def replace(act: Callable[..., Any]) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def work(*args: Any, **kwargs: Any) -> Any:
            calls.append({"args": args, **kwargs})
            return act()

        for name, module in twa_merge._PUBLIC.items():
            if name in ("merge", "average", "evaluate", "inspect"):
                fake = types.ModuleType(module)
                setattr(fake, name, work)
                monkeypatch.setitem(sys.modules, f"twa_merge.{module}", fake)
        return calls

    return replace


def raising(error: BaseException) -> Callable[[], Any]:
    def act() -> Any:
        raise error

    return act


def document() -> dict[str, Any]:
    return json.loads(DOCUMENT.read_text())


def python(*args: str, act: str = "", folder: Path | None = None, **options: Any) -> Any:
    """A real process of the command line; ``act`` is the body of the library's functions."""
    environment = {**os.environ}
    if folder is not None:
        body = "\n".join(f"    {line}" for line in act.splitlines())
        (folder / "sitecustomize.py").write_text(
            "import json, os, signal, sys, time, types\n"
            f"def work(*args, **kwargs):\n{body}\n"
            "for name in ('pipeline', 'averaging', 'evaluation', 'inspection'):\n"
            "    module = sys.modules['twa_merge.' + name] = types.ModuleType(name)\n"
            "    module.merge = module.average = module.evaluate = module.inspect = work\n"
        )
        path = [str(folder), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    return subprocess.Popen(
        [sys.executable, *args],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process: Any, seconds: float = 60.0) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


@pytest.mark.parametrize("args", [["--help"], ["--version"], [], ["train", "--help"]])
def test_help_and_version_import_no_torch(args: list[str]) -> None:
    process = python("-X", "importtime", "-m", "twa_merge_cli", *args)
    code, out, err = finish(process)
    imported = {line.rpartition("|")[2].strip() for line in err.splitlines()}
    assert code == (0 if args else 2)
    assert args == [] or out
    assert "twa_merge" in imported
    assert not imported & {"torch", "numpy", "rich", "rich.console", "matplotlib"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["--version"]) == 0
    assert capsys.readouterr().out == f"twa-merge {twa_merge.__version__}\n"


def test_help_documents_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["--help"]) == 0
    text = capsys.readouterr().out
    for code in ("0 ", "1 ", "2 ", "3 ", "130 "):
        assert f"\n    {code}" in text
    for command in COMMANDS:
        assert f"\n  {command} " in text


def test_help_and_readme_name_all_candidates(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["train", "--help"]) == 0
    section = capsys.readouterr().out.split("--candidates")[1].split("--select")[0]
    assert {"quick", "all", *ALL} <= set(re.findall(r"[\w-]+", section))
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in ALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, [command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Examples:\n    twa-merge {command}" in text
    assert "--debug" in text
    assert "--json" in text


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["train"],
        ["train", "run", "-o", "out"],
        ["train", "run", "--task", "t"],
        [*TRAIN, "--nonsense"],
        [*TRAIN, "--lr", "fast"],
        [*TRAIN, "--ridge", "strong"],
        [*TRAIN, "--blocks", "rows"],
        [*TRAIN, "--last", "0"],
        [*TRAIN, "--start", "somewhere"],
        [*TRAIN, "--start", "²"],
        [*TRAIN, "--subspace", "pca"],
        [*TRAIN, "--subspace", "pca:²"],
        [*TRAIN, "--subspace", "random:²"],
        [*TRAIN, "--seed", "99999999999999999999999"],
        [*TRAIN, "--seed", "-1"],
        [*TRAIN, "--guard-fraction", "1"],
        [*TRAIN, "--lr", "nan"],
        [*TRAIN, "--optimizer", "sgd", "--lr", "0"],
        [*TRAIN, "--optimizer", "sgd", "--momentum", "1"],
        [*TRAIN, "--nproc", "0"],
        [*TRAIN, "--nproc", "1000000"],
        ["eval", "run", "--task", "t", "--gather", "model"],
        ["eval", "run", "--task", "t", "--activation-checkpointing"],
        [*TRAIN, "--data", "a.txt", "--data", "b.txt"],
        ["eval", "run", "--task", "t", "--data", "a.txt", "--data", "b.txt"],
        ["average", "run"],
        ["inspect", "run", "--gpu-memory", "80 parsecs"],
        ["inspect", "run", "--gpu-memory", "80"],
    ],
)
def test_wrong_usage_exits_with_2(
    args: list[str],
    library: Callable[..., list[dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = library(document)
    assert run(cli, args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "rror: " in captured.err
    assert "Traceback" not in captured.err
    assert calls == []


def test_the_demo_checks_its_seed_first(tmp_path: Path) -> None:
    assert run(cli, ["demo", "--output", str(tmp_path / "demo"), "--seed", str(2**63)]) == 2
    assert not (tmp_path / "demo").exists()


def test_options_reach_the_library(library: Callable[..., list[dict[str, Any]]]) -> None:
    calls = library(document)
    text = (
        "train a b --task causal-lm --data d.txt --test-data t.txt -o out --last 3 --every 2 "
        "--from-step 10 --to-step 90 --seed 7 --guard-fraction 0.3 --batch-size 4 "
        "--fit-examples 99 --max-length 64 --model m --trust-remote-code --text-field body "
        "--blocks layers --ridge 0.5 --optimizer sgd --lr 0.3 --momentum 0.8 --weight-decay 0.1 "
        "--epochs 3 --schedule step --start last --span linear --subspace pca:4 "
        "--label-smoothing 0.1 --sharpness 0.2 "
        "--candidates quick --select metric:accuracy --require-improvement --batch-norm newest "
        "--store disk --store-dtype int8 --device cpu --precision bf16 "
        "--activation-checkpointing --dtype float16 --overwrite --fresh --json"
    )
    assert run(cli, text.split()) == 0
    (call,) = calls
    assert call["args"] == (("a", "b"), "causal-lm", Path("out"))
    assert (call["data"], call["test_data"]) == ("d.txt", "t.txt")
    assert call["selection"] == config.Selection(3, 2, 10, 90)
    assert call["data_config"] == config.DataConfig(0.3, 7, 4, 99)
    assert call["fit"] == config.FitConfig(
        blocks="layers",
        optimizer="sgd",
        ridge=0.5,
        start="last",
        span="linear",
        subspace="pca:4",
        lr=0.3,
        momentum=0.8,
        weight_decay=0.1,
        epochs=3,
        schedule="step",
        label_smoothing=0.1,
        sharpness=0.2,
    )
    assert call["guard"] == config.GuardConfig("quick", "metric:accuracy", True, "newest")
    assert call["store"] == config.StoreConfig("disk", "int8")
    assert call["engine"] == config.EngineConfig("cpu", "bf16", True)
    assert call["out"] == config.OutputConfig("float16", True, True)
    assert call["task_options"] == {
        "model": "m",
        "max_length": 64,
        "text_field": "body",
        "trust_remote_code": True,
    }


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ("--lr 0.1", "sgd or adamw"),
        ("--lr 0.3", "sgd or adamw"),
        ("--momentum 0.9", "sgd"),
        ("--optimizer adamw --momentum 0.9", "sgd"),
        ("--weight-decay 0", "sgd or adamw"),
        ("--epochs 10", "sgd or adamw"),
        ("--schedule cosine", "sgd or adamw"),
        ("--sharpness 0.1", "sgd or adamw"),
        ("--optimizer sgd --max-evaluations 40", "lbfgs"),
        ("--optimizer adamw --tolerance 1e-5", "lbfgs"),
    ],
)
def test_what_the_optimizer_would_ignore_is_refused(
    given: str,
    needed: str,
    library: Callable[..., list[dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = library(document)
    assert run(cli, [*TRAIN, *given.split()]) == 2
    said = capsys.readouterr().err
    assert f"with --optimizer {needed}\n" in said
    assert f"add --optimizer {needed.replace(' or ', '|')}" in said
    assert calls == []


def test_the_library_refuses_them_too() -> None:
    with pytest.raises(ConfigError, match="--epochs means nothing to --optimizer lbfgs"):
        config.FitConfig(epochs=3)
    assert config.FitConfig(optimizer="sgd", epochs=3).epochs == 3
    assert config.FitConfig(max_evaluations=3, ridge=1.0).max_evaluations == 3


def test_options_of_the_fit_reach_the_library(
    library: Callable[..., list[dict[str, Any]]],
) -> None:
    calls = library(document)
    assert run(cli, [*TRAIN, *["--max-evaluations", "12", "--tolerance", "1e-4"]]) == 0
    assert calls[0]["fit"] == config.FitConfig(max_evaluations=12, tolerance=1e-4)


def test_defaults_are_those_of_the_dataclasses(
    library: Callable[..., list[dict[str, Any]]],
) -> None:
    calls = library(document)
    assert run(cli, TRAIN) == 0
    for name, kind in {
        "selection": config.Selection,
        "data_config": config.DataConfig,
        "fit": config.FitConfig,
        "guard": config.GuardConfig,
        "store": config.StoreConfig,
        "engine": config.EngineConfig,
        "out": config.OutputConfig,
    }.items():
        assert calls[0][name] == kind()
    assert calls[0]["task_options"] == {}


def test_every_choice_of_the_library_has_an_option() -> None:
    context = cli.make_context("twa-merge", [], resilient_parsing=True)
    train = cli.get_command(context, "train")
    assert train is not None
    names = {parameter.name for parameter in train.params}
    for into, kind in {
        "selection": config.Selection,
        "data_config": config.DataConfig,
        "fit": config.FitConfig,
        "guard": config.GuardConfig,
        "store": config.StoreConfig,
        "engine": config.EngineConfig,
        "out": config.OutputConfig,
    }.items():
        missing = {f"{into}_{f.name}" for f in dataclasses.fields(kind)} - names
        assert not missing


def test_the_plan_reaches_the_library(library: Callable[..., list[dict[str, Any]]]) -> None:
    calls = library(lambda: {"checkpoints": [], "tensors": {}, "parameters": 0})
    assert (
        run(cli, ["inspect", "r", "--plan", "--gpus", "8", "--gpu-memory", "80GB", "--json"]) == 0
    )
    assert run(cli, ["inspect", "r", "--gpu-memory", "1.5GiB", "--json"]) == 0
    assert run(cli, ["inspect", "r", "--json"]) == 0
    assert run(cli, ["inspect", "r", "--store-dtype", "int8", "--json"]) == 0
    rest = {"nodes": 1, "gather": "auto", "store": "auto", "store_dtype": "auto"}
    assert calls[0]["plan"] == {"gpus": 8, "gpu_memory": 80_000_000_000, **rest}
    assert calls[1]["plan"] == {"gpus": 1, "gpu_memory": 3 << 29, **rest}
    assert "plan" not in calls[2]
    assert calls[3]["plan"]["store_dtype"] == "int8"


def test_a_plan_without_gpus_named_is_for_one_a_process(
    library: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = library(lambda: {"checkpoints": [], "tensors": {}, "parameters": 0})
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    assert run(cli, ["inspect", "r", "--plan", "--nproc", "4", "--json"]) == 0
    assert calls[0]["plan"]["gpus"] == 4


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("80", "'80' is only 80 bytes; say 80GB."),
        ("0GB", "'0GB' is only 0 bytes; give a size such as 80GB."),
        ("3kB", "'3kB' is only 3000 bytes; give a size such as 80GB."),
    ],
)
def test_too_small_a_memory_says_what_to_give(
    size: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, ["inspect", "r", "--gpu-memory", size]) == 2
    assert said in capsys.readouterr().err


def test_a_user_error_is_told_without_a_traceback(
    library: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    error = CheckpointError(
        "A tensor has another shape.",
        checkpoint="run/[bold]x[/]\x1b[31m",
        tensor="a.weight",
        expected=[7, 5],
        found=[7, 6],
        remedy="leave it out",
    )
    library(raising(error))
    assert run(cli, ["average", "run", "-o", "out"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "error: A tensor has another shape.",
        r"  checkpoint  run/[bold]x[/]\x1b[31m",
        "  tensor      a.weight",
        "  expected    [7, 5]",
        "  found       [7, 6]",
        "  what to do  leave it out",
    ]


def test_no_improvement_exits_with_3(
    library: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = NoImprovement("Nothing beat the best single checkpoint.")
    library(raising(refusal))
    assert run(cli, TRAIN) == 3
    refusal.document = {"chosen": "last"}
    assert run(cli, TRAIN) == 3
    assert capsys.readouterr().out == ""
    assert run(cli, [*TRAIN, "--json"]) == 3
    assert json.loads(capsys.readouterr().out) == {"chosen": "last"}


@pytest.mark.parametrize("error", [ValueError("a bug\nmore"), EOFError(), SystemExit(7)])
def test_an_internal_error_exits_with_1_and_leaves_a_log(
    error: BaseException,
    library: Callable[..., list[dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    library(raising(error))
    assert run(cli, TRAIN) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"internal error: {type(error).__name__}")
    assert "Traceback" not in err
    (log,) = tmp_path.glob("twa-merge-*.log")
    assert str(log) in err
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize("args", [["--debug", *TRAIN], [*TRAIN, "--debug"]])
def test_debug_shows_the_traceback(
    args: list[str],
    library: Callable[..., list[dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    library(raising(ValueError("a bug")))
    assert run(cli, args) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_out_of_memory_says_what_to_try(
    library: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    library(raising(MemoryError()))
    assert run(cli, [*TRAIN, "--debug"]) == 1
    assert "--batch-size" in capsys.readouterr().err


def test_json_is_the_only_thing_on_stdout(tmp_path: Path) -> None:
    act = (
        "print('a print of the task')\n"
        "os.write(1, b'a native library\\n')\n"
        "return {'value': float('nan'), 'name': '\\x1b[31m\\udcff'}"
    )
    process = python("-m", "twa_merge_cli", *TRAIN, "--json", act=act, folder=tmp_path)
    code, out, err = finish(process)
    assert code == 0
    assert json.loads(out) == {"value": None, "name": "\x1b[31m\udcff"}
    assert "a print of the task" in err
    assert "a native library" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_exits_with_130_and_says_how_to_go_on(
    number: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "out.partial").mkdir()
    act = "sys.stderr.write('begun\\n'); sys.stderr.flush(); time.sleep(60)"
    process = python("-m", "twa_merge_cli", *TRAIN, act=act, folder=tmp_path, cwd=tmp_path)
    assert process.stderr.readline() == "begun\n"
    process.send_signal(number)
    code, out, err = finish(process)
    assert (code, out) == (130, "")
    assert err == "Interrupted. The same command continues from out.partial; --fresh starts over.\n"


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_reader_that_goes_away_is_no_error(more: list[str], tmp_path: Path) -> None:
    act = f"return json.load(open({str(DOCUMENT)!r}))"
    process = python("-m", "twa_merge_cli", *TRAIN, *more, act=act, folder=tmp_path)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 141
    assert err == ""


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_error(closed: str, tmp_path: Path) -> None:
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "a.safetensors")
    command = f"{sys.executable} -m twa_merge_cli average a.safetensors -o out {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], [*TRAIN], [*TRAIN, "--json"]])
def test_a_full_disk_behind_stdout_is_one_message(
    args: list[str], unbuffered: str, tmp_path: Path
) -> None:
    act = f"return json.load(open({str(DOCUMENT)!r}))"
    with pytest.MonkeyPatch.context() as patch, FULL.open("w") as full:
        patch.setenv("PYTHONUNBUFFERED", unbuffered)
        command = [sys.executable, "-m", "twa_merge_cli", *args]
        python("-c", "", act=act, folder=tmp_path).communicate()
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        )
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: The result cannot be printed.\n")
    assert "No space left on device" in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stderr_costs_no_work(tmp_path: Path) -> None:
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "a.safetensors")
    command = [sys.executable, "-m", "twa_merge_cli"]
    for args, code in ((["average", "a.safetensors", "-o", "out"], 0), (["inspect", "no"], 2)):
        with FULL.open("w") as full:
            done = subprocess.run(
                [*command, *args], cwd=tmp_path, stdout=subprocess.PIPE, stderr=full
            )
        assert done.returncode == code
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_report_with_nan_is_refused(tmp_path: Path) -> None:
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "a.safetensors")
    (tmp_path / "r.json").write_text('{"coefficients": {"global": [NaN]}}')
    process = python(
        *("-m", "twa_merge_cli", "average", "a.safetensors", "-o", "out", "--weights", "@r.json"),
        cwd=tmp_path,
    )
    code, out, err = finish(process)
    assert (code, out) == (2, "")
    assert "r.json" in err
    assert "nan" in err
    assert not (tmp_path / "out").exists()


def test_ascii_terminals_get_ascii(tmp_path: Path) -> None:
    act = (
        f"document = json.load(open({str(DOCUMENT)!r}))\n"
        "document['checkpoints'][0]['path'] = 'Größe'\n"
        "return document"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONIOENCODING", "ascii")
        process = python("-m", "twa_merge_cli", *TRAIN, act=act, folder=tmp_path)
    code, out, err = finish(process)
    assert (code, err) == (0, "")
    assert out.isascii()
    assert "\\u" not in out
    assert out.count("\\x") == 2
    assert r"Gr\xf6\xdfe" in out
    assert "#####" in out


@pytest.mark.parametrize(("nproc", "code"), [("1", 0), ("2", 2), ("4", 0)])
def test_nproc_inside_of_torchrun_starts_nothing_more(
    nproc: str,
    code: int,
    library: Callable[..., list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    calls = library(document)
    assert run(cli, [*TRAIN, "--nproc", nproc]) == code
    assert len(calls) == (code == 0)


def test_nproc_passes_the_exit_code_on_and_one_process_speaks(tmp_path: Path) -> None:
    act = (
        "from twa_merge.errors import NoImprovement\n"
        "rank, size = os.environ['RANK'], os.environ['WORLD_SIZE']\n"
        # At once: what two processes write in parts is mixed.
        "os.write(1, f\"{rank} of {size} {kwargs['selection'].last}\\n\".encode())\n"
        "raise NoImprovement('Nothing is better.')"
    )
    args = [*TRAIN, "--last", "5", "--nproc", "2"]
    process = python("-m", "twa_merge_cli", *args, act=act, folder=tmp_path)
    code, out, err = finish(process, 120)
    assert code == 3
    assert err == "error: Nothing is better.\n"
    assert "0 of 2 5" in out


@pytest.mark.parametrize(
    ("error", "code", "times"),
    [("ConfigError", 2, 1), ("NoImprovement", 3, 1), ("RuntimeError", 1, 3)],
)
def test_only_what_may_go_well_another_time_is_tried_again(
    error: str, code: int, times: int, tmp_path: Path
) -> None:
    act = (
        "if os.environ['RANK'] == '0':\n"
        f"    open({str(tmp_path / 'tries')!r}, 'a').write('x')\n"
        "from twa_merge.errors import ConfigError, NoImprovement\n"
        f"raise {error}('Not so.')"
    )
    args = [*TRAIN, "--nproc", "2", "--max-restarts", "2"]
    process = python("-m", "twa_merge_cli", *args, act=act, folder=tmp_path, cwd=tmp_path)
    found, _, err = finish(process, 120)
    assert found == code
    assert len((tmp_path / "tries").read_text()) == times
    assert err.count("Not so.") == times
    assert err.count("failed. Starting again") == times - 1


def test_a_bug_on_all_processes_is_told_once(tmp_path: Path) -> None:
    # Both in the same moment.
    act = "time.sleep(4 - time.time() % 4)\nraise RuntimeError('it broke')"
    process = python("-m", "twa_merge_cli", *TRAIN, "--nproc", "2", act=act, folder=tmp_path)
    code, _, err = finish(process)
    assert code == 1
    assert err.count("internal error: RuntimeError: it broke") == 1


def test_nproc_reports_a_killed_process(tmp_path: Path) -> None:
    act = "os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    begun = time.monotonic()
    args = [*TRAIN, "--nproc", "2"]
    process = python("-m", "twa_merge_cli", *args, act=act, folder=tmp_path, cwd=tmp_path)
    code, out, err = finish(process, 120)
    assert (code, out) == (1, "")
    assert err.startswith("Process 1 of 2 was killed by SIGKILL")
    assert err.count("\n") == 1
    assert time.monotonic() - begun < 60
