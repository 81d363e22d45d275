"""The stages that describe the machine, run the tests, profile, and look for bad accesses."""

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

from benchmarks import overhead
from benchmarks.case import OURS, relative_error
from benchmarks.cases import CASES
from benchmarks.gpu.stage import ERROR_BAR, ROOT, Suite, Task, judged
from benchmarks.results import Bar, Row
from benchmarks.setting import Setting
from clae_fast import _impl, _native


def build(suite: Suite) -> Iterator[Task]:
    """The machine's facts, and the two rates that shares are taken of."""

    def run() -> None:
        facts: Row = {"stage": "build", "what": "machine", "has_cuda": _native.has_cuda()}
        facts |= {"triton": version("triton"), "isas": _native.isas()}
        if not suite.rehearsal:
            card = torch.cuda.get_device_properties(suite.device)
            facts |= {"capability": f"{card.major}.{card.minor}"}
            facts |= {"multiprocessors": card.multi_processor_count}
            facts |= {"l2_bytes": card.L2_cache_size, "memory_bytes": card.total_memory}
        for op in ("nt_xent", "info_nce", "linf_step", "stem_step"):
            facts[op] = _impl.available(op, suite.device.type)
        suite.results.add(facts)
        if not _native.has_cuda():
            suite.results.lacks("CUDA C++ kernels", "built without nvcc")
        suite.ceilings(measure=True)

    yield Task("build", "machine and ceilings", 20, run)


PRECISION_TEMPERATURES = (0.5, 0.1, 0.07, 0.05)


def correctness(suite: Suite) -> Iterator[Task]:
    """The tests of what runs on a GPU, and the gradient's precision."""
    yield judged("correctness", "tests failed", 150, _run_tests, suite, at_most=0)
    for T in PRECISION_TEMPERATURES:
        what = f"error of nt_xent's gradient, T={T}"
        yield judged("correctness", what, 15, _precision, suite, T, at_most=ERROR_BAR)


def _run_tests(suite: Suite, bar: Bar) -> None:
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))
    on_gpu = [f for f in files if re.search(r"test_(kernels_|cuda_(?!emulator)|gpu\.|stem)", f)]
    if suite.rehearsal:
        on_gpu = ["tests/ops/test_check.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *on_gpu]
    # the tests poison memory by torch's deterministic mode, in which cuBLAS wants this
    variables = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    status, output = _run(command, min(500.0, suite.remaining()), variables)
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", output)
    }
    failed = max(int(status != 0), counts.get("failed", 0) + counts.get("error", 0))
    row = {"stage": "correctness", "what": "tests", "files": on_gpu, **counts}
    suite.results.judge(bar, failed, row | _shown(output, failed))


def _precision(suite: Suite, T: float, bar: Bar) -> None:
    """The worst relative Frobenius error of the fp32 gradient on inputs rounded to fp16."""
    worst = 0.0
    for n, noise in itertools.product((512, 2048, 16384), (None, 0.2)):
        n = suite.size(n)
        z0, other = torch.randn(2, n // 2, 128, device=suite.device)
        z = [t.half().float() for t in (z0, other if noise is None else z0 + noise * other)]
        z0, z1 = (t.requires_grad_() for t in z)
        case = CASES["nt_xent"](n, 128, T)
        loss, *truth = case.exact((z0, z1))
        for impl in suite.implementations("nt_xent", z0, z1):
            _, *got = case.call(partial(case.op, impl=impl), (z0, z1))
            error = relative_error((torch.cat(got),), (torch.cat(truth),))
            # NaN stays, where max() would drop it
            worst = error if not error <= worst else worst
            row = {"stage": "correctness", "what": "precision", "impl": impl, "n": n, "D": 128}
            row |= {"T": T, "set": "random" if noise is None else "well separated"}
            suite.results.add(row | {"loss": loss.item(), "value": error})
    suite.results.judge(bar, worst, {"stage": "correctness", "what": "precision", "T": T})


def profile(suite: Suite) -> Iterator[Task]:
    """Launches of a loss, and what touches images between the projections and x_adv."""
    what = f"launches of {OURS}'s own in a loss and its gradient"
    yield judged("profile", what, 10, _launches, suite, at_most=3)
    what = "other operations on images between the loss and x_adv"
    yield judged("profile", what, 30, _passes, suite, at_most=0)


def _launches(suite: Suite, bar: Bar) -> None:
    case = CASES["nt_xent"](suite.size(8192))
    call = partial(case.call, case.op, case.inputs(torch.float32, suite.device, 0))
    call()
    with torch.profiler.profile() as profiler:
        call()
    on_gpu = torch.autograd.DeviceType.CUDA
    names = [event.name for event in profiler.events() if event.device_type == on_gpu]
    own = [name for name in names if not re.search(r"at::|Memset|Memcpy|cutlass|cublas", name)]
    row = {"stage": "profile", "what": "launches", "kernels": names, "own": own}
    suite.results.judge(bar, len(own), row)


def _passes(suite: Suite, bar: Bar) -> None:
    side, batch = suite.size(32, 8), suite.size(256, 4)
    arch = "resnet-narrow" if suite.rehearsal else "resnet18"
    setting = Setting(arch, batch, side, suite.device)
    step = overhead.build("pair", setting, torch.channels_last)
    dtype = torch.bfloat16 if suite.rehearsal else torch.float16
    with torch.autocast(suite.device.type, dtype):
        step()
        with torch.profiler.profile(record_shapes=True) as profiler:
            step()
    ours = ("aten::", "clae_fast::")
    events = [event for event in profiler.events() if event.name.startswith(ours)]
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


def sanitizer(suite: Suite) -> Iterator[Task]:
    """Every kernel once at awkward sizes under compute-sanitizer."""
    for tool in ("memcheck", "racecheck"):
        yield judged("sanitizer", f"errors of {tool}", 180, _sanitize, suite, tool, at_most=0)


def _run(command: list[str], timeout: float, variables: dict[str, str]) -> tuple[int | None, str]:
    """The status and the output of a command in the project's root; no status after `timeout`."""
    options = {"cwd": ROOT, "env": {**os.environ, **variables}, "timeout": max(1.0, timeout)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    except subprocess.TimeoutExpired as expired:
        return None, str(expired)
    return done.returncode, done.stdout + done.stderr


def _shown(output: str, errors: int) -> Row:
    """The end of the output for a row, printed too, where there were errors."""
    if not errors:
        return {}
    print(output[-4000:])
    return {"output": output[-4000:]}


def _sanitize(suite: Suite, tool: str, bar: Bar) -> None:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [sys.executable, "-m", "benchmarks.gpu.sanitized", str(suite.device)]
    if not suite.rehearsal:
        if not Path(program).exists():
            return suite.results.lacks("compute-sanitizer", "is not on the PATH")
        command = [program, "--tool", tool, "--error-exitcode", "9", *command]
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status, output = _run(command, min(400.0, suite.remaining()), variables)
    if status is None:
        return suite.results.lacks(f"compute-sanitizer, {tool}", "ran out of time")
    found = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    if not (found or status or suite.rehearsal):
        return suite.results.lacks(f"compute-sanitizer, {tool}", "printed no summary")
    errors = max(int(status != 0), int(found[1] or found[2]) if found else 0)
    row = {"stage": "sanitizer", "tool": tool, "status": status}
    suite.results.judge(bar, errors, row | _shown(output, errors))
