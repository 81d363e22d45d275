"""The GPU suite's own logic, rehearsed on the CPU: rows, bars, budget, the day's file, table."""

import json
import sys
from pathlib import Path

import pytest
import torch

# behind everything else, so that clae_fast stays the installed one
sys.path.append(str(Path(__file__).parents[2]))

pytest.importorskip("triton")

from benchmarks import gpu_suite
from benchmarks.case import CPU, Peer, UnavailableError, relative_error
from benchmarks.cases import CASES, language_models
from benchmarks.gpu import checks, images, losses
from benchmarks.gpu.results import DayResults
from benchmarks.gpu.stage import Suite, Task, bar
from benchmarks.results import Bar


@pytest.fixture(autouse=True)
def _few_cases(monkeypatch):
    """One case of each kind: the others differ in size alone."""
    monkeypatch.setattr(losses, "TEMPERATURES", (0.5,))
    monkeypatch.setattr(checks, "PRECISION_TEMPERATURES", (0.5,))
    monkeypatch.setattr(losses, "FLOOR_SIZES", (16384,))
    monkeypatch.setattr(images, "STEMS", images.STEMS[:1])
    monkeypatch.setattr(images, "LAYOUTS", dict(list(images.LAYOUTS.items())[2:3]))
    kept = {("nt_xent", 512), ("both_ways", 16384), ("unmasked", 16384)}
    monkeypatch.setattr(
        losses,
        "VERSUS",
        {k: v for k, v in losses.VERSUS.items() if k[1:3] in kept and k[3] != 256},
    )
    monkeypatch.setattr(losses, "SMALL", ((128, 512),))


def run(tmp_path, stages, *flags):
    status = gpu_suite.main(["--stage", stages, "--results", str(tmp_path), *flags])
    (path,) = tmp_path.glob("*.json")
    return status, path, json.loads(path.read_text())


def test_rehearsal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checks, "_run_tests", lambda suite, bar: None)
    stages = "build,correctness,nt_xent,small,info_nce,bank,linf_step,stem,augment,memory,profile"
    status, path, found = run(tmp_path, stages)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert path.name.startswith("rehearsal-")
    assert found["rehearsal"]
    assert {row["stage"] for row in found["rows"]} == set(stages.split(","))
    assert not [row for row in found["rows"] if "error" in row]
    # a rehearsal claims nothing
    assert {row["verdict"] for row in found["rows"] if "verdict" in row} == {"rehearsed"}
    assert "not measured" in printed
    assert " met " not in printed
    row = next(row for row in found["rows"] if row.get("candidate") == "released")
    assert row["ratio"] == row["value"] > 0
    assert {"us", "p20_us", "p80_us", "samples", "version", "n", "D", "T", "dtype"} <= set(row)
    assert {"against", "against_us", "bar", "verdict", "commit"} <= set(row)


def test_missing_peers_are_named(tmp_path, capsys, monkeypatch):
    for module in ("cut_cross_entropy", "inf_cl", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, module, None)
    _, _, found = run(tmp_path, "info_nce")
    assert found["missing"] == {
        "cut-cross-entropy": "cut-cross-entropy is not installed",
        "Inf-CL": "inf-cl is not installed",
        "cut-cross-entropy, unmasked": "cut-cross-entropy is not installed",
        "Liger, unmasked": "liger-kernel is not installed",
    }
    assert "Inf-CL: inf-cl is not installed" in capsys.readouterr().out


def test_a_wrong_peer_is_not_timed(tmp_path):
    case = CASES["nt_xent"](16, 8, 0.5)
    case.peers["wrong"] = Peer(lambda device: {"": lambda z0, z1: (z0 * z1).sum()})
    suite = Suite(DayResults(tmp_path / "day.json", {}, True), CPU)
    with pytest.raises(UnavailableError, match="wrong"):
        suite.check(case, "wrong")


_OF_TORCH = [n for n, p in CASES["nt_xent"](16).peers.items() if p.gpu_only or n == "released"]


@pytest.mark.parametrize("name", _OF_TORCH)
def test_peers_in_torch_are_right(name, tmp_path):
    case = CASES["nt_xent"](16, 8, 0.5)
    Suite(DayResults(tmp_path / "day.json", {}, True), CPU).check(case, name)


@pytest.mark.parametrize("work", ["both_ways", "unmasked"])
def test_adapters_of_linear_cross_entropies(work):
    def cross_entropy(rows, columns, labels):
        return torch.nn.functional.cross_entropy(rows @ columns.t(), labels)

    case = CASES[work](32, 8, 0.5)
    two_way = work == "both_ways"
    loss = language_models.loss_of(two_way, cross_entropy, 0.5, torch.float32)
    operands = case.inputs(torch.float32, CPU, 0)
    assert relative_error(case.call(loss, operands), case.exact(operands)) < 1e-5


def test_budget(tmp_path, capsys):
    _, _, found = run(tmp_path, "build", "--budget", "100")
    assert (
        gpu_suite.main(["--stage", "nt_xent", "--budget", "1e-9", "--results", str(tmp_path)]) == 0
    )
    printed = capsys.readouterr().out
    assert "not measured, the budget being spent:\n  nt_xent: share of" in printed
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["rows"] == found["rows"]


def test_the_days_file_goes_on(tmp_path):
    _, _, first = run(tmp_path, "memory")
    _, _, second = run(tmp_path, "build")
    assert second["rows"][: len(first["rows"])] == first["rows"]
    assert len(second["rows"]) == len(first["rows"]) + 2
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("text", ["{broken", "[]", "{}"])
def test_a_corrupt_file_of_the_day_is_left_alone(text, tmp_path, capsys):
    run(tmp_path, "build")
    (path,) = tmp_path.glob("*.json")
    path.write_text(text)
    capsys.readouterr()
    assert gpu_suite.main(["--rehearse", "--stage", "build", "--results", str(tmp_path)]) == 2
    assert "holds no results of the suite" in capsys.readouterr().err
    assert path.read_text() == text


def test_a_failing_case_is_told_and_the_others_run(tmp_path, capsys, monkeypatch):
    def fails():
        raise ValueError("no such luck")

    tasks = [Task("memory", "bad", 1, fails)]
    monkeypatch.setitem(gpu_suite.STAGES, "memory", lambda suite: tasks)
    status, _, found = run(tmp_path, "memory,build")
    assert status == 1
    assert found["rows"][0]["error"] == "ValueError: no such luck"
    assert found["rows"][-1]["what"] == "ceilings"
    assert "failed:\n  memory: bad" in capsys.readouterr().out


def test_bad_arguments_get_one_line(capsys):
    with pytest.raises(SystemExit) as status:
        gpu_suite.main(["--results", "no/such/folder"])
    assert status.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_bars():
    speed, error = Bar("s: a", at_least=2.0), Bar("s: b", at_most=0.1)
    assert speed.met_by(2.0)
    assert not speed.met_by(1.9)
    assert error.met_by(0.1)
    assert not error.met_by(0.2)
    assert not speed.met_by(float("nan"))
    assert not error.met_by(float("nan"))


def test_the_table_takes_the_latest_row(tmp_path):
    bars = [
        bar("s", "speed", at_least=2.0),
        bar("s", "error", at_most=0.1),
        bar("s", "other", at_most=1),
    ]
    results = DayResults(tmp_path / "gpu.json", {"commit": "abc"}, rehearsal=False)
    results.judge(bars[0], 1.0, {})
    results.judge(bars[0], 3.0, {})
    results.judge(bars[1], float("nan"), {})
    lines = [line.split() for line in results.table(bars).splitlines()]
    assert [line[:2] for line in lines] == [["met", "3"], ["missed", "nan"], ["not", "measured"]]
    # strict JSON, and no rehearsal can follow
    json.loads(results.path.read_text(), parse_constant=pytest.fail)
    with pytest.raises(ValueError, match="GPU"):
        DayResults(results.path, {"commit": "abc"}, rehearsal=True)
