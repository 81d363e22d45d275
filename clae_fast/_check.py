"""Checks of public arguments: a TypeError or ValueError that names the argument and what came."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))


def tensor(name: str, value: Tensor) -> None:
    """Raises unless `value` is a tensor of fp16, bf16, fp32 or fp64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in _DTYPES:
        raise TypeError(f"{name} must be of dtype fp16, bf16, fp32 or fp64, got {value.dtype}")


def projections(name: str, z: Tensor) -> None:
    """Raises unless `z` is a floating [N, D] with neither of them 0."""
    tensor(name, z)
    if z.ndim != 2 or 0 in z.shape:
        raise ValueError(f"{name} must have shape [N, D] with N, D >= 1, got {list(z.shape)}")


def like(name: str, value: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """Raises unless `value` has the shape, the device and, where asked, the dtype of `other`."""
    tensor(name, value)
    if value.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {list(other.shape)}, "
            f"got {list(value.shape)}"
        )
    same_place(name, value, other_name, other, dtype=dtype)


def same_place(
    name: str, value: Tensor, other_name: str, other: Tensor, *, dtype: bool = True
) -> None:
    """Raises unless `value` has the device and, where asked, the dtype of `other`."""
    if dtype and value.dtype != other.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other_name}, {other.dtype}, got {value.dtype}"
        )
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {value.device}"
        )


def of_dtype(name: str, value: Tensor, dtype: torch.dtype) -> None:
    """Raises unless `value` is a tensor of this dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype != dtype:
        wanted = str(dtype).removeprefix("torch.")
        raise TypeError(f"{name} must be of dtype {wanted}, got {value.dtype}")


def shape(name: str, value: Tensor, *sizes: int | str) -> None:
    """Raises unless `value` has the shape of these sizes; a letter stands for any size."""
    pairs = zip(sizes, value.shape, strict=False)
    if len(sizes) != value.ndim or not all(isinstance(n, str) or n == size for n, size in pairs):
        wanted = ", ".join(map(str, sizes))
        raise ValueError(f"{name} must have shape [{wanted}], got {list(value.shape)}")


def columns(name: str, value: Tensor, anchor: Tensor, wanted: str = "[N]") -> None:
    """Raises unless `value` can hold columns for the rows of `anchor`: int64, [N] or [N, E]."""
    of_dtype(name, value, torch.int64)
    if value.ndim != 1 + wanted.count(",") or len(value) != len(anchor):
        raise ValueError(
            f"{name} must have shape {wanted} with N = {len(anchor)} as anchor has, "
            f"got {list(value.shape)}"
        )
    same_place(name, value, "anchor", anchor, dtype=False)


def in_columns(name: str, value: Tensor | None, M: int) -> None:
    """Raises unless all of `value` are from 0 to M - 1.

    An op calls it from inside, so that compiled and exported graphs keep the check.
    """
    if value is None:
        return
    # looking would wait for a GPU or break a graph, and the tensors of a dry run have no values
    known = value.device.type == "cpu" and not isinstance(value, FakeTensor)
    if known and value.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in value.aminmax())
        if low < 0 or high >= M:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} must hold columns from 0 to {M - 1}, got {wrong}")


def labels(value: Tensor, z: Tensor) -> None:
    """Raises unless `value` has an int64 for each row of `z`, on its device."""
    of_dtype("labels", value, torch.int64)
    shape("labels", value, len(z))
    same_place("labels", value, "z", z, dtype=False)


def flag(name: str, value: bool) -> None:
    """Raises unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def temperature(value: float) -> None:
    """Raises unless `value` is a finite number above 0."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"temperature must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {value}")


def in_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises unless `value` is a finite number from `low` on and below `high`."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value < high:
        raise ValueError(f"{name} must be in [{low}, {high}), got {value}")


def integer(name: str, value: int, low: int, high: int | None = None) -> None:
    """Raises unless `value` is an integer from `low` to `high`, if there is one."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {bounds}, got {value}")


def per_channel(name: str, value: object, x: Tensor, *, minimum: float = -math.inf) -> None:
    """Raises unless `value` is a number, or a list, tuple or tensor of one for each channel."""
    shape: list[int] | None = None
    numbers: list[float] | tuple[float, ...] = ()
    if isinstance(value, (int, float)):
        numbers = (value,)
    elif isinstance(value, (list, tuple)):
        shape, numbers = [len(value)], value
    elif isinstance(value, Tensor):
        shape = list(value.shape)
    else:
        raise TypeError(
            f"{name} must be a number, a list or tuple of numbers or a tensor, "
            f"got {type(value).__name__}"
        )
    if shape is not None and (x.ndim < 2 or shape != [x.shape[1]]):
        raise ValueError(
            f"{name} must be a number or one for each channel in dimension 1 of x, of shape "
            f"{list(x.shape)}, got shape {shape}"
        )
    for number in numbers:
        if not number >= minimum:
            raise ValueError(f"{name} must be a number >= {minimum}, got {value}")
