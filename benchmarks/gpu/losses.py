"""The stages of the losses: peers, the hand-over between kernels, and memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch

import clae_fast
from benchmarks import harness, memory
from benchmarks.case import OURS, dtype_name
from benchmarks.cases import CASES
from benchmarks.gpu.stage import Suite, Task, bar, judged
from benchmarks.results import Bar

TEMPERATURES = (0.5, 0.1)
EAGER = "mm + cross_entropy, TF32"
# rows at which ours and a peer are checked: ours has other kernels for many rows
OUR_CHECKED_ROWS, CHECKED_ROWS = 8192, 256


# the bars on a peer's time over ours at every temperature, by the peer and by how ours runs, for a
# stage, a case, n (of one side for two-way InfoNCE), D and seconds; what compiles long comes last
VERSUS: dict[tuple[str, str, int, int, int], dict[tuple[str, str], float | None]] = {
    ("nt_xent", "nt_xent", 512, 64, 20): {
        ("released", "eager"): 30,
        ("released", "replayed"): 100,
        ("released, mask on the GPU", "replayed"): None,
    },
    ("nt_xent", "nt_xent", 2048, 128, 20): {
        ("released", "replayed"): 1000,
        ("released, mask on the GPU", "replayed"): None,
    },
    ("nt_xent", "nt_xent", 8192, 128, 20): {("lightly", "replayed"): 12, (EAGER, "replayed"): 12},
    **{
        ("nt_xent", "nt_xent", n, 128, 150): {
            ("torch.compile, TF32", "replayed"): 4,
            ("torch.compile, fp16", "replayed"): 4,
        }
        for n in (8192, 16384)
    },
    **{
        ("info_nce", "both_ways", n, D, 20): {
            ("cut-cross-entropy", "replayed"): 1.5,
            ("Inf-CL", "replayed"): 4,
        }
        for n in (16384, 32768)
        for D in (128, 256)
    },
    ("info_nce", "unmasked", 16384, 128, 20): {
        ("cut-cross-entropy, unmasked", "replayed"): 3,
        ("Liger, unmasked", "replayed"): 10,
    },
}
# what rows call a case
WORK_NAMES = {"both_ways": "two_way"}
FLOOR_SIZES = (16384, 32768)
FLOOR_SHARE = 0.4


def nt_xent(suite: Suite) -> Iterator[Task]:
    """NT-Xent against its peers, and as a share of the 4 n^2 D floor."""
    for T, dtype, n in itertools.product(TEMPERATURES, (torch.float32, torch.float16), FLOOR_SIZES):
        what = f"share of the 4 n^2 D floor, {dtype_name(dtype)}, n={n}, D=128, T={T}"
        yield judged("nt_xent", what, 5, _floor, suite, n, T, dtype, at_least=FLOOR_SHARE)
    yield from _against_peers(suite, "nt_xent")


def info_nce(suite: Suite) -> Iterator[Task]:
    """Two-way InfoNCE against kernels for language models; NT-Xent against them as other work."""
    yield from _against_peers(suite, "info_nce")


def _against_peers(suite: Suite, wanted: str) -> Iterator[Task]:
    """A task for each size and temperature."""
    for (key, bounds), T in itertools.product(VERSUS.items(), TEMPERATURES):
        stage, work, n, D, seconds = key
        if stage == wanted:
            where = f"n={n}, D={D}, T={T}"
            bars = {
                (peer, how): bound
                and bar(stage, f"{peer} over {how} {OURS}, {where}", at_least=bound)
                for (peer, how), bound in bounds.items()
            }
            run = partial(_compare, suite, stage, work, (n, D, T), bars)
            # the second temperature finds everything compiled
            seconds = seconds if TEMPERATURES[0] == T else 20
            name = f"{WORK_NAMES.get(work, work)}, {where}"
            yield Task(stage, name, seconds, run, tuple(filter(None, bars.values())))


def _compare(
    suite: Suite,
    stage: str,
    work: str,
    size: tuple[int, int, float],
    bars: dict[tuple[str, str], Bar | None],
) -> None:
    n, D, T = suite.size(size[0]), suite.size(size[1], 16), size[2]
    case = CASES[work](n, D, T)
    measured, sets = suite.against_peers(
        case,
        CASES[work](min(n, CHECKED_ROWS), D, T),
        dict.fromkeys(peer for peer, _ in bars),
        # against a peer of another work, ours is checked at its own
        CASES["nt_xent" if work == "unmasked" else work](min(n, OUR_CHECKED_ROWS), D, T),
        eager=any(how == "eager" for _, how in bars),
    )
    facts = {"stage": stage, "work": WORK_NAMES.get(work, work), "n": n, "D": D, "T": T}
    for (name, how), timed in measured.items():
        row = {**facts, "dtype": "fp32", **timed.row("us"), "candidate": name, "how": how}
        row |= {"input_sets": sets}
        if name == OURS:
            suite.results.add(row | {"version": clae_fast.__version__})
            continue
        row["version"] = case.peers[name].version
        for ours in (ours for peer, ours in bars if peer == name):
            against = measured[OURS, ours]
            row |= {"against": f"{OURS}, {ours}", "against_us": 1e3 * against.ms}
            row["ratio"] = timed.over(against)
            suite.results.judge(bars[name, ours], row["ratio"], row)


def _floor(suite: Suite, n: int, T: float, dtype: torch.dtype, share: Bar) -> None:
    n, D = suite.size(n), 128
    case = CASES["nt_xent"](n, D, T)
    timed = suite.measure({OURS: suite.candidate(case, case.op, suite.inputs(case, dtype))})[OURS]
    value = case.flops / suite.ceilings()[1] / (1e-3 * timed.ms)
    what = {"stage": "nt_xent", "work": "nt_xent", "candidate": OURS, "how": "replayed"}
    what |= {"n": n, "D": D, "T": T, "dtype": dtype_name(dtype)}
    suite.results.judge(share, value, what | timed.row("us"))


# D and n; the first n is that of the bar
SMALL = tuple(itertools.product((128, 64, 256), (512, 128, 256, 1024, 2048, 4096, 8192)))
SMALL_BAR_US = 12


def small(suite: Suite) -> Iterator[Task]:
    """The sizes about which one launch hands over to three, and the time of one at n = 512."""
    for D, n in SMALL:
        bars = tuple(
            bar("small", f"us of the single launch, n={n}, D={D}, T={T}", at_most=SMALL_BAR_US)
            for T in TEMPERATURES
            if (n, D) == (512, 128)
        )
        yield Task("small", f"n={n}, D={D}", 5, partial(_hand_over, suite, n, D, bars), bars)


def _hand_over(suite: Suite, n: int, D: int, bars: Sequence[Bar]) -> None:
    n = suite.size(n)
    inputs = suite.inputs(CASES["nt_xent"](n, D))
    op = torch.ops.clae_fast.nt_xent.default
    for index, T in enumerate(TEMPERATURES):
        case = CASES["nt_xent"](n, D, T)
        candidates = {}
        for impl in suite.implementations("nt_xent", *inputs[0]):
            loss = partial(case.op, impl=impl)
            candidates[impl, "loss and gradient"] = suite.candidate(case, loss, inputs)
            if impl != "reference":
                alone = [
                    partial(op, *(t.detach() for t in z), T, True, False, impl) for z in inputs
                ]
                candidates[impl, "op alone"] = harness.Candidate(alone, True)
        measured = suite.measure(candidates)
        for (impl, what), timed in measured.items():
            row = {"stage": "small", "n": n, "D": D, "T": T, "impl": impl, "what": what}
            row |= timed.row("us")
            row["over_others"] = {", ".join(key): timed.over(t) for key, t in measured.items()}
            barred = bars and (impl, what) == ("cuda", "op alone")
            suite.results.judge(bars[index] if barred else None, row["us"], row)


EXTRA_BAR = 8.0


def memory_use(suite: Suite) -> Iterator[Task]:
    """Peak memory of the loss and its gradient above its inputs, up to a million rows."""
    for n, seconds in ((8192, 5), (65536, 5), (1 << 20, 30)):
        what = f"extra memory over the inputs' bytes, n={n}, D=128"
        yield judged("memory", what, seconds, _memory, suite, n, at_most=EXTRA_BAR)


def _memory(suite: Suite, n: int, bar: Bar) -> None:
    n, D, T = suite.size(n), 128, 0.5
    case = CASES["nt_xent"](n, D, T)
    z = case.inputs(torch.float32, suite.device, 0)
    for name in (OURS, EAGER) if n <= 8192 else (OURS,):
        (loss,) = harness.forms_of(case, name, suite.device).values()
        call = partial(case.call, loss, z)
        call()
        extra = 2**20 * memory.peak_mib(call, suite.device)
        start = time.perf_counter()
        value = call()[0].item()
        row = {"stage": "memory", "candidate": name, "n": n, "D": D, "T": T, "loss": value}
        row |= {"extra_bytes": extra, "seconds": time.perf_counter() - start}
        # a loss that is not finite fails the bar
        ratio = extra / (4 * n * D) + 0 * value
        suite.results.judge(bar if name == OURS else None, ratio, row)
