"""Features with classes, for the tests of probes."""

import torch


def clusters(per_class, noise, seed):
    """Points around four directions in eight dimensions, at lengths from 1 to 100."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(4).repeat(per_class)
    points = torch.eye(8)[labels] + noise * torch.randn(len(labels), 8, generator=generator)
    return points * torch.logspace(0, 2, len(labels)).unsqueeze(1), labels
