"""Every kernel of the package once, at sizes that no tile divides: what compute-sanitizer watches.

compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitized cuda
"""

from __future__ import annotations

import sys

import torch

import clae_fast
from benchmarks.peers import value_and_grad
from clae_fast import _impl


def main(device: str) -> int:
    for D in (72, 128):
        z0, z1 = (torch.randn(75, D, device=device, requires_grad=True) for _ in range(2))
        for op in ("nt_xent", "info_nce", "uel", "hard_nt_xent"):
            for impl in _impl.available(op, device):
                for T in (0.5, 0.01):
                    value_and_grad(
                        lambda a, b, op=op, impl=impl, T=T: getattr(clae_fast, op)(
                            a, b, temperature=T, impl=impl
                        ),
                        z0,
                        z1,
                    )
        positive = torch.arange(75, device=device) * 7 % 75
        for impl in _impl.available("bank_step", device):
            for given in ({"keys": z1.detach()}, {"positive": positive}):
                bank, velocity = z1.detach().clone(), torch.zeros_like(z1)
                clae_fast.bank_step(bank, velocity, z0, lr=0.1, impl=impl, **given)
        for impl in _impl.available("tied_nt_xent", device):
            clae_fast.tied_nt_xent(z0.detach(), impl=impl)
    x, grad = torch.rand(5, 3, 11, 13, device=device), torch.randn(5, 3, 11, 13, device=device)
    for impl in _impl.available("linf_step", device):
        for layout in (torch.contiguous_format, torch.channels_last):
            for eps in (0.03, (0.01, 0.02, 0.03)):
                clae_fast.linf_step(
                    x, grad.to(memory_format=layout), alpha=eps, eps=eps, lo=0.0, impl=impl
                )
    for size, stride, padding in ((3, 1, 1), (7, 2, 3)):
        weight = torch.randn(64, 3, size, size, device=device)
        side = [(s + 2 * padding - size) // stride + 1 for s in (11, 13)]
        dy = torch.randn(5, 64, *side, device=device, dtype=torch.float16)
        options = {"stride": stride, "padding": padding, "alpha": 0.03, "eps": 0.03}
        clae_fast.stem_step(dy, weight, x, **options)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    print("ran every kernel")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
