"""Images, bounds and layouts that tests of linf_step share."""

import math

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# zeros, infinities, NaN, the ends of each dtype's range, subnormals of each, and eps itself
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 0.03, -0.03, 65504.0, 7e4, -7e4, 3e38, -3e38)


def images(shape, dtype=torch.float32, *, special=False, seed=0):
    """Numbers around 0; every fourth one is special where asked."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if special:
        values = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=generator)]
        x = torch.where(torch.rand(shape, generator=generator) < 0.25, values, x)
    return x.to(dtype)


def bounds(kind, C):
    return {
        "step": {"alpha": 0.03},
        "ball": {"alpha": 0.03, "eps": 0.03},
        "range": {"alpha": 0.01, "eps": 8 / 255, "lo": 0.0, "hi": 1.0},
        "sequences": {
            "alpha": 0.02,
            "eps": [0.03 + 0.001 * c for c in range(C)],
            "lo": tuple(-1.0 - 0.01 * c for c in range(C)),
            "hi": 1.1,
        },
        "tensors": {
            "alpha": torch.linspace(0.01, 0.05, C, dtype=torch.float64),
            "eps": torch.linspace(0.02, 0.04, C, dtype=torch.float64),
        },
    }[kind]


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "sliced": lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape),
}
