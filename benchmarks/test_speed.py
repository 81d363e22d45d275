"""The pytest-benchmark suite: NT-Xent, the sign step and training steps, grouped by size."""

from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import nt_xent, overhead
from benchmarks.case import CPU, OURS, UnavailableError
from benchmarks.cases import CASES
from benchmarks.harness import forms_of, prepare
from benchmarks.setting import Setting

# the sizes of every test, and those that --large adds
SIZES = {
    "test_nt_xent": ([128, 512], [2048, 8192]),
    "test_linf_step": ([(64, 3, 32, 32)], [(256, 3, 32, 32), (256, 3, 224, 224)]),
    "test_step": ([("resnet-narrow", 32, 16)], [("resnet18", 64, 32)]),
}


@pytest.mark.parametrize("impl", nt_xent.IMPLS)
def test_nt_xent(benchmark: Any, impl: str, size: int) -> None:
    benchmark.group = f"nt_xent n={size}"
    case = CASES["nt_xent"](size)
    operands = case.inputs(torch.float32, CPU, 0)
    try:
        prepared = prepare(case, impl, operands, case.exact(operands))
    except UnavailableError as error:
        pytest.skip(str(error))
    benchmark(partial(case.call, prepared.function, operands))


@pytest.mark.parametrize("name", [OURS, "eager", "in place"])
def test_linf_step(benchmark: Any, name: str, size: tuple[int, ...]) -> None:
    benchmark.group = f"linf_step {'x'.join(map(str, size))}"
    case = CASES["linf_step"](size)
    x, grad = case.inputs(torch.float32, CPU, 0)
    (step,) = forms_of(case, name).values()
    # ours also rounds into the ball, by a last bit that the peers let go
    torch.testing.assert_close(step(x, grad), case.truth(x, grad), atol=1e-6, rtol=0)
    benchmark(step, x, grad)


@pytest.mark.parametrize("schedule", [*overhead.SCHEDULES, overhead.BY_HAND])
def test_step(benchmark: Any, schedule: str, size: tuple[str, int, int]) -> None:
    setting = Setting(*size, CPU)
    benchmark.group = f"step {setting}"
    benchmark(overhead.build(schedule, setting, torch.channels_last))
