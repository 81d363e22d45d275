"""The device that a run computes on, and how a batch gets there."""

import torch
from torch import Tensor


def pick_device(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        ValueError: There is no such device on this machine, or the name is none of a device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda, cuda:N or auto, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda, cuda:N or auto, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but torch sees {torch.cuda.device_count()} GPUs")
    return device


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Moves a batch, [N, C, H, W], to `device`, in channels_last like the weights."""
    return x.to(device, non_blocking=True, memory_format=torch.channels_last)
