"""The optimizer of a run, and its learning rate at every step."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from clae_fast.config import Optimization
from clae_fast.training.lars import LARS


def build_optimizer(
    settings: Optimization, module: nn.Module, device: torch.device | str = "cpu"
) -> Optimizer:
    """The optimizer of all parameters of `module` that want a gradient, in fused kernels.

    On a GPU the learning rate is a tensor on the device, which captured steps read.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    lr: Any = torch.tensor(settings.lr, device=device) if on_gpu else settings.lr
    # momentum encoders and teachers want no gradient
    parameters = [p for p in module.parameters() if p.requires_grad]
    exempt = [p for p in parameters if p.ndim <= 1 and not settings.decay_1d]
    decayed = [p for p in parameters if p.ndim > 1 or settings.decay_1d]
    groups: list[dict[str, Any]] = [{"params": decayed}]
    if exempt:
        groups.append({"params": exempt, "weight_decay": 0.0})
    decay = settings.weight_decay
    if settings.optimizer == "sgd":
        sgd = SGD(groups, lr, momentum=settings.momentum, weight_decay=decay, fused=True)
        # torch leaves the buffer uninitialized where the first gradient is not finite
        for p in parameters if settings.momentum else []:
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    if settings.optimizer == "lars":
        return LARS(groups, lr, momentum=settings.momentum, weight_decay=decay)
    adam = Adam if settings.optimizer == "adam" else AdamW
    # the steps before a capture run without one on purpose
    warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
    return adam(groups, lr, weight_decay=decay, fused=True, capturable=on_gpu)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of the next step; the host does not wait for a GPU."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Restores a state that `optimizer.state_dict()` gave on this or another kind of device.

    The optimizer keeps its own settings, which are the run's and live on its device.

    Raises:
        KeyError, ValueError: The state belongs to other parameters.
    """
    own = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in state["param_groups"]] != [group["params"] for group in own]:
        raise ValueError("the optimizer's parameters differ")
    optimizer.load_state_dict({**state, "param_groups": own})


def lr_factor(settings: Optimization, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate at a step, relative to `lr`: linear warm-up, then the schedule."""
    warmup = settings.warmup_epochs * steps_per_epoch
    total = settings.epochs * steps_per_epoch

    def factor(global_step: int) -> float:
        if global_step < warmup:
            return (global_step + 1) / warmup
        if settings.schedule == "cosine":
            return (1 + math.cos(math.pi * (global_step - warmup) / max(total - warmup, 1))) / 2
        if settings.schedule == "step":
            passed = sum(global_step >= epoch * steps_per_epoch for epoch in settings.milestones)
            return (1.0, *settings.factors)[passed]
        return 1.0

    return factor
