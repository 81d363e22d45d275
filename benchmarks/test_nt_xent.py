"""Loss and gradient of NT-Xent by every implementation, grouped by n = 2N rows, D = 128."""

from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import nt_xent, peers

SMALL = (128, 512)
LARGE = (2048, 8192)


@pytest.mark.parametrize("impl", nt_xent.IMPLS)
def test_nt_xent(benchmark: Any, impl: str, size: int) -> None:
    benchmark.group = f"nt_xent n={size}"
    z0, z1 = peers.paired_views(size, 128, torch.float32)
    truth = peers.oracle(z0, z1, 0.5)
    try:
        prepared = nt_xent.prepare(impl, z0, z1, 0.5, truth)
    except peers.UnavailableError as error:
        pytest.skip(str(error))
    benchmark(partial(peers.value_and_grad, prepared.loss, z0, z1))
