"""Interrupted fits continue from their log and end at the same point, to the bit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from twa_merge.distributed import World
from twa_merge.errors import ConfigError, OutputError
from twa_merge.optimize import lbfgs
from twa_merge.progress import silent
from twa_merge.resume import EvaluationLog
from twa_merge.subspace import Chart, make_subspace


class Killed(BaseException):
    pass


def problem():
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randn(5, 50, generator=generator, dtype=torch.float64)
    offsets -= offsets.mean(0)
    chart = Chart(
        torch.full((1, 5), 0.2, dtype=torch.float64), [make_subspace(offsets @ offsets.T)]
    )
    calls = []

    def function(z):
        calls.append(z)
        return float((z - 1).pow(4).sum()), 4 * (z - 1).pow(3)

    return chart, function, calls


def run(folder, chart, function, kill_after=None, fingerprint="a", fresh=False, progress=silent):
    log = EvaluationLog(folder, {"run": fingerprint}, World(), fresh, progress)
    answered = log.answer("twa", chart, function, range(8))
    count = 0

    def watched(z):
        nonlocal count
        count += 1
        if count == kill_after:
            raise Killed
        return answered(z)

    return log, lbfgs(
        watched, torch.zeros(4, dtype=torch.float64), max_evaluations=25, tolerance=1e-12
    )


def test_a_killed_fit_continues_and_ends_at_the_same_point(tmp_path):
    chart, function, calls = problem()
    _, whole = run(tmp_path / "whole", chart, function)
    needed = len(calls)
    calls.clear()
    with pytest.raises(Killed):
        run(tmp_path / "killed", chart, function, kill_after=6)
    assert len(calls) == 5
    log, resumed = run(tmp_path / "killed", chart, function)
    assert log.resumed == 5
    assert len(calls) == needed + 1, "the first one is made again, to see that it is still true"
    assert torch.equal(resumed.z, whole.z)
    log.remove()
    assert not (tmp_path / "killed").exists()


def test_the_last_bits_of_coordinates_are_another_number_of_processes(tmp_path):
    """Steps of SGD are taken in weight space; the axes' lengths are sums over the processes."""
    chart, function, calls = problem()
    z = torch.tensor([0.1, -2.0, 3.0, 0.0], dtype=torch.float64)
    log = EvaluationLog(tmp_path / "s", {}, World())
    for point in (z, z + 1):
        known = log.answer("twa", chart, function, range(8))(point)
    assert len(calls) == 2
    again = EvaluationLog(tmp_path / "s", {}, World())
    for point in (z * (1 + 1e-15), (z + 1) * (1 - 1e-15)):
        found = again.answer("twa", chart, function, range(8))(point)
    assert len(calls) == 3, "the first one is made again"
    assert found[0] == known[0]
    other = EvaluationLog(tmp_path / "s", {}, World())
    other.answer("twa", chart, function, range(8))(z * (1 + 1e-6))
    assert len(calls) == 4


def test_a_run_goes_on_without_its_state(tmp_path):
    """Another one with the same output has ended and removed it."""
    chart, function, _ = problem()
    log = EvaluationLog(tmp_path / "s", {}, World())
    answered = log.answer("twa", chart, function, range(8))
    answered(torch.zeros(4, dtype=torch.float64))
    EvaluationLog(tmp_path / "s", {}, World()).remove()
    assert not (tmp_path / "s").exists()
    answered(torch.ones(4, dtype=torch.float64))
    assert EvaluationLog(tmp_path / "s", {}, World()).resumed == 1


HOLDER = """
import sys, time
from pathlib import Path
from twa_merge.process_lock import ProcessLock
lock = ProcessLock(Path(sys.argv[1]))
print(lock.take(), flush=True)
time.sleep(60)
"""


def test_one_run_at_a_time_keeps_a_state(tmp_path):
    chart, function, _ = problem()
    state = tmp_path / "s"
    early = EvaluationLog(state, {"run": "a"}, World())
    run(state, chart, function)
    known = (state / "state.jsonl").read_bytes()
    command = [sys.executable, "-c", HOLDER, str(state / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "True\n"
            with pytest.raises(OutputError, match="Another run with the same output"):
                run(state, chart, function)
            with pytest.raises(OutputError, match="Another run with the same output"):
                run(state, chart, function, fresh=True)
            # It began before the other one had made the folder.
            answered = early.answer("twa", chart, function, range(8))
            with pytest.raises(OutputError, match="Another run with the same output"):
                answered(torch.zeros(4, dtype=torch.float64))
        finally:
            other.kill()
    assert (state / "state.jsonl").read_bytes() == known
    assert run(state, chart, function)[0].resumed > 0


def test_a_landscape_that_failed_is_left_out_until_a_fresh_start(tmp_path):
    chart, function, _ = problem()
    log, _ = run(tmp_path / "s", chart, function)
    log.fail_landscape()
    again, _ = run(tmp_path / "s", chart, function)
    assert again.landscape_failed
    anew, _ = run(tmp_path / "s", chart, function, fresh=True)
    assert not anew.landscape_failed
    later, _ = run(tmp_path / "s", chart, function)
    assert not later.landscape_failed
    again.fail_landscape()
    again.remove()
    assert not (tmp_path / "s").exists()


def test_a_task_that_has_changed_meanwhile_starts_over_and_says_so(tmp_path):
    chart, function, calls = problem()
    with pytest.raises(Killed):
        run(tmp_path / "s", chart, function, kill_after=6)

    def changed(z):
        loss, gradient = function(z)
        return 1.1 * loss, 1.1 * gradient

    _, whole = run(tmp_path / "whole", chart, changed)
    needed, notes = len(calls) - 5, []
    calls.clear()
    _, resumed = run(tmp_path / "s", chart, changed, progress=notes.append)
    assert torch.equal(resumed.z, whole.z)
    assert len(calls) == needed
    assert len(notes) == 1
    assert "nothing further is taken from the earlier run" in notes[0].text
    calls.clear()
    run(tmp_path / "s", chart, changed)
    assert len(calls) == 1, "the state is that of the changed task"


def test_a_change_that_only_a_larger_sample_shows_is_found(tmp_path):
    chart, function, calls = problem()
    points = [torch.full((4,), x, dtype=torch.float64) for x in (0.1, 0.2)]

    def visit(last, progress=silent):
        log = EvaluationLog(tmp_path / "s", {"run": "a"}, World(), progress=progress)
        small = log.answer("twa", chart, function, range(8))
        large = log.answer("twa", chart, lambda z: (last, z), range(16))
        return [f(z)[0] for f in (small, large) for z in points]

    known, notes = visit(1.0), []
    calls.clear()
    assert visit(2.0, notes.append) == [*known[:2], 2.0, 2.0]
    assert len(calls) == 1
    assert len(notes) == 1


def test_what_else_is_kept_in_the_state_folder_is_not_taken_away(tmp_path):
    chart, function, _ = problem()
    kept = tmp_path / "s" / "thesis.txt"
    kept.parent.mkdir()
    kept.write_text("years of work")
    with pytest.raises(OutputError, match="something else") as caught:
        run(kept.parent, chart, function)
    assert "thesis.txt" in str(caught.value)
    kept.unlink()
    log, _ = run(kept.parent, chart, function)
    kept.write_text("years of work")
    log.remove()
    assert list(kept.parent.iterdir()) == [kept]


@pytest.mark.parametrize(
    "header", [b"[]", b'"run"', b"{}", b"\xff\xfe{", b'{"run": 3}', b'{"run": {"run": "a"}}\n[]']
)
def test_a_damaged_state_is_forgotten(tmp_path, header):
    chart, function, _ = problem()
    _, whole = run(tmp_path / "s", chart, function)
    (tmp_path / "s" / "state.jsonl").write_bytes(header + b"\n")
    log, again = run(tmp_path / "s", chart, function)
    assert log.resumed == 0
    assert torch.equal(again.z, whole.z)


@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_a_loss_that_was_not_finite_may_be_known(tmp_path, lost):
    chart, _, _ = problem()
    calls, notes = [], []

    def function(z):
        calls.append(z)
        return lost, torch.zeros(4, dtype=torch.float64)

    run(tmp_path / "s", chart, function)
    run(tmp_path / "s", chart, function, progress=notes.append)
    assert notes == []


def test_a_line_cut_off_by_a_kill_is_forgotten(tmp_path):
    chart, function, _ = problem()
    _, whole = run(tmp_path / "s", chart, function)
    state = tmp_path / "s" / "state.jsonl"
    state.write_text(state.read_text()[:-40])
    _, again = run(tmp_path / "s", chart, function)
    assert torch.equal(again.z, whole.z)
    for line in state.read_text().splitlines():
        json.loads(line)


def test_the_state_of_another_run_is_refused_unless_fresh(tmp_path):
    chart, function, _ = problem()
    run(tmp_path / "s", chart, function)
    with pytest.raises(ConfigError, match="other inputs or options"):
        run(tmp_path / "s", chart, function, fingerprint="b")
    log, _ = run(tmp_path / "s", chart, function, fingerprint="b", fresh=True)
    assert log.resumed == 0


def test_a_log_of_another_subspace_is_not_believed(tmp_path):
    chart, function, calls = problem()
    run(tmp_path / "s", chart, function)
    calls.clear()
    other = Chart(torch.tensor([[1.0, 0, 0, 0, 0]], dtype=torch.float64), chart.subspaces)
    run(tmp_path / "s", other, function)
    assert calls
