"""What each stage of the GPU suite measures, as cases that know their cost and their bars."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import clae_fast
from benchmarks import gpu_peers, memory, overhead, timing
from benchmarks.gpu_results import Bar, Results, Row, timed
from benchmarks.peers import UnavailableError, value_and_grad
from clae_fast import _impl, _native

ROOT = Path(__file__).parents[1]
TEMPERATURES = (0.5, 0.1)
EPS = 8 / 255
OURS = "clae_fast"


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Attributes:
        stage: The stage that it belongs to.
        name: What is measured, as printed.
        seconds: What it takes on a GPU, about, kernels compiled on the way included.
        run: Measures and adds rows.
        bars: The bars that `run` judges.
    """

    stage: str
    name: str
    seconds: float
    run: Callable[[], None]
    bars: tuple[Bar, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """Something to time: calls on inputs that rotate, in a CUDA graph or from Python."""

    calls: Sequence[Callable[[], object]]
    captured: bool


@dataclass
class Suite:
    """Where rows go, what they are measured on, and how much time there is."""

    results: Results
    device: torch.device
    deadline: float = float("inf")

    @property
    def rehearsal(self) -> bool:
        """Whether sizes are tiny, because there is no GPU."""
        return self.device.type != "cuda"

    def size(self, n: int, at_most: int = 32) -> int:
        """`n`, or what a rehearsal takes for it."""
        return min(n, at_most) if self.rehearsal else n

    def implementations(self, op: str) -> list[str]:
        """What can run an op here; a rehearsal leaves out Triton, whose interpreter is slow."""
        if self.rehearsal:
            return ["reference"] + ["native"] * _native.has_cpu()
        return _impl.available(op, self.device.type)

    def remaining(self) -> float:
        """Seconds until the budget is spent."""
        return self.deadline - time.monotonic()

    def sets(self, input_bytes: int) -> int:
        """How many sets of inputs rotate: twice the L2 cache where eight are enough for that."""
        if self.rehearsal:
            return 2
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(2, min(8, -(-2 * cache // input_bytes)))

    def measure(self, candidates: Mapping[Any, Candidate], rounds: int = 15) -> dict[Any, Row]:
        """Time candidates interleaved; a row each, with the ratios over the others.

        What fails is left out, but for what is named as ours.
        """
        calls = {}
        for key, candidate in candidates.items():
            try:
                capture = candidate.captured and not self.rehearsal
                calls[key] = (timing.replayed if capture else timing.in_turn)(candidate.calls)
                for _ in range(2):
                    calls[key]()
            except Exception as failure:  # whatever a peer raises, the others go on
                if OURS in key:
                    raise
                calls.pop(key, None)
                name = key if isinstance(key, str) else ", ".join(map(str, key))
                self.results.lacks(name, first_line(failure))
        each = {key: len(candidates[key].calls) for key in calls}
        timings = timing.interleave(
            calls,
            rounds=2 if self.rehearsal else rounds,
            device=self.device,
            min_seconds=0.0 if self.rehearsal else 0.02,
            max_seconds=3.0,
        )
        return {
            key: timed(timings[key], each[key])
            | {"over": {other: timings[key].over(timings[other]) for other in calls}}
            for key in calls
        }

    def ceilings(self) -> tuple[float, float]:
        """Bytes a second of a copy, reads and writes, and fp16 FLOPs a second of this card."""
        row = self.results.latest(what="ceilings")
        if row is None:
            row = self._measure_ceilings()
            self.results.add(row)
        return row["copy_bytes_per_s"], row["fp16_flops_per_s"]

    def _measure_ceilings(self) -> Row:
        numbers, m = self.size(1 << 30, 1 << 16), self.size(8192, 64)
        source = torch.randn(numbers, device=self.device)
        target = torch.empty_like(source)
        dtype = torch.float32 if self.rehearsal else torch.float16
        a, b = torch.randn(2, m, m, device=self.device, dtype=dtype)
        product = torch.empty_like(a)
        rows = self.measure(
            {
                "copy": Candidate([partial(target.copy_, source)], False),
                "matmul": Candidate([partial(torch.mm, a, b, out=product)], False),
            }
        )
        return {
            "stage": "build",
            "what": "ceilings",
            "copy_bytes_per_s": 8 * numbers / (1e-6 * rows["copy"]["us"]),
            "fp16_flops_per_s": 2 * m**3 / (1e-6 * rows["matmul"]["us"]),
        }


def first_line(failure: BaseException) -> str:
    """The first line of an exception's message."""
    return (str(failure) or type(failure).__name__).strip().splitlines()[0]


# build


def build(suite: Suite) -> Iterator[Case]:
    """The machine's facts, and the two rates that shares are taken of."""

    def run() -> None:
        facts: Row = {"stage": "build", "what": "machine", "has_cuda": _native.has_cuda()}
        facts |= {"triton": version("triton"), "isas": _native.isas()}
        if not suite.rehearsal:
            properties = torch.cuda.get_device_properties(suite.device)
            facts["capability"] = f"{properties.major}.{properties.minor}"
            facts["multiprocessors"] = properties.multi_processor_count
            facts["l2_bytes"] = properties.L2_cache_size
            facts["memory_bytes"] = properties.total_memory
        for op in ("nt_xent", "info_nce", "linf_step", "stem_step"):
            facts[op] = _impl.available(op, suite.device.type)
        suite.results.add(facts)
        if not _native.has_cuda():
            suite.results.lacks("CUDA C++ kernels", "built without nvcc")
        suite.results.add(suite._measure_ceilings())

    yield Case("build", "machine and ceilings", 20, run)


# correctness

ERROR_BAR = 5e-4
PRECISION_TEMPERATURES = (0.5, 0.1, 0.07, 0.05)


def correctness(suite: Suite) -> Iterator[Case]:
    """The tests of what runs on a GPU, and the gradient's precision."""
    tests = Bar("correctness", "tests failed", at_most=0)
    yield Case("correctness", "tests", 150, partial(_run_tests, suite, tests), (tests,))
    for T in PRECISION_TEMPERATURES:
        bar = Bar("correctness", f"error of nt_xent's gradient, T={T}", at_most=ERROR_BAR)
        yield Case("correctness", bar.text, 15, partial(_precision, suite, T, bar), (bar,))


def _run_tests(suite: Suite, bar: Bar) -> None:
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py"))
    on_gpu = [f for f in files if re.search("test_(kernels_|cuda_(?!emulator)|gpu)", f)]
    if suite.rehearsal:
        on_gpu = ["tests/test_check.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *on_gpu]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=max(1.0, min(500.0, suite.remaining())),
        )
        output, failed = done.stdout + done.stderr, 0 if done.returncode == 0 else 1
    except subprocess.TimeoutExpired as expired:
        output, failed = f"{expired}", 1
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", output)
    }
    failed = max(failed, counts.get("failed", 0) + counts.get("error", 0))
    row = {"stage": "correctness", "what": "tests", "files": on_gpu, **counts}
    if failed:
        row["output"] = output[-4000:]
        print(row["output"])
    suite.results.judge(bar, failed, row)


def _precision(suite: Suite, T: float, bar: Bar) -> None:
    """The worst relative Frobenius error of the fp32 gradient on inputs rounded to fp16."""
    worst = 0.0
    for n, noise in itertools.product((512, 2048, 16384), (None, 0.2)):
        n = suite.size(n)
        z0, other = torch.randn(2, n // 2, 128, device=suite.device)
        z = [t.half().float() for t in (z0, other if noise is None else z0 + noise * other)]
        z0, z1 = (t.requires_grad_() for t in z)
        loss, *truth = gpu_peers.oracle("nt_xent", z0, z1, T)
        true_dz = torch.cat(truth)
        for impl in suite.implementations("nt_xent"):
            try:
                got = value_and_grad(partial(clae_fast.nt_xent, temperature=T, impl=impl), z0, z1)
            except (ValueError, RuntimeError) as failure:
                suite.results.lacks(f"nt_xent {impl} at n={n}", first_line(failure))
                continue
            error = ((torch.cat(got[1:]).double() - true_dz).norm() / true_dz.norm()).item()
            # NaN stays, where max() would drop it
            worst = error if not error <= worst else worst
            row = {"stage": "correctness", "what": "precision", "impl": impl, "n": n, "D": 128}
            row |= {"T": T, "set": "random" if noise is None else "well separated"}
            suite.results.add(row | {"loss": loss.item(), "value": error})
    suite.results.judge(bar, worst, {"stage": "correctness", "what": "precision", "T": T})


# nt_xent, info_nce


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
        text = f"share of the 4 n^2 D floor, {_name(dtype)}, n={n}, D=128, T={T}"
        bar = Bar("nt_xent", text, at_least=FLOOR_SHARE)
        yield Case("nt_xent", bar.text, 5, partial(_floor, suite, n, T, dtype, bar), (bar,))
    yield from _against_peers(suite, "nt_xent")


def info_nce(suite: Suite) -> Iterator[Case]:
    """Two-way InfoNCE against kernels for language models; NT-Xent against them as other work."""
    yield from _against_peers(suite, "info_nce")


def _against_peers(suite: Suite, stage: str) -> Iterator[Case]:
    """A case for each size and temperature; what compiles for minutes comes last."""

    def group(versus: Versus) -> tuple[bool, str, int, int]:
        slow = gpu_peers.PEERS[versus.peer].compiled
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


def _ours(work: str, T: float, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    if work == "two_way":
        return partial(clae_fast.info_nce, temperature=T, symmetric=True, **options)
    return partial(clae_fast.nt_xent, temperature=T, **options)


def _compare(suite: Suite, versus: Sequence[Versus], T: float) -> None:
    stage, work = versus[0].stage, versus[0].work
    # two-way InfoNCE counts the rows of one side
    n, D = suite.size(versus[0].n), suite.size(versus[0].D, 16)
    rows = 2 * n if work == "two_way" else n
    ours = _ours(work, T)
    same = "nt_xent" if work == "unmasked" else work
    _check_ours(suite, same, ours, rows, D, T)
    sets = suite.sets(rows * D * 4)
    inputs = [gpu_peers.views(rows, D, suite.device, seed=seed) for seed in range(sets)]

    def candidate(loss: gpu_peers.Loss, captured: bool) -> Candidate:
        return Candidate([partial(value_and_grad, loss, *z) for z in inputs], captured)

    candidates = {(OURS, "replayed"): candidate(ours, True)}
    if any(v.ours == "eager" for v in versus):
        candidates[OURS, "eager"] = candidate(ours, False)
    for name in dict.fromkeys(v.peer for v in versus):
        peer = gpu_peers.PEERS[name]
        try:
            loss = gpu_peers.load(name, rows, T, D, suite.device)
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
        row["version"] = gpu_peers.PEERS[name].version
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


def _check_ours(suite: Suite, work: str, loss: gpu_peers.Loss, n: int, D: int, T: float) -> None:
    z = gpu_peers.views(min(n, gpu_peers.CHECKED_ROWS), D, suite.device)
    error = gpu_peers.error_of(work, loss, T, *z)
    if not error <= ERROR_BAR:
        raise ArithmeticError(f"{work} is {error:.1e} off the float64 reference")


def _floor(suite: Suite, n: int, T: float, dtype: torch.dtype, bar: Bar) -> None:
    n, D = suite.size(n), 128
    inputs = [
        gpu_peers.views(n, D, suite.device, dtype=dtype, seed=seed)
        for seed in range(suite.sets(n * D * dtype.itemsize))
    ]
    loss = _ours("nt_xent", T)
    calls = [partial(value_and_grad, loss, *z) for z in inputs]
    row = suite.measure({OURS: Candidate(calls, True)})[OURS]
    del row["over"]
    share = 4 * n * n * D / suite.ceilings()[1] / (1e-6 * row["us"])
    what = {"stage": "nt_xent", "work": "nt_xent", "candidate": OURS, "how": "replayed"}
    suite.results.judge(bar, share, what | {"n": n, "D": D, "T": T, "dtype": _name(dtype)} | row)


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


# small

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
    inputs = [
        gpu_peers.views(n, D, suite.device, seed=seed) for seed in range(suite.sets(n * D * 4))
    ]
    op = torch.ops.clae_fast.nt_xent_fwd_bwd.default
    for index, T in enumerate(TEMPERATURES):
        candidates = {}
        for impl in suite.implementations("nt_xent"):
            loss = _ours("nt_xent", T, impl=impl)
            autograd = [partial(value_and_grad, loss, *z) for z in inputs]
            candidates[impl, "loss and gradient"] = Candidate(autograd, True)
            if impl != "reference":
                alone = [partial(op, *(t.detach() for t in z), T, False, impl) for z in inputs]
                candidates[impl, "op alone"] = Candidate(alone, True)
        for (impl, what), row in suite.measure(candidates).items():
            over = row.pop("over")
            row = {"stage": "small", "n": n, "D": D, "T": T, "impl": impl, "what": what} | row
            row |= {"over_others": {f"{name}, {kind}": r for (name, kind), r in over.items()}}
            if bars and (impl, what) == ("cuda", "op alone"):
                suite.results.judge(bars[index], row["us"], row)
            else:
                suite.results.add(row)


# linf_step, stem

LAYOUTS = {
    "contiguous": (torch.contiguous_format, torch.contiguous_format),
    "channels_last": (torch.channels_last, torch.channels_last),
    "x channels_last, gradient contiguous": (torch.channels_last, torch.contiguous_format),
    "x contiguous, gradient channels_last": (torch.contiguous_format, torch.channels_last),
}
PER_CHANNEL = (0.02, 0.03, 0.04)


def linf_step(suite: Suite) -> Iterator[Case]:
    """The sign step in every layout against torch's own operations, and the rate of a copy."""
    shapes = ((256, 3, 32, 32), (256, 3, 224, 224))
    for dtype, shape, layout in itertools.product((torch.float32, torch.float16), shapes, LAYOUTS):
        for eps in (EPS, PER_CHANNEL):
            name = f"{shape[0]}x3x{shape[2]}x{shape[3]}, {_name(dtype)}, {layout}"
            name += ", per channel" if isinstance(eps, tuple) else ""
            run = partial(_linf_step, suite, shape, dtype, layout, eps)
            yield Case("linf_step", name, 3, run)


def _linf_step(
    suite: Suite,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    eps: float | tuple[float, ...],
) -> None:
    shape = tuple(suite.size(size, 8) for size in shape)
    of_x, of_grad = LAYOUTS[layout]
    x = torch.rand(shape, device=suite.device, dtype=dtype).to(memory_format=of_x)
    sets = suite.sets(3 * x.nbytes)
    inputs = [
        (torch.rand_like(x), torch.randn(shape, device=suite.device, dtype=dtype))
        for _ in range(sets)
    ]
    inputs = [(x, grad.to(memory_format=of_grad)) for x, grad in inputs]
    number = isinstance(eps, float)
    radius = eps if number else torch.tensor(eps, device=suite.device, dtype=dtype).view(3, 1, 1)

    def eager(x: Tensor, grad: Tensor) -> Tensor:
        return (x + radius * grad.sign()).clamp(0, 1)

    expected = eager(*inputs[0])
    candidates = {}
    for impl in suite.implementations("linf_step"):
        step = partial(clae_fast.linf_step, alpha=eps, eps=eps, lo=0.0, hi=1.0, impl=impl)
        torch.testing.assert_close(step(*inputs[0]), expected, rtol=0, atol=2e-3)
        candidates[OURS, impl] = Candidate([partial(step, *pair) for pair in inputs], True)
    candidates["torch", "eager"] = Candidate([partial(eager, *pair) for pair in inputs], True)
    floor_us = 1e6 * 3 * x.nbytes / suite.ceilings()[0]
    for (name, impl), row in suite.measure(candidates).items():
        over = row.pop("over")
        row = {"stage": "linf_step", "shape": list(shape), "dtype": _name(dtype)} | row
        row |= {"layout": layout, "per_channel": not number, "input_sets": sets}
        row |= {"candidate": name, "impl": impl, "share_of_copy": floor_us / row["us"]}
        row["torch_over_this"] = 1 / over["torch", "eager"]
        suite.results.add(row)


# batch, image size, kernel size, stride, padding and the bar on the speed-up
STEMS = ((256, 32, 3, 1, 1, 4.0), (256, 224, 7, 2, 3, 5.0))
AGREEMENT = 0.999


def stem(suite: Suite) -> Iterator[Case]:
    """The stem's input gradient with the sign step against cuDNN's and torch's."""
    for (N, side, size, stride, padding, speedup), dtype in itertools.product(
        STEMS, (torch.float16, torch.bfloat16)
    ):
        what = f"{N}x3x{side}x{side}, {size}x{size}, {_name(dtype)}"
        bars = (
            Bar("stem", f"cuDNN dgrad + sign step over {OURS}, {what}", at_least=speedup),
            Bar("stem", f"agreement weighted by |g|, {what}", at_least=AGREEMENT),
        )
        run = partial(_stem, suite, N, side, size, stride, padding, dtype, bars)
        yield Case("stem", what, 8, run, bars)


def _stem(
    suite: Suite,
    N: int,
    side: int,
    size: int,
    stride: int,
    padding: int,
    dtype: torch.dtype,
    bars: tuple[Bar, Bar],
) -> None:
    N, side = suite.size(N, 2), suite.size(side, 16)
    out_side = (side + 2 * padding - size) // stride + 1
    weight = torch.randn(64, 3, size, size, device=suite.device, dtype=dtype) / size
    layouts = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    weights = {name: weight.contiguous(memory_format=kind) for name, kind in layouts.items()}

    def draw(*shape: int, like: torch.dtype) -> Tensor:
        t = torch.randn(shape, device=suite.device).to(like)
        return t.to(memory_format=torch.channels_last)

    # views are never bf16
    inputs = [
        (draw(N, 64, out_side, out_side, like=dtype), draw(N, 3, side, side, like=torch.float16))
        for _ in range(2 if suite.rehearsal else suite.sets(N * 64 * out_side * out_side * 2))
    ]
    inputs = [(dy, x.sigmoid()) for dy, x in inputs]

    def dgrad(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        geometry = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1)
        wanted = [True, False, False]
        return torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, wanted)[0]

    def unfused(layout: str, dy: Tensor, x: Tensor) -> Tensor:
        # of the input, only the shape matters
        g = dgrad(dy, x.view(dtype), weights[layout])
        return (x + EPS * g.sign().to(x.dtype)).clamp(0, 1)

    def ours(dy: Tensor, x: Tensor) -> Tensor:
        return clae_fast.stem_step(
            dy, weight, x, stride=stride, padding=padding, alpha=EPS, eps=EPS, lo=0.0, hi=1.0
        )

    dy, x = inputs[0]
    g = dgrad(dy.float(), x.float(), weight.float()).abs().double()
    signs = [(step(dy, x) - x).sign() for step in (partial(unfused, "channels_last"), ours)]
    agreement = ((signs[0] == signs[1]) * g).sum() / g.sum()

    candidates = {OURS: Candidate([partial(ours, *pair) for pair in inputs], True)}
    for name, kind in layouts.items():
        pairs = [
            (dy.contiguous(memory_format=kind), x.contiguous(memory_format=kind))
            for dy, x in inputs
        ]
        calls = [partial(unfused, name, *pair) for pair in pairs]
        candidates[f"cuDNN, {name}"] = Candidate(calls, True)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        measured = suite.measure(candidates)
    best = min((name for name in measured if name != OURS), key=lambda name: measured[name]["us"])
    moved = dy.nbytes + 2 * x.nbytes
    for name, row in measured.items():
        over = row.pop("over")
        row = {"stage": "stem", "candidate": name, "shape": list(x.shape), "kernel": size} | row
        row |= {"dtype": _name(dtype), "input_sets": len(inputs)}
        row["share_of_copy"] = 1e6 * moved / suite.ceilings()[0] / row["us"]
        if name != best:
            suite.results.add(row)
            continue
        suite.results.judge(bars[0], over[OURS], row | {"ratio": over[OURS]})
    row = {"stage": "stem", "what": "agreement", "shape": list(x.shape), "dtype": _name(dtype)}
    suite.results.judge(bars[1], agreement.item(), row)


# memory

EXTRA_BAR = 8.0


def memory_use(suite: Suite) -> Iterator[Case]:
    """Peak memory of the loss and its gradient above its inputs, up to a million rows."""
    for n, seconds in ((8192, 5), (65536, 5), (1 << 20, 30)):
        text = f"extra memory over the inputs' bytes, n={n}, D=128"
        bar = Bar("memory", text, at_most=EXTRA_BAR)
        yield Case("memory", f"n={n}", seconds, partial(_memory, suite, n, bar), (bar,))


def _memory(suite: Suite, n: int, bar: Bar) -> None:
    n, D, T = suite.size(n), 128, 0.5
    z = gpu_peers.views(n, D, suite.device)
    losses = {OURS: _ours("nt_xent", T)}
    if n <= 8192:
        losses["mm + cross_entropy, TF32"] = gpu_peers.load(
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


# sweep


def sweep(suite: Suite) -> Iterator[Case]:
    """Tilings of the Triton kernels beside the default, which is then edited by hand."""
    for D, n in itertools.product((128, 64, 256, 512), (16384, 2048)):
        yield Case("sweep", f"nt_xent, n={n}, D={D}", 90, partial(_sweep, suite, n, D))
        if suite.rehearsal:
            return  # the interpreter takes its time


def _sweep(suite: Suite, n: int, D: int) -> None:
    """Tilings of the sums first, then of the gradient beside the best of the sums."""
    from clae_fast.kernels._softmax import tilings
    from clae_fast.kernels.nt_xent import nt_xent_fwd, nt_xent_fwd_bwd

    n, D = suite.size(n), suite.size(D, 16)
    default = tilings(D, exact=False)
    inputs = [gpu_peers.views(n, D, suite.device, dtype=torch.float16) for _ in range(2)]
    inputs = [tuple(t.detach() for t in z) for z in inputs]
    best = default
    for part, launch in (("sums", nt_xent_fwd), ("gradient", nt_xent_fwd_bwd)):
        options = [getattr(default, part), *_tilings(suite, D)]
        configs = {t: best._replace(**{part: t}) for t in options}
        _compile_ahead(suite, launch.__name__, n, D, list(configs.values()))
        candidates = {
            t: Candidate([partial(launch, *z, 0.5, False, c) for z in inputs], True)
            for t, c in configs.items()
        }
        measured = suite.measure(candidates, rounds=5)
        for tiling, row in measured.items():
            over = row.pop("over")
            row = {"stage": "sweep", "part": part, "n": n, "D": D, "dtype": "fp16"} | row
            row |= {"tiling": tiling._asdict(), "default_over_this": 1 / over[options[0]]}
            suite.results.add(row)
        fastest = min(measured, key=lambda tiling: measured[tiling]["us"])
        best = best._replace(**{part: fastest})
        gain = measured[options[0]]["us"] / measured[fastest]["us"]
        print(f"  {part}: {gain:.2f}x by {fastest}", flush=True)


def _tilings(suite: Suite, D: int) -> list[Any]:
    from clae_fast.kernels._launch import Tiling, padded

    if suite.rehearsal:
        return [Tiling(16, 16, 16, 4, 2)]
    width = padded(D)
    return [
        Tiling(rows, columns, depth, num_warps, num_stages, descriptors)
        for rows, columns in ((64, 64), (128, 64), (64, 128), (128, 128), (128, 256))
        for depth in sorted({min(128, width), width})
        for num_warps in (4, 8)
        for num_stages in (2, 3)
        for descriptors in (False, True)
        # an accumulator of more than 128 registers a thread leaves too few for the rest
        if rows * columns <= 128 * 32 * num_warps
    ]


def _compile_ahead(suite: Suite, launcher: str, n: int, D: int, configs: Sequence[Any]) -> None:
    """Fill Triton's cache with what the configurations need, on all cores."""
    if suite.rehearsal:
        return
    workers = min(8, max(1, len(os.sched_getaffinity(0)) - 2))
    shares = [configs[i::workers] for i in range(workers)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(partial(_compile_some, launcher, n, D), shares):
            pass


def _compile_some(launcher: str, n: int, D: int, configs: Sequence[Any]) -> None:
    from clae_fast.kernels import nt_xent

    z = torch.randn(n // 2, D, device="cuda", dtype=torch.float16)
    for config in configs:
        try:
            getattr(nt_xent, launcher)(z, z, 0.5, False, config)
        except Exception:
            continue  # reported where it is timed


# profile


def profile(suite: Suite) -> Iterator[Case]:
    """Launches of a loss, and what touches images between the projections and x_adv."""
    launches = Bar("profile", f"launches of {OURS}'s own in a loss and its gradient", at_most=3)
    yield Case("profile", launches.text, 10, partial(_launches, suite, launches), (launches,))
    passes = Bar("profile", "other operations on images between the loss and x_adv", at_most=0)
    yield Case("profile", passes.text, 30, partial(_passes, suite, passes), (passes,))


def _launches(suite: Suite, bar: Bar) -> None:
    z = gpu_peers.views(suite.size(8192), 128, suite.device)
    call = partial(value_and_grad, _ours("nt_xent", 0.5), *z)
    call()
    with torch.profiler.profile() as profiler:
        call()
    names = [
        event.name
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    own = [name for name in names if not re.search(r"at::|Memset|Memcpy|cutlass|cublas", name)]
    row = {"stage": "profile", "what": "launches", "kernels": names, "own": own}
    suite.results.judge(bar, len(own), row)


def _passes(suite: Suite, bar: Bar) -> None:
    side, batch = suite.size(32, 8), suite.size(256, 4)
    arch = "resnet-narrow" if suite.rehearsal else "resnet18"
    step = overhead.build("pair", batch, torch.channels_last, arch, side, suite.device)
    dtype = torch.bfloat16 if suite.rehearsal else torch.float16
    with torch.autocast(suite.device.type, dtype):
        step()
        with torch.profiler.profile(record_shapes=True) as profiler:
            step()
    events = [
        event for event in profiler.events() if event.name.startswith(("aten::", "clae_fast::"))
    ]
    events.sort(key=lambda event: event.time_range.start)
    names = [event.name for event in events]
    loss = next((i for i, name in enumerate(names) if "nt_xent" in name), 0)
    steps = [i for i, name in enumerate(names) if re.search("(stem|linf)_step", name)]
    last = steps[0] if steps else len(names)
    between = [
        event.name
        for event in events[loss:last]
        if [batch, 3, side, side] in event.input_shapes
        and not re.search("conv", event.name)
        and (suite.rehearsal or event.self_device_time_total > 0)
    ]
    fused = any("stem_step" in name for name in names)
    row = {"stage": "profile", "what": "image-size operations", "fused": fused}
    value = len(between) if fused or suite.rehearsal else len(between) + 1
    suite.results.judge(bar, value, row | {"operations": between})


# sanitizer


def sanitizer(suite: Suite) -> Iterator[Case]:
    """Every kernel once at awkward sizes under compute-sanitizer."""
    for tool in ("memcheck", "racecheck"):
        bar = Bar("sanitizer", f"errors of {tool}", at_most=0)
        yield Case("sanitizer", tool, 180, partial(_sanitize, suite, tool, bar), (bar,))


def _sanitize(suite: Suite, tool: str, bar: Bar) -> None:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [sys.executable, "-m", "benchmarks.gpu_sanitized", str(suite.device)]
    if not suite.rehearsal:
        if not Path(program).exists():
            return suite.results.lacks("compute-sanitizer", "is not on the PATH")
        command = [program, "--tool", tool, "--error-exitcode", "9", *command]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=max(1.0, min(400.0, suite.remaining())),
        )
    except subprocess.TimeoutExpired:
        return suite.results.lacks(f"compute-sanitizer, {tool}", "ran out of time")
    output = done.stdout + done.stderr
    found = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    errors = int(found[1] or found[2]) if found else 0
    row = {"stage": "sanitizer", "tool": tool, "status": done.returncode}
    if errors or done.returncode:
        row["output"] = output[-4000:]
        print(row["output"])
    suite.results.judge(bar, max(errors, int(done.returncode != 0)), row)


STAGES: dict[str, Callable[[Suite], Iterable[Case]]] = {
    "build": build,
    "correctness": correctness,
    "nt_xent": nt_xent,
    "small": small,
    "info_nce": info_nce,
    "linf_step": linf_step,
    "stem": stem,
    "memory": memory_use,
    "sweep": sweep,
    "profile": profile,
    "sanitizer": sanitizer,
}
