"""Stages that build, test, profile and watch: whether all is as it should be."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

import clae_fast
from benchmarks import overhead
from benchmarks.gpu import peers
from benchmarks.gpu.results import Bar, Row
from benchmarks.gpu.stage import ERROR_BAR, OURS, ROOT, Case, Suite
from benchmarks.peers import value_and_grad
from clae_fast import _impl, _native


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
        suite.results.add(suite.measure_ceilings())

    yield Case("build", "machine and ceilings", 20, run)


PRECISION_TEMPERATURES = (0.5, 0.1, 0.07, 0.05)


def correctness(suite: Suite) -> Iterator[Case]:
    """The tests of what runs on a GPU, and the gradient's precision."""
    tests = Bar("correctness", "tests failed", at_most=0)
    yield Case("correctness", "tests", 150, partial(_run_tests, suite, tests), (tests,))
    for T in PRECISION_TEMPERATURES:
        bar = Bar("correctness", f"error of nt_xent's gradient, T={T}", at_most=ERROR_BAR)
        yield Case("correctness", bar.text, 15, partial(_precision, suite, T, bar), (bar,))


def _run_tests(suite: Suite, bar: Bar) -> None:
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))
    on_gpu = [f for f in files if re.search(r"test_(kernels_|cuda_(?!emulator)|gpu\.|stem)", f)]
    if suite.rehearsal:
        on_gpu = ["tests/ops/test_check.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *on_gpu]
    timeout = min(500.0, suite.remaining())
    try:
        # the tests poison memory by torch's deterministic mode, in which cuBLAS wants this
        done = _run(*command, timeout=timeout, CUBLAS_WORKSPACE_CONFIG=":4096:8")
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
        loss, *truth = peers.oracle("nt_xent", z0, z1, T)
        true_dz = torch.cat(truth)
        for impl in suite.implementations("nt_xent", z0, z1):
            got = value_and_grad(partial(clae_fast.nt_xent, temperature=T, impl=impl), z0, z1)
            error = ((torch.cat(got[1:]).double() - true_dz).norm() / true_dz.norm()).item()
            # NaN stays, where max() would drop it
            worst = error if not error <= worst else worst
            row = {"stage": "correctness", "what": "precision", "impl": impl, "n": n, "D": 128}
            row |= {"T": T, "set": "random" if noise is None else "well separated"}
            suite.results.add(row | {"loss": loss.item(), "value": error})
    suite.results.judge(bar, worst, {"stage": "correctness", "what": "precision", "T": T})


def profile(suite: Suite) -> Iterator[Case]:
    """Launches of a loss, and what touches images between the projections and x_adv."""
    launches = Bar("profile", f"launches of {OURS}'s own in a loss and its gradient", at_most=3)
    yield Case("profile", launches.text, 10, partial(_launches, suite, launches), (launches,))
    passes = Bar("profile", "other operations on images between the loss and x_adv", at_most=0)
    yield Case("profile", passes.text, 30, partial(_passes, suite, passes), (passes,))


def _launches(suite: Suite, bar: Bar) -> None:
    z = peers.views(suite.size(8192), 128, suite.device)
    call = partial(value_and_grad, peers.ours("nt_xent", 0.5), *z)
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


def sanitizer(suite: Suite) -> Iterator[Case]:
    """Every kernel once at awkward sizes under compute-sanitizer."""
    for tool in ("memcheck", "racecheck"):
        bar = Bar("sanitizer", f"errors of {tool}", at_most=0)
        yield Case("sanitizer", tool, 180, partial(_sanitize, suite, tool, bar), (bar,))


def _run(*command: str, timeout: float, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, in the project's root."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=max(1.0, timeout),
    )


def _sanitize(suite: Suite, tool: str, bar: Bar) -> None:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [sys.executable, "-m", "benchmarks.gpu.sanitized", str(suite.device)]
    if not suite.rehearsal:
        if not Path(program).exists():
            return suite.results.lacks("compute-sanitizer", "is not on the PATH")
        command = [program, "--tool", tool, "--error-exitcode", "9", *command]
    timeout = min(400.0, suite.remaining())
    try:
        done = _run(*command, timeout=timeout, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    except subprocess.TimeoutExpired:
        return suite.results.lacks(f"compute-sanitizer, {tool}", "ran out of time")
    output = done.stdout + done.stderr
    found = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    if not (found or done.returncode or suite.rehearsal):
        return suite.results.lacks(f"compute-sanitizer, {tool}", "printed no summary")
    errors = int(found[1] or found[2]) if found else 0
    row = {"stage": "sanitizer", "tool": tool, "status": done.returncode}
    if errors or done.returncode:
        row["output"] = output[-4000:]
        print(row["output"])
    suite.results.judge(bar, max(errors, int(done.returncode != 0)), row)
