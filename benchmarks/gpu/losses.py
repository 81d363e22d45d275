"""Stages of the losses: against peers, the hand-over between kernels, memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

import clae_fast
from benchmarks import memory
from benchmarks.gpu import peers
from benchmarks.gpu.results import Bar
from benchmarks.gpu.stage import ERROR_BAR, OURS, Candidate, Case, Suite, dtype_name
from benchmarks.peers import Loss, UnavailableError, value_and_grad

TEMPERATURES = (0.5, 0.1)


@dataclass(frozen=True)
class Versus:
    """Ours against a peer at a size, for each temperature.

    Attributes:
        ours: "eager" or "replayed".
        at_least: The bar on the peer's time over ours, None where there is none.
    """

    stage: str
    work: str
    n: int
    D: int
    peer: str
    ours: str = "replayed"
    at_least: float | None = None

    def bar(self, T: float) -> Bar:
        """Its bar at a temperature."""
        text = f"{self.peer} over {self.ours} {OURS}, n={self.n}, D={self.D}, T={T}"
        return Bar(self.stage, text, at_least=self.at_least)


VERSUS = (
    Versus("nt_xent", "nt_xent", 512, 64, "released", "eager", 30),
    Versus("nt_xent", "nt_xent", 512, 64, "released", "replayed", 100),
    Versus("nt_xent", "nt_xent", 512, 64, "released, mask on the GPU"),
    Versus("nt_xent", "nt_xent", 2048, 128, "released", "replayed", 1000),
    Versus("nt_xent", "nt_xent", 2048, 128, "released, mask on the GPU"),
    Versus("nt_xent", "nt_xent", 8192, 128, "lightly", "replayed", 12),
    Versus("nt_xent", "nt_xent", 8192, 128, "mm + cross_entropy, TF32", "replayed", 12),
    *(
        Versus("nt_xent", "nt_xent", n, 128, f"torch.compile, {kind}", "replayed", 4)
        for n in (8192, 16384)
        for kind in ("TF32", "fp16")
    ),
    *(
        Versus("info_nce", "two_way", n, D, peer, "replayed", at_least)
        for n in (16384, 32768)
        for D in (128, 256)
        for peer, at_least in (("cut-cross-entropy", 1.5), ("Inf-CL", 4))
    ),
    Versus("info_nce", "unmasked", 16384, 128, "cut-cross-entropy, unmasked", "replayed", 3),
    Versus("info_nce", "unmasked", 16384, 128, "Liger, unmasked", "replayed", 10),
)
FLOOR_SIZES = (16384, 32768)
FLOOR_SHARE = 0.4


def nt_xent(suite: Suite) -> Iterator[Case]:
    """NT-Xent against its peers, and as a share of the 4 n^2 D floor."""
    for T, dtype, n in itertools.product(TEMPERATURES, (torch.float32, torch.float16), FLOOR_SIZES):
        text = f"share of the 4 n^2 D floor, {dtype_name(dtype)}, n={n}, D=128, T={T}"
        bar = Bar("nt_xent", text, at_least=FLOOR_SHARE)
        yield Case("nt_xent", bar.text, 5, partial(_floor, suite, n, T, dtype, bar), (bar,))
    yield from _against_peers(suite, "nt_xent")


def info_nce(suite: Suite) -> Iterator[Case]:
    """Two-way InfoNCE against kernels for language models; NT-Xent against them as other work."""
    yield from _against_peers(suite, "info_nce")


def _against_peers(suite: Suite, stage: str) -> Iterator[Case]:
    """A case for each size and temperature; what compiles for minutes comes last."""

    def group(versus: Versus) -> tuple[bool, str, int, int]:
        slow = peers.PEERS[versus.peer].compiled
        return slow, versus.work, versus.n, versus.D

    for key, found in itertools.groupby(
        sorted((v for v in VERSUS if v.stage == stage), key=group), key=group
    ):
        versus = tuple(found)
        slow, work, n, D = key
        for T in TEMPERATURES:
            yield Case(
                stage,
                f"{work}, n={n}, D={D}, T={T}",
                # the second temperature finds everything compiled
                150 if slow and TEMPERATURES[0] == T else 20,
                partial(_compare, suite, versus, T),
                tuple(v.bar(T) for v in versus if v.at_least is not None),
            )


def _compare(suite: Suite, versus: Sequence[Versus], T: float) -> None:
    stage, work = versus[0].stage, versus[0].work
    # two-way InfoNCE counts the rows of one side
    n, D = suite.size(versus[0].n), suite.size(versus[0].D, 16)
    rows = 2 * n if work == "two_way" else n
    ours = peers.ours(work, T)
    same = "nt_xent" if work == "unmasked" else work
    _check_ours(suite, same, ours, rows, D, T)
    sets = suite.sets(rows * D * 4)
    inputs = [peers.views(rows, D, suite.device, seed=seed) for seed in range(sets)]

    def candidate(loss: Loss, captured: bool) -> Candidate:
        return Candidate([partial(value_and_grad, loss, *z) for z in inputs], captured)

    candidates = {(OURS, "replayed"): candidate(ours, True)}
    if any(v.ours == "eager" for v in versus):
        candidates[OURS, "eager"] = candidate(ours, False)
    for name in dict.fromkeys(v.peer for v in versus):
        peer = peers.PEERS[name]
        try:
            loss = peers.load(name, rows, T, D, suite.device)
        except UnavailableError as failure:
            suite.results.lacks(name, str(failure))
            continue
        how = "replayed" if peer.captured else "eager"
        candidates[name, how] = candidate(loss, peer.captured)
    measured = suite.measure(candidates)
    for (name, how), row in measured.items():
        over = row.pop("over")
        row = {"stage": stage, "work": work, "n": n, "D": D, "T": T, "dtype": "fp32"} | row
        row |= {"candidate": name, "how": how, "input_sets": sets}
        if name == OURS:
            suite.results.add(row | {"version": clae_fast.__version__})
            continue
        row["version"] = peers.PEERS[name].version
        for v in versus:
            if v.peer != name:
                continue
            against = (OURS, v.ours)
            row |= {"against": f"{OURS}, {v.ours}", "against_us": measured[against]["us"]}
            row["ratio"] = over[against]
            if v.at_least is None:
                suite.results.add(row)
            else:
                suite.results.judge(v.bar(T), over[against], row)


def _check_ours(suite: Suite, work: str, loss: Loss, n: int, D: int, T: float) -> None:
    # enough rows for the kernels of many
    z = peers.views(min(n, 8192), D, suite.device)
    error = peers.error_of(work, loss, T, *z)
    if not error <= ERROR_BAR:
        raise ArithmeticError(f"{work} is {error:.1e} off the float64 reference")


def _floor(suite: Suite, n: int, T: float, dtype: torch.dtype, bar: Bar) -> None:
    n, D = suite.size(n), 128
    inputs = [
        peers.views(n, D, suite.device, dtype=dtype, seed=seed)
        for seed in range(suite.sets(n * D * dtype.itemsize))
    ]
    loss = peers.ours("nt_xent", T)
    calls = [partial(value_and_grad, loss, *z) for z in inputs]
    row = suite.measure({OURS: Candidate(calls, True)})[OURS]
    del row["over"]
    share = 4 * n * n * D / suite.ceilings()[1] / (1e-6 * row["us"])
    what = {"stage": "nt_xent", "work": "nt_xent", "candidate": OURS, "how": "replayed"}
    suite.results.judge(
        bar, share, what | {"n": n, "D": D, "T": T, "dtype": dtype_name(dtype)} | row
    )


# D and n; the first n is that of the bar
SMALL = tuple(itertools.product((128, 64, 256), (512, 128, 256, 1024, 2048, 4096, 8192)))
SMALL_BAR_US = 12


def small(suite: Suite) -> Iterator[Case]:
    """Where the single launch hands over to the three, and its time at n = 512."""
    for D, n in SMALL:
        bars = tuple(
            Bar("small", f"us of the single launch, n={n}, D={D}, T={T}", at_most=SMALL_BAR_US)
            for T in TEMPERATURES
            if (n, D) == (512, 128)
        )
        yield Case("small", f"n={n}, D={D}", 5, partial(_hand_over, suite, n, D, bars), bars)


def _hand_over(suite: Suite, n: int, D: int, bars: Sequence[Bar]) -> None:
    n = suite.size(n)
    inputs = [peers.views(n, D, suite.device, seed=seed) for seed in range(suite.sets(n * D * 4))]
    op = torch.ops.clae_fast.nt_xent.default
    for index, T in enumerate(TEMPERATURES):
        candidates = {}
        for impl in suite.implementations("nt_xent", *inputs[0]):
            loss = peers.ours("nt_xent", T, impl=impl)
            autograd = [partial(value_and_grad, loss, *z) for z in inputs]
            candidates[impl, "loss and gradient"] = Candidate(autograd, True)
            if impl != "reference":
                alone = [
                    partial(op, *(t.detach() for t in z), T, True, False, impl) for z in inputs
                ]
                candidates[impl, "op alone"] = Candidate(alone, True)
        for (impl, what), row in suite.measure(candidates).items():
            over = row.pop("over")
            row = {"stage": "small", "n": n, "D": D, "T": T, "impl": impl, "what": what} | row
            row |= {"over_others": {f"{name}, {kind}": r for (name, kind), r in over.items()}}
            if bars and (impl, what) == ("cuda", "op alone"):
                suite.results.judge(bars[index], row["us"], row)
            else:
                suite.results.add(row)


EXTRA_BAR = 8.0


def memory_use(suite: Suite) -> Iterator[Case]:
    """Peak memory of the loss and its gradient above its inputs, up to a million rows."""
    for n, seconds in ((8192, 5), (65536, 5), (1 << 20, 30)):
        text = f"extra memory over the inputs' bytes, n={n}, D=128"
        bar = Bar("memory", text, at_most=EXTRA_BAR)
        yield Case("memory", f"n={n}", seconds, partial(_memory, suite, n, bar), (bar,))


def _memory(suite: Suite, n: int, bar: Bar) -> None:
    n, D, T = suite.size(n), 128, 0.5
    z = peers.views(n, D, suite.device)
    losses = {OURS: peers.ours("nt_xent", T)}
    if n <= 8192:
        losses["mm + cross_entropy, TF32"] = peers.load(
            "mm + cross_entropy, TF32", n, T, D, suite.device
        )
    for name, loss in losses.items():
        call = partial(value_and_grad, loss, *z)
        call()
        extra = 2**20 * memory.peak_mib(call, suite.device)
        start = time.perf_counter()
        value = call()[0].item()
        row = {"stage": "memory", "candidate": name, "n": n, "D": D, "T": T, "loss": value}
        row |= {"extra_bytes": extra, "seconds": time.perf_counter() - start}
        if name == OURS:
            # a loss that is not finite fails the bar
            suite.results.judge(bar, extra / (4 * n * D) + 0 * value, row)
        else:
            suite.results.add(row)
