"""A training step under every schedule, grouped by network, batch and image size."""

from typing import Any

import pytest
import torch

from benchmarks import overhead

SMALL = (("resnet-narrow", 32, 16),)
LARGE = (("resnet18", 64, 32),)


@pytest.mark.parametrize("schedule", [*overhead.SCHEDULES, overhead.BY_HAND])
def test_step(benchmark: Any, schedule: str, size: tuple[str, int, int]) -> None:
    arch, batch_size, image_size = size
    benchmark.group = f"step {arch} {batch_size}x3x{image_size}x{image_size}"
    step = overhead.build(
        schedule, batch_size, torch.channels_last, arch, image_size, torch.device("cpu")
    )
    benchmark(step)
