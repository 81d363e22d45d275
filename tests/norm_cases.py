"""What tests of normalization layers share."""

import torch
from step_cases import randomize_norms
from torch import Tensor, nn


def encoder(norm: nn.Module) -> nn.Sequential:
    layers = (nn.Conv2d(3, 4, 3, padding=1), norm, nn.Softplus(), nn.Conv2d(4, 4, 3))
    module = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(6), nn.BatchNorm1d(6)).double()
    module(views(1)[0])
    for layer in (module[1], module[-1]):
        layer.reset_running_stats()
    if norm.affine:
        randomize_norms(norm, torch.Generator().manual_seed(1))
    return module


def views(groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(groups)
    return [
        torch.rand(5, 3, 6, 6, generator=generator, dtype=torch.float64) * (1 + i)
        for i in range(groups)
    ]
