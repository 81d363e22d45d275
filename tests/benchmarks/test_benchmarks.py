"""The benchmark commands at tiny sizes: they run, tell the truth and refuse nonsense.

No test looks at a time as a duration; the numbers that decide ratios and verdicts are made up here.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import clae_fast

ROOT = Path(__file__).parents[2]
# behind everything else, so that clae_fast stays the installed one
sys.path.append(str(ROOT))

from benchmarks import (  # noqa: E402
    accuracy,
    augment,
    engine,
    harness,
    losses,
    machine,
    memory,
    methods,
    nt_xent,
    overhead,
    results,
    timing,
)
from benchmarks.case import CPU, Peer, UnavailableError, relative_error  # noqa: E402
from benchmarks.cases import CASES  # noqa: E402
from benchmarks.setting import Setting  # noqa: E402
from benchmarks.timing import Timing  # noqa: E402
from clae_fast.methods import METHODS  # noqa: E402

PLAIN_TORCH = "clae_fast,released,torch_eager,torch_chunked,torch_chunked_symmetric"


TINY = "--n 16 --dim 8 --rounds 1 --threads 1"


def run(command, flags):
    return command.main(flags.split())


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setattr(nt_xent, "MM_SIZE", 64)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def same_process(monkeypatch):
    """Measure memory here: starting an interpreter for every row would take minutes."""
    monkeypatch.setattr(memory, "in_fresh_process", lambda function, *args: function(*args))


# timing


def test_ratio_is_the_median_within_rounds():
    ours = Timing(calls=1, seconds={0: 1.0, 1: 2.0, 2: 4.0})
    peer = Timing(calls=1, seconds={0: 3.0, 1: 6.0, 2: 8.0})
    assert peer.over(ours) == 3.0
    assert peer.ms == 6000.0


def test_disturbed_samples_are_set_aside_while_enough_remain():
    seconds = dict.fromkeys(range(4), 1.0) | {4: 9.0, 5: 9.0, 6: 9.0, 7: 9.0, 8: 9.0}
    timed = Timing(calls=1, seconds=seconds, disturbed={4, 5, 6, 7, 8})
    assert (timed.ms, timed.quiet) == (1000.0, 4)
    timed.disturbed |= {0, 1}
    assert (timed.ms, timed.quiet) == (9000.0, 2)
    assert timed.over(Timing(calls=1, seconds=dict.fromkeys(range(9), 1.0))) == 9.0


def test_percentiles_of_one_and_of_five_samples():
    assert Timing(calls=1, seconds={0: 2.0}).p20_p80_ms == (2000.0, 2000.0)
    low, high = Timing(calls=1, seconds=dict(enumerate([5.0, 1.0, 3.0, 2.0, 4.0]))).p20_p80_ms
    assert (low, high) == pytest.approx((1800.0, 4200.0))


def test_interleave_rotates_and_spreads_long_calls(monkeypatch):
    cost = {"short": 0.1, "long": 30.0, "middle": 1.0}
    order = []

    def sample(call, calls, device):
        order.append(call)
        return cost[call], True

    monkeypatch.setattr(timing, "_sample", sample)
    timings = timing.interleave({name: name for name in cost}, rounds=6, max_seconds=6.0)
    first_round, second_round = order[3:6], order[6:8]
    assert first_round == ["short", "long", "middle"]
    assert second_round == ["middle", "short"]
    assert sorted(timings["short"].seconds) == [0, 1, 2, 3, 4, 5]
    assert sorted(timings["middle"].seconds) == [0, 1, 2, 3, 4, 5]
    assert sorted(timings["long"].seconds) == [0, 2, 4]


def test_short_calls_are_repeated():
    calls = []
    timed = timing.interleave({"": partial(calls.append, 0)}, rounds=2, min_seconds=1e-4)[""]
    assert timed.calls > 1
    assert len(calls) == 1 + 2 * timed.calls
    assert all(0 < seconds < 1e-3 for seconds in timed.seconds.values())


def test_fastest_picks_by_time(monkeypatch):
    monkeypatch.setattr(timing, "_sample", lambda call, calls, device: (call, True))
    assert timing.fastest({"slow": 3.0, "fast": 1.0, "middle": 2.0}) == "fast"


def test_run_queue_delay_only_grows():
    before = timing.run_queue_delay()
    assert 0 <= before <= timing.run_queue_delay()


def test_machine_names_what_a_result_depends_on(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000000000")
    facts = machine.facts()
    wanted = {"cpu", "cores", "threads", "torch", "ops", "allocator", "commit", "date"}
    assert wanted <= facts.keys()
    assert "MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000" in facts["allocator"]
    assert facts["threads"] == torch.get_num_threads()
    assert f"torch: {torch.__version__}" in machine.header(facts)


@pytest.mark.parametrize(
    ("settings", "warm"),
    [
        ({}, False),
        ({"MALLOC_MMAP_MAX_": "0"}, False),
        ({"MALLOC_TRIM_THRESHOLD_": "1e11"}, False),
        ({"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "65536"}, False),
        (machine.WARM_HEAP, True),
    ],
)
def test_warm_heap_needs_both_settings(monkeypatch, settings, warm):
    for name in machine.WARM_HEAP:
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert machine.warm_heap() is warm


# memory


def test_peak_counts_what_is_freed_again():
    mib = 2**18  # numbers of four bytes

    def call():
        torch.ones(96 * mib)
        return torch.ones(32 * mib)

    assert memory.peak_mib(call) == pytest.approx(96, abs=2)
    assert memory.peak_mib(lambda: None) < 2


def test_fresh_process_returns_the_result_or_none_when_killed():
    assert memory.in_fresh_process(abs, -3) == 3
    assert memory.in_fresh_process(os._exit, 9) is None


# peers


def prepared(n, dim, temperature, name, dtype=torch.float32):
    case = CASES["nt_xent"](n, dim, temperature)
    operands = case.inputs(dtype, CPU, 0)
    return harness.prepare(case, name, operands, case.exact(operands))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [64, 130])  # 130 leaves a last block that is not full
@pytest.mark.parametrize("name", [name for name in nt_xent.PEERS if name != "torch_compile"])
def test_every_form_of_a_peer_matches_float64(name, n, dtype):
    case = CASES["nt_xent"](n, 24, 0.2)
    operands = case.inputs(dtype, CPU, 0)
    truth = case.exact(operands)
    try:
        forms = harness.forms_of(case, name)
    except UnavailableError as error:
        pytest.skip(str(error))
    for form, loss in forms.items():
        error = relative_error(case.call(loss, operands), truth)
        assert error < (2e-6 if dtype == torch.float32 else 1e-14), form


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_compiled_peer_matches_float64():
    try:
        found = prepared(32, 16, 0.5, "torch_compile")
    except UnavailableError as error:
        pytest.skip(str(error))
    assert found.error < 2e-6


def test_wrong_peer_is_refused():
    case = CASES["nt_xent"](16, 8, 0.5)
    operands = case.inputs(torch.float32, CPU, 0)
    truth = case.exact(operands)
    right = harness.forms_of(case, "torch_eager")["straight"]
    case.peers["right"] = Peer(lambda device: {"right": right})
    assert harness.prepare(case, "right", operands, truth).form == "right"
    # the value of one, the gradient of the other
    wrong = {
        "right": right,
        "value": lambda a, b: right(a, b) + 0.01,
        "gradient": lambda a, b: right(a, b) + 0.01 * (a - a.detach()).sum(),
        "nan": lambda a, b: right(a, b) * torch.nan,
    }
    for form in ("value", "gradient", "nan"):
        forms = {"right": right, form: wrong[form]}
        case.peers[form] = Peer(lambda device, forms=forms: forms)
        with pytest.raises(UnavailableError, match=rf"wrong, .*\({form}\)"):
            harness.prepare(case, form, operands, truth)


@pytest.mark.parametrize(
    ("name", "package"),
    [("lightly", "lightly.loss"), ("pytorch_metric_learning", "pytorch_metric_learning")],
)
def test_missing_package_is_named(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnavailableError, match="not installed"):
        harness.forms_of(CASES["nt_xent"](16), name)


def test_peer_beyond_memory_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**20)
    with pytest.raises(UnavailableError, match="GiB of memory"):
        prepared(256, 64, 0.5, "released")


# nt_xent


def test_nt_xent_command(tmp_path, capsys, monkeypatch, same_process, one_thread):
    monkeypatch.setattr(nt_xent, "MEMORY_N", 128)
    out = tmp_path / "result.json"
    flags = f"--n 16,64 --dim 16 --rounds 3 --threads 1 --memory --impls {PLAIN_TORCH}"
    assert run(nt_xent, f"{flags} --json {out}") == 0
    printed = capsys.readouterr().out
    assert "allocator: " in printed
    assert "not measured" in printed
    result = json.loads(out.read_text())
    assert result["machine"]["threads"] == 1
    rows = {(row["n"], row["impl"]): row for row in result["rows"]}
    assert rows.keys() == {(n, impl) for n in (16, 64) for impl in PLAIN_TORCH.split(",")}
    for row in rows.values():
        assert row["D"] == 16
        assert row["ms"] > 0
        assert row["p20_ms"] <= row["ms"] <= row["p80_ms"]
        assert row["peak_mib"] >= 0
        assert row["error"] < 1e-5
        assert 0 <= row["quiet"] <= row["samples"] == 3
    assert rows[16, "clae_fast"]["over_clae_fast"] == 1
    assert list(tmp_path.iterdir()) == [out]


def test_nt_xent_names_the_peers_it_leaves_out(capsys, monkeypatch, one_thread):
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    assert run(nt_xent, f"{TINY} --impls lightly") == 0
    printed = capsys.readouterr().out
    assert "left out: lightly: lightly is not installed" in printed


def test_nt_xent_stops_when_ours_is_wrong(capsys, monkeypatch, one_thread):
    monkeypatch.setattr("clae_fast.nt_xent", lambda a, b, temperature: (a - b).sum())
    assert run(nt_xent, f"{TINY} --impls clae_fast") == 1
    assert "clae_fast at n = 16: wrong" in capsys.readouterr().err


def test_bars_are_met_missed_or_not_measured(monkeypatch):
    args = nt_xent._parse(["--memory"])

    def verdicts(speedup, share, lean):
        monkeypatch.setattr(harness, "peak", lambda *_: lean)
        rows = [
            {"n": n, "impl": impl, "over_clae_fast": speedup, "share_of_mm": share}
            for n in (128, 8192)
            for impl in (*nt_xent.IMPLS, nt_xent.OURS_IN_FP32)
        ]
        return nt_xent._judge(rows, args)

    met = verdicts(7.0, 0.8, 40.0)
    assert met["n = 8192, fp32, default heap: >= 6.00 x lightly"] == "met (7.00x)"
    assert met["n = 128, fp32, default heap: >= 0.95 x every peer"] == "met (7.00x)"
    assert met["n = 8192: >= 75% of torch.mm's rate"] == "met (0.80)"
    assert met["n = 16384: peak <= 64 MiB above the inputs"] == "met (40.00 MiB)"
    assert met["n = 512, fp32, default heap: >= 2.50 x lightly"] == "not measured"
    assert met["n = 8192, fp32, warm heap: >= 2.20 x lightly"] == "not measured"
    assert met["n = 2048: >= 75% of torch.mm's rate"] == "not measured"
    missed = verdicts(0.5, 0.5, 70.0)
    assert {text.split()[0] for text in missed.values()} == {"missed", "not"}

    args.dtype = "bf16"
    monkeypatch.setattr(nt_xent._native, "isa", lambda: "avx2")
    half = {bar: text for bar, text in verdicts(7.0, 0.8, 40.0).items() if text != "not measured"}
    assert half == {"n = 8192, bf16, default heap: >= 1.00 x every peer": "met (7.00x)"}
    monkeypatch.setattr(nt_xent._native, "isa", lambda: "avx512_bf16")
    own = "n = 8192, bf16, avx512_bf16, default heap: >= 1.50 x clae_fast_fp32"
    assert verdicts(1.2, 0.8, 40.0)[own] == "missed (1.20x)"

    args.dim = 64
    assert set(verdicts(7.0, 0.8, 40.0).values()) == {"not measured"}


def test_half_precision_stands_beside_ours_in_fp32(capsys, one_thread):
    assert run(nt_xent, f"{TINY} --dtype bf16 --impls torch_eager") == 0
    assert nt_xent.OURS_IN_FP32 in capsys.readouterr().out


# augment


def test_augment_command(tmp_path, capsys, one_thread):
    out = tmp_path / "result.json"
    tiny = "--scale 128 --rounds 1 --threads 1 --workers 1"
    assert run(augment, f"{tiny} --json {out}") == 0
    printed = capsys.readouterr().out
    assert "x torchvision's workers" in printed
    result = json.loads(out.read_text())
    rows = {(row["case"], row["impl"]): row for row in result["rows"]}
    assert set(rows) == {
        (case, impl) for case in augment.IMAGES for impl in ("clae_fast", "torchvision")
    }
    assert all(row["views_per_s"] > 0 for row in rows.values())
    assert {row["error"] is None for row in rows.values()} == {True, False}
    assert len(result["bars"]) == 2


def test_augment_stops_when_ours_is_wrong(capsys, monkeypatch, one_thread):
    def wrong(images, params, *, impl, **options):
        p, q = right(images, params, impl=impl, **options)
        return p + (impl == "auto") / 100, q

    right = clae_fast.augment
    monkeypatch.setattr(clae_fast, "augment", wrong)
    assert run(augment, "--case 32 --scale 256 --threads 1") == 1
    assert "clae_fast at 32: wrong" in capsys.readouterr().err


def test_bars_of_augment():
    def judge(ratio):
        row = {"case": "224", "impl": augment.PEER, "over_clae_fast": ratio}
        return list(augment._judge([row], None).values())

    assert judge(2.5) == ["not measured", "met (2.5x)"]
    assert judge(1.9) == ["not measured", "missed (1.9x)"]


# losses


def test_losses_command(tmp_path, capsys, same_process, one_thread, monkeypatch):
    # the compiler takes longer than all the rest
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    out = tmp_path / "result.json"
    assert run(losses, f"--scale 256 --rounds 1 --threads 1 --memory --json {out}") == 0
    assert "queue: >= 1.4 x torch" in capsys.readouterr().out
    result = json.loads(out.read_text())
    rows = {(row["case"], row["impl"]): row for row in result["rows"]}
    everyone = {losses.OURS, *losses.PEERS, "torch_blocks"}
    uncompiled = {"tied", "nearest", "hardest"}
    assert rows.keys() == {
        (case, impl)
        for case in losses.SIZES
        for impl in everyone - ({"torch_compile"} if case in uncompiled else set())
    }
    for row in rows.values():
        assert row["ms"] > 0
        assert row["peak_mib"] >= 0
        assert row["error"] < 1e-4
    assert set(result["bars"]) == {"queue: >= 1.4 x torch", "queue: memory of torch >= 10 x ours"}


def test_losses_stops_when_ours_is_wrong(capsys, monkeypatch, one_thread):
    wrong = lambda z, temperature, impl="auto": z  # noqa: E731
    monkeypatch.setattr(clae_fast, "tied_nt_xent", wrong)
    assert run(losses, "--case tied --scale 256 --rounds 1 --threads 1") == 1
    assert "clae_fast at tied: wrong" in capsys.readouterr().err


def test_bars_of_losses():
    def judge(speed, ours, torch_peak):
        rows = [
            {"case": "queue", "impl": impl, "over_clae_fast": over, "peak_mib": peak}
            for impl, over, peak in (
                (losses.OURS, 1.0, ours),
                ("torch_eager", speed + 1, torch_peak + 1),
                ("torch_compile", speed, torch_peak),
            )
        ]
        return [verdict.startswith("missed") for verdict in losses._judge(rows, None).values()]

    assert judge(1.5, 1.0, 11.0) == [False, False]
    assert judge(1.3, 1.0, 9.0) == [True, True]
    assert list(losses._judge([], None).values()) == ["not measured"] * 2


def test_bars_flag_decides_the_exit_status(monkeypatch, one_thread):
    flags = f"{TINY} --impls clae_fast"
    monkeypatch.setattr(nt_xent, "_judge", lambda *_: {"a bar": "missed (0.50x)"})
    assert run(nt_xent, flags) == 0
    assert run(nt_xent, f"{flags} --bars") == 1
    monkeypatch.setattr(nt_xent, "_judge", lambda *_: {"a bar": "not measured"})
    assert run(nt_xent, f"{flags} --bars") == 0


def test_warm_heap_starts_again_with_malloc_told(tmp_path):
    out = tmp_path / "warm.json"
    flags = f"{TINY} --impls clae_fast --warm-heap --json {out}"
    command = [sys.executable, "-m", "benchmarks.nt_xent", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert "MALLOC_MMAP_MAX_=0" in result["machine"]["allocator"]
    assert result["command"] == f"python -m benchmarks.nt_xent {flags}"


# overhead


def test_overhead_command(tmp_path, capsys, same_process, one_thread):
    out = tmp_path / "result.json"
    flags = "--arch resnet-narrow --batch-size 8 --image-size 8 --rounds 1"
    assert run(overhead, f"{flags} --json {out}") == 0
    assert "plain <= 1.03 x a step by hand" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert [row["schedule"] for row in result["rows"]] == list(overhead.SCHEDULES)
    units = {row["schedule"]: row["units_ratio"] for row in result["rows"]}
    # the input gradient that an attack adds to conv1 weighs more in a narrow network
    expected = {"plain": 1, "pair": 1.5, "self": 11 / 6, "released": 2.5, "released_as_is": 2.5}
    # a fifth of 8 rows is 2
    expected |= {"pair_added": 6.75 / 6, "pair_replaced": 6.5 / 6, "pair_micro": 2}
    assert units == pytest.approx(expected | {"plain_batched": 1}, rel=0.03)
    assert result["time_over"] in ("plain", "plain_batched")
    for row in result["rows"]:
        assert row["time_ratio"] > 0
        assert row["memory_ratio"] is None or row["memory_ratio"] >= 0
        assert {"ms", "p20_ms", "p80_ms", "peak_mib", "samples", "quiet"} <= row.keys()
    assert result["by_hand"]["plain_time_ratio"] > 0
    assert result["layout"] in ("contiguous_format", "channels_last")


def test_overhead_of_methods(tmp_path, same_process, one_thread):
    out = tmp_path / "result.json"
    flags = "--methods all --arch resnet-narrow --batch-size 8 --image-size 8 --rounds 1"
    assert run(overhead, f"{flags} --json {out}") == 0
    rows = {row["schedule"]: row["units_ratio"] * 6 for row in json.loads(out.read_text())["rows"]}
    for name, method in METHODS.items():
        for kind in ("none", "pair"):
            assert rows[f"{name}: {kind}"] == pytest.approx(method.units[kind], rel=0.05)


def test_steps_of_one_meaning_train_alike(one_thread):
    """Ours and the hand-written plain step, and both released losses, move the weights alike."""

    def weights(schedule):
        trained = {}

        def adam(parameters, lr):
            trained["weights"] = parameters
            return torch.optim.SGD(parameters, lr=0.1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim, "Adam", adam)
            setting = Setting("resnet-narrow", 4, 8, CPU)
            overhead.build(schedule, setting, torch.contiguous_format)()
        return torch.cat([weight.detach().flatten() for weight in trained["weights"]])

    torch.testing.assert_close(weights("plain"), weights(overhead.BY_HAND))
    torch.testing.assert_close(weights("plain"), weights("plain_batched"))
    torch.testing.assert_close(weights("released"), weights("released_as_is"))
    torch.testing.assert_close(weights("released"), weights("self"))
    assert not torch.equal(weights("pair"), weights("self"))


# engine


def test_engine_command(tmp_path, capsys):
    out = tmp_path / "result.json"
    flags = "--arch resnet-narrow --batch-size 4 --image-size 8 --rounds 3 --peers released"
    assert run(engine, f"{flags} --json {out}") == 0
    assert "pair from images" in capsys.readouterr().out
    result = json.loads(out.read_text())
    rows = {row["step"]: row for row in result["rows"]}
    assert list(rows) == ["plain", "plain batched", "pair", "self", "pair from images", "released"]
    plain = rows[rows["pair"]["plain"]]
    assert plain["ms"] == min(rows[name]["ms"] for name in ("plain", "plain batched"))
    assert plain["over_plain"] == 1
    assert all(row["images_per_second"] * row["ms"] == pytest.approx(4000) for row in rows.values())
    assert rows["pair"]["peak_mib"] > 0


# accuracy


def test_accuracy_command(tmp_path, capsys):
    out, runs = tmp_path / "result.json", tmp_path / "runs"
    flags = "--seeds 1 --limit 128 --epochs 2 --batch-size 64 --warmup-epochs 0 --equal-time"
    flags += " --approximations"
    assert run(accuracy, f"{flags} --runs {runs} --json {out}") == 0
    assert "| untrained | 1 |" in capsys.readouterr().out
    longer = "none-for-pair's-time-0"
    result = json.loads(out.read_text())
    rows = {row["encoder"]: row for row in result["rows"]}
    fraction = "pair --adv-fraction 0.2"
    less = [fraction, f"{fraction} --adv-replace", "pair --adv-every 5"]
    trained = ["none", "pair", "self", *less, "none for pair's time"]
    assert list(rows) == ["raw pixels", "untrained", *trained]
    folders = {f"{name.replace(' ', '-')}-0" for name in trained}
    assert {path.name for path in runs.iterdir()} == folders
    assert [name for name, row in rows.items() if row.get("seconds", 0) > 0] == trained
    epochs = json.loads((runs / longer / "config.json").read_text())["epochs"]
    assert epochs == round(2 * rows["pair"]["seconds"] / rows["none"]["seconds"])
    assert all(0 <= row["knn"] <= 100 and 0 <= row["linear"] <= 100 for row in rows.values())
    expected = rows["pair"]["linear"] - rows["none"]["linear"]
    assert rows["pair"]["linear_over_none"] == pytest.approx(expected)
    assert result["config"]["limit"] == 128
    assert "attack" not in result["config"]


def test_accuracy_is_drawn_over_time(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"knn": 90.0, "knn_ci95": 1.0, "linear": 92.0, "linear_ci95": None}
    rows = [{"encoder": "untrained", **row}]
    rows += [{"encoder": "pair", "seconds": 9.0, "seconds_ci95": None, **row}]
    accuracy._plot(rows, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


@pytest.mark.parametrize(
    "flags", ["--epochs -3", "--arch resnet19", "--dataset parquet --data-dir nowhere", "--fast"]
)
def test_accuracy_passes_on_what_train_refuses(flags, capsys):
    assert run(accuracy, flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


# methods


def test_methods_command(tmp_path, capsys, one_thread):
    out = tmp_path / "result.json"
    flags = "--methods moco,deacl --seeds 2 --epochs 1 --image-size 8"
    assert run(methods, f"{flags} --json {out}") == 0
    result = json.loads(out.read_text())
    rows = {(row["method"], row["attack"]): row for row in result["rows"]}
    units = {kind: row["units"] for kind, row in rows.items()}
    assert units == {
        ("untrained", "none"): None,
        ("moco", "none"): 4,
        ("moco", "pair"): 7,
        ("deacl", "none"): 4,
        ("deacl", "pair"): 9,
    }
    for row in rows.values():
        assert row["knn"] == pytest.approx(sum(row["knn_by_seed"]) / 2)
        assert 0 < row["knn"] <= 100
    # seeds and attacks are different runs
    assert len({knn for row in rows.values() for knn in row["knn_by_seed"]}) > 3
    assert f"| moco | 4, 7 | {rows['moco', 'none']['knn']:.1f}, " in capsys.readouterr().out


# all commands


@pytest.mark.parametrize(
    ("command", "flags", "said"),
    [
        (nt_xent, "--n 7", "7 is odd"),
        (nt_xent, "--n 0", "'0' is not a whole number >= 1"),
        (nt_xent, "--n many", "'many' is not"),
        (nt_xent, "--temperature 0", "'0' is not a number > 0"),
        (nt_xent, "--temperature nan", "'nan' is not a number > 0"),
        (nt_xent, "--impls clae_fast,magic", "unknown 'magic'"),
        (nt_xent, "--dtype fp8", "invalid choice: 'fp8'"),
        (augment, "--case 64", "unknown '64', choose from 32, 224"),
        (losses, "--case triplet", "unknown 'triplet', choose from queue"),
        (nt_xent, "--threads -1", "argument --threads"),
        (nt_xent, "--json nowhere/result.json", "not a file in an existing folder"),
        (nt_xent, "--fast", "--fast"),
        (overhead, "--batch-size 0", "argument --batch-size"),
        (overhead, "--arch resnet19", "resnet19"),
        (overhead, "--methods simclr,clae", "unknown 'clae', choose from all, simclr"),
        (overhead, "--device abacus", "abacus"),
        (overhead, "--json .", "argument --json"),
        (accuracy, "--seeds 0", "argument --seeds"),
        (methods, "--methods simclr,clae", "unknown 'clae', choose from simclr"),
        (methods, "--epochs 0", "argument --epochs"),
        (accuracy, "--attack pair", "argument --attack"),
        (accuracy, "--seed=3", "argument --seed=3"),
        (accuracy, "--plot accuracy.doc", "argument --plot"),
        (engine, "--peers magic", "unknown 'magic', choose from released"),
        (engine, "--arch resnet19", "arch must be"),
        (accuracy, "--runs .", "'.' exists"),
    ],
)
def test_bad_arguments_get_one_line(command, flags, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(command, flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


def test_json_is_whole_or_absent(tmp_path):
    path = tmp_path / "result.json"
    with pytest.raises(ValueError, match="JSON"):
        results.write_json(path, {"ms": float("nan")})
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match=r"error: .* cannot be written: No such file"):
        results.write_json(tmp_path / "gone" / "result.json", {"ms": 1.0})
    results.write_json(path, {"ms": 1.0})
    assert json.loads(path.read_text())["ms"] == 1.0


def test_a_result_names_no_folder_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--json", str(path)])
    results.write_json(path, {})
    assert json.loads(path.read_text())["command"].endswith(" --json result.json")
