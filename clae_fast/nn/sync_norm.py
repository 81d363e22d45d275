"""BatchNorm with the statistics of the global batch, on GPU and CPU, in any dtype."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from clae_fast.distributed import World


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's SyncBatchNorm on a GPU, and the same computation on a CPU, where torch has none.

    The batch of W processes is normalized as one process would normalize all of it. One collective
    gathers every process's count, mean and variance, and they are combined. Running statistics take
    the unbiased variance of the global batch. The backward pass sums dy and dy (x - mean) over the
    processes in one collective. Weight and bias get this process's part of their gradient, which
    the caller sums over the processes with all other gradients.

    `convert` makes it. Its parameters and buffers have the names that they have in BatchNorm.
    """

    world: World

    def forward(
        self,
        x: Tensor,  # [N, C, ...]
    ) -> Tensor:
        """Normalizes `x`; the result has its shape and dtype."""
        own = self.training and x.device.type != "cuda"
        x = self._normalized(x) if own else super().forward(x)
        # timm's BatchNorm layers contain dropout and an activation
        for child in self.children():
            x = child(x)
        return x

    def _normalized(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        factor = 0.0 if self.momentum is None else self.momentum
        running = None
        if self.track_running_stats:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
            running = self.running_mean, self.running_var
        y, mean, var, count = _Normalize.apply(x, self.weight, self.bias, self.eps, self.world)
        if running is not None:
            with torch.no_grad():
                for buffer, value in zip(running, (mean, var * count / (count - 1)), strict=True):
                    assert buffer is not None
                    buffer.lerp_(value.to(buffer.dtype), factor)
        return y


class _Normalize(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) weight + bias over all processes; also mean, var, count."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, world: World
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = [0, *range(2, x.dim())]
        wide = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(wide, dims, correction=0)  # [C]
        local = torch.cat([mean, var, mean.new_tensor([x.numel() // x.shape[1]])])
        means, variances, counts = world.all_gather(local[None]).split([len(mean)] * 2 + [1], 1)
        count = counts.sum()
        share = counts / count
        mean = (share * means).sum(0)
        # the variance within the processes plus that between them
        var = (share * (variances + (means - mean).square())).sum(0)
        inverse = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse, count)
        ctx.world, ctx.dims = world, dims
        y = (wide - _spread(mean, x)) * _spread(inverse, x)
        if weight is not None:
            y = y * _spread(weight, x)
        if bias is not None:
            y = y + _spread(bias, x)
        ctx.mark_non_differentiable(mean, var, count)
        return y.to(x.dtype), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, count = ctx.saved_tensors
        dy, wide = dy.to(mean.dtype), x.to(mean.dtype)
        normalized = (wide - _spread(mean, x)) * _spread(inverse, x)
        dbias, dweight = dy.sum(ctx.dims), (dy * normalized).sum(ctx.dims)
        dx = None
        if ctx.needs_input_grad[0]:
            # dx = weight / sigma (dy - mean of dy - normalized mean of dy normalized)
            sums = ctx.world.all_reduce(torch.stack([dbias, dweight])) / count
            dx = dy - _spread(sums[0], x) - normalized * _spread(sums[1], x)
            scale = inverse if weight is None else inverse * weight
            dx = (dx * _spread(scale, x)).to(x.dtype)
        wanted = ctx.needs_input_grad
        return (
            dx,
            dweight.to(weight.dtype) if wanted[1] else None,
            dbias.to(weight.dtype) if wanted[2] else None,
            None,
            None,
        )


def _spread(per_channel: Tensor, x: Tensor) -> Tensor:  # [C] -> [C, 1, ...]
    return per_channel.view(-1, *(1 for _ in x.shape[2:]))


def convert(module: nn.Module, world: World) -> nn.Module:
    """Replaces every BatchNorm of `module` by a `SyncBatchNorm` with the same tensors.

    Convert the encoder before its adversarial twin is made, or convert both; each keeps its own
    statistics. timm's BatchNorm with an activation is converted, too.

    Without this, every process normalizes by its own rows. The step is then noisier, depends on the
    number of processes, and has running statistics of a part of the data.

    Args:
        module: Any module; it is changed in place.
        world: The processes; with one alone nothing is changed.

    Returns:
        `module`, or its replacement where it is a BatchNorm itself.

    Raises:
        TypeError: A BatchNorm computes something else than torch's does.
    """
    if world.size == 1:
        return module
    # a module that occurs twice stays one module
    made: dict[int, nn.Module] = {}

    def converted(module: nn.Module) -> nn.Module:
        if id(module) not in made:
            made[id(module)] = module
            if isinstance(module, _BatchNorm):
                made[id(module)] = _synchronized(module, world)
            else:
                for name, child in module._modules.items():
                    module._modules[name] = child and converted(child)
        return made[id(module)]

    return converted(module)


def _synchronized(norm: _BatchNorm, world: World) -> SyncBatchNorm:
    if isinstance(norm, SyncBatchNorm):
        return norm
    own = type(norm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    if own and not isinstance(getattr(norm, "act", None), nn.Module):
        raise TypeError(
            f"cannot synchronize {type(norm).__name__}: it computes something else than BatchNorm"
        )
    new = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum, False, False)
    # optimizers and twins hold these very tensors
    for name in ("affine", "track_running_stats", "training"):
        setattr(new, name, getattr(norm, name))
    new._parameters.update(norm._parameters)
    new._buffers.update(norm._buffers)
    new._modules.update(norm._modules)
    new.world = world
    return new
