"""Encoders, views and plain autograd computations that tests of steps share."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from clae_fast.attack import LinfAttack
from clae_fast.methods import METHODS
from clae_fast.nn import Encoder, ProjectionHead, adversarial_twin
from clae_fast.nn.resnet import narrow_resnet

WEIGHT = 0.7


def attack(eps: float = 0.05) -> LinfAttack:
    return LinfAttack(eps=eps, step_size=0.03, lo=0.0, hi=1.0)


def resnet(build: Callable[..., tuple[nn.Module, int]], *arguments, **options):
    pytest.importorskip("torchvision")
    return build(*arguments, **options)


def randomize_norms(module: nn.Module, generator: torch.Generator) -> None:
    """Fresh BatchNorm layers are equal, and would hide a pass through the wrong one."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(norm.bias, generator=generator)


def encoders(dtype: torch.dtype = torch.float64) -> nn.ModuleList:
    """A small ResNet and its twin, in one module so that copies keep what they share."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        backbone, features = resnet(narrow_resnet, width=8)
        encoder = Encoder(backbone, ProjectionHead(features, 12, 8)).to(dtype)
    twin = adversarial_twin(encoder)
    randomize_norms(encoder, generator)
    randomize_norms(twin, generator)
    return nn.ModuleList([encoder, twin])


def views(n: int = 6, size: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x_p, x_q = torch.rand(2, n, 3, size, size, generator=generator, dtype=dtype)
    return x_p, x_q


def method(name: str, pair: nn.ModuleList):
    built = METHODS[name](pair[0], adversarial=True)
    built.adv_encoder = pair[1]
    return built


def naive_pair(pair, x_p, x_q, loss, attack, weight):
    """The formula of pair_step, left to autograd: nothing reused, nothing cut."""
    encoder, adv_encoder = pair
    x = x_q.clone().requires_grad_()
    (dx,) = torch.autograd.grad(loss(encoder(x_p), encoder(x)), x)
    x_adv = attack.step(x_q, dx)
    z_p = encoder(x_p)
    clean, adv = loss(z_p, encoder(x_q)), loss(z_p, adv_encoder(x_adv))
    (clean + weight * adv).backward()
    return clean, adv, x_adv


def assert_same(pair, result, other, expected) -> None:
    """Losses, adversarial view and every weight gradient; `expected` came with `other`."""
    torch.testing.assert_close(result[0], expected[0].detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(result[1], expected[1].detach(), rtol=1e-12, atol=0)
    assert torch.equal(result[2], expected[2])
    gradients = {name: weight.grad for name, weight in other.named_parameters()}
    assert len(gradients) > 30
    for name, weight in pair.named_parameters():
        assert weight.grad is not None, name
        torch.testing.assert_close(
            weight.grad,
            gradients[name],
            rtol=1e-10,
            atol=1e-13,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Peak bytes that autograd keeps for backward, each storage once, `outside` not counted."""

    def __init__(self, outside: nn.Module) -> None:
        self.peak = self.live = 0
        self.holders: dict[int, int] = {}
        skipped = {weight.untyped_storage().data_ptr() for weight in outside.parameters()}

        class Holder:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor

        def pack(tensor: Tensor) -> Holder:
            storage = tensor.untyped_storage()
            holder, key = Holder(tensor.detach()), storage.data_ptr()
            if key not in skipped:
                if self.holders.setdefault(key, 0) == 0:
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                self.holders[key] += 1
                weakref.finalize(holder, self.release, key, storage.nbytes())
            return holder

        super().__init__(pack, lambda holder: holder.tensor)

    def release(self, key: int, nbytes: int) -> None:
        self.holders[key] -= 1
        if self.holders[key] == 0:
            self.live -= nbytes


def norm_buffers(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: buffer.clone()
        for name, buffer in module.named_buffers()
        if name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }


def without_norms(random: float = 0.0) -> nn.ModuleList:
    """No layer looks at more than one row."""
    layers = (nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 6, 3, padding=1))
    norm = nn.GroupNorm(2, 6)
    noise = nn.Dropout(random)
    encoder = nn.Sequential(*layers, norm, noise, nn.ReLU(), nn.Flatten(), nn.Linear(384, 8))
    encoder.double()
    return nn.ModuleList([encoder, adversarial_twin(encoder)])
