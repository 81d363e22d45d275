"""What every op refuses: an argument, its value, the error, and how its message begins or reads."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator

import pytest
import stem_cases
import torch
from torch import Tensor

import clae_fast

ONES = torch.ones(4, 3)
INDEX = torch.zeros(4, dtype=torch.int64)
VIEWS = {"z0": ONES, "z1": ONES}
LABELLED = {"z": ONES, "labels": torch.arange(4)}

# arguments that are right
RIGHT = {
    "nt_xent": VIEWS,
    "tied_nt_xent": {"z": ONES},
    "info_nce": {"anchor": torch.ones(4, 2), "keys": torch.ones(5, 2)},
    "uel": VIEWS,
    "hard_nt_xent": {**VIEWS, "extra": torch.ones(8, 2)},
    "sup_con": LABELLED,
    "h_scl": LABELLED,
    "bank_step": {
        "bank": torch.ones(6, 3),
        "velocity": torch.ones(6, 3),
        "anchor": ONES,
        "positive": INDEX,
        "lr": 0.1,
    },
    "topk_similarity": {"anchor": ONES, "keys": torch.ones(6, 3), "k": 2},
    "linf_step": {"x": torch.ones(2, 3), "grad": torch.ones(2, 3), "alpha": 0.1},
    "stem_step": {
        **dict(zip(("dy", "weight", "x"), stem_cases.operands(3, (2, 4, 4)), strict=True)),
        **stem_cases.STEMS[3],
        **stem_cases.RANGE,
    },
}
# what one op alone refuses
OWN = {
    "nt_xent": [
        ({"z0": torch.ones(4)}, ValueError, r"z0 must have shape \[N, D\].*got \[4\]"),
        ({"z1": torch.ones(5, 3)}, ValueError, r"z1 must have the shape of z0, \[4, 3\], got"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    ],
    "info_nce": [
        ({"keys": torch.ones(3, 2)}, ValueError, r"keys must have shape \[M, D\] with M >= N"),
        (
            {"keys": torch.ones(4, 3)},
            ValueError,
            r"keys must have shape \[M, D\] .*got \[4, 3\] for \[4, 2\]",
        ),
        ({"symmetric": True}, ValueError, r"keys must have the shape of anchor, \[4, 2\], where"),
        ({"symmetric": "yes"}, TypeError, "symmetric must be True or False, got str"),
        ({"positive": [0, 0, 0, 0]}, TypeError, "positive must be a torch.Tensor, got list"),
        ({"positive": INDEX.int()}, TypeError, "positive must be of dtype int64, got torch.int32"),
        ({"positive": INDEX[:2]}, ValueError, r"positive must have shape .* N = 4 .* got \[2\]"),
        ({"positive": INDEX.to("meta")}, ValueError, "positive must be on the device of anchor"),
        ({"positive": INDEX + 5}, ValueError, "positive must hold columns from 0 to 4, got 5"),
        ({"positive": INDEX - 1}, ValueError, "positive must hold columns from 0 to 4, got -1"),
        (
            {"positive": INDEX, "keys": torch.ones(4, 2), "symmetric": True},
            ValueError,
            "positive must be None where symmetric",
        ),
        ({"reduction": "sum"}, ValueError, "reduction must be 'mean' or 'none', got 'sum'"),
    ],
    "hard_nt_xent": [
        ({"beta": -1}, ValueError, r"beta must be in \[0, "),
        ({"beta": math.inf}, ValueError, r"beta must be in \[0, "),
        ({"beta": "1"}, TypeError, "beta must be a number, got str"),
        ({"tau_plus": 1.0}, ValueError, r"tau_plus must be in \[0, "),
        ({"tau_plus": -0.1}, ValueError, r"tau_plus must be in \[0, "),
        ({"detach_weights": 1}, TypeError, "detach_weights must be True or False"),
        ({"z1": torch.ones(4, 2)}, ValueError, "z1 must have the shape of z0"),
        ({"extra": torch.ones(4, 2)}, ValueError, r"extra must have shape \[8, k\].*got \[4, 2\]"),
        ({"impl": "native"}, ValueError, "impl='native' does not take extra logits"),
    ],
    "sup_con": [
        ({"labels": INDEX[:, None]}, ValueError, r"labels must have shape \[4\], got \[4, 1\]"),
        ({"detach_columns": 0}, TypeError, "detach_columns must be True or False"),
    ],
    "h_scl": [
        ({"labels": INDEX[:3]}, ValueError, r"labels must have shape \[4\], got \[3\]"),
        ({"beta": -2}, ValueError, r"beta must be in \[0, inf\), got -2"),
        ({"detach_weights": 0}, TypeError, "detach_weights must be True or False"),
    ],
    "bank_step": [
        ({"bank": torch.ones(6)}, ValueError, r"bank must have shape .* got \[6\]"),
        ({"bank": torch.ones(6, 3).half()}, TypeError, "bank must be of dtype fp32 or fp64"),
        ({"bank": torch.ones(3, 6).T}, ValueError, "bank must be contiguous, got strides"),
        ({"velocity": torch.ones(5, 3)}, ValueError, "velocity must have the shape of bank"),
        ({"velocity": torch.ones(3, 6).T}, ValueError, "velocity must be contiguous"),
        ({"anchor": torch.ones(4, 2)}, ValueError, r"anchor must have shape \[N, 3\] as bank has"),
        ({"positive": None}, ValueError, "one of keys and positive must be given, not both"),
        ({"keys": ONES}, ValueError, "one of keys and positive must be given"),
        (
            {"positive": None, "keys": torch.ones(5, 3)},
            ValueError,
            "keys must have the shape of anchor",
        ),
        ({"positive": INDEX + 6}, ValueError, "positive must hold columns from 0 to 5, got 6"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \[4\], got \[3\]"),
        ({"losses": INDEX}, TypeError, "losses must be of dtype"),
        ({"views": 3}, ValueError, "views must divide 4 anchors, got 3"),
        ({"views": 1.0}, TypeError, "views must be an int, got float"),
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -1}, ValueError, r"weight_decay must be in \[0, inf\), got -1"),
        ({"lr": torch.ones(1)}, ValueError, r"lr must have shape \[\], got \[1\]"),
    ],
    "topk_similarity": [
        ({"keys": torch.ones(0, 3)}, ValueError, r"keys must have shape .* got \[0, 3\]"),
        ({"keys": torch.ones(6, 2)}, ValueError, r"keys must .* got \[6, 2\] for \[4, 3\]"),
        ({"keys": torch.ones(1, 3).expand(2**32, 3)}, ValueError, r"keys must .* M < 2\^32"),
        ({"k": 0}, ValueError, "k must be from 1 to 6, .* got 0"),
        ({"k": 7}, ValueError, "k must be from 1 to 6, .* got 7"),
        ({"k": 5, "exclude": INDEX.view(4, 1).expand(4, 2)}, ValueError, "k must be from 1 to 4"),
        ({"k": 2.0}, TypeError, "k must be an int, got float"),
        ({"k": True}, TypeError, "k must be an int, got bool"),
        ({"exclude": [0]}, TypeError, "exclude must be a torch.Tensor, got list"),
        ({"exclude": INDEX[:, None].int()}, TypeError, "exclude must be of dtype int64, got"),
        ({"exclude": INDEX[:2]}, ValueError, r"exclude must have shape .* N = 4 .* got \[2\]"),
        ({"exclude": INDEX[:3, None]}, ValueError, r"exclude must have shape .* got \[3, 1\]"),
        ({"exclude": INDEX[:, None].to("meta")}, ValueError, "exclude must be on the device of"),
        ({"exclude": INDEX[:, None] + 6}, ValueError, "exclude must hold columns from 0 to 5"),
        ({"exclude": INDEX[:, None] - 1}, ValueError, "exclude must .* from 0 to 5, got -1"),
    ],
    "linf_step": [
        ({"grad": torch.ones(2, 4)}, ValueError, "grad must have the shape of x"),
        ({"x0": torch.ones(2, 3).half()}, TypeError, "x0 must have the dtype of x"),
        ({"alpha": None}, TypeError, "alpha must be a number, a list"),
        ({"alpha": math.nan}, ValueError, "alpha must be a number"),
        ({"alpha": "0.1"}, TypeError, "alpha must be a number, a list"),
        ({"eps": -0.1}, ValueError, "eps must be a number >= 0.0, got -0.1"),
        ({"eps": [0.1, -0.1, 0.1]}, ValueError, "eps must be a number >= 0.0"),
        ({"eps": [0.1, 0.1]}, ValueError, r"eps must be .* of shape \[2, 3\], got shape \[2\]"),
        ({"hi": torch.ones(())}, ValueError, r"hi must be .* got shape \[\]"),
        ({"lo": 1.0, "hi": 0.0}, ValueError, "lo must be at most hi, got 1.0 and 0.0"),
    ],
    "stem_step": [
        (
            {"x": torch.ones(2, 3, 4)},
            ValueError,
            r"x must have 4 dimensions, got shape \[2, 3, 4\]",
        ),
        ({"x": torch.ones(2, 4, 4, 4)}, ValueError, "weight must have the 4 channels of x"),
        (
            {"x": torch.ones(2, 3, 5, 4)},
            ValueError,
            r"dy must have .* \[2, 64, 5, 4\], got \[2, 64",
        ),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        ({"stride": (1, 1)}, TypeError, "stride must be an integer, got tuple"),
        ({"eps": -0.1}, ValueError, r"eps must be a number >= 0.0, got -0.1"),
        ({"lo": 2.0}, ValueError, "lo must be at most hi"),
    ],
}
# whose dtype is free
_ANY_DTYPE = {"anchor of bank_step", "grad of linf_step", "dy of stem_step", "weight of stem_step"}
_ANY_DTYPE |= {"extra of hard_nt_xent"}


def _of_all_ops(op: str) -> Iterator[tuple[dict[str, object], type[Exception], str]]:
    """What is refused of every tensor, of the temperature and of flags, where an op has them."""
    tensors = {name: value for name, value in RIGHT[op].items() if isinstance(value, Tensor)}
    # the others must be where this one is
    first = "x" if "x" in tensors else next(iter(tensors))
    for name, value in tensors.items():
        other_dtype = torch.int32 if value.dtype == torch.int64 else torch.int64
        yield {name: value.to(other_dtype)}, TypeError, f"{name} must be of dtype"
        if name != first or op != "stem_step":
            yield {name: [1.0]}, TypeError, rf"{name} must be a torch\.Tensor, got list"
        if name != first or op != "linf_step":
            yield {name: value[0]}, ValueError, f"{name} must have"
        if name != first:
            yield {name: value.to("meta")}, ValueError, f"{name} must be on the device of"
            if value.is_floating_point() and f"{name} of {op}" not in _ANY_DTYPE:
                yield {name: value.half()}, TypeError, f"{name} must have the dtype of"
    arguments = inspect.signature(getattr(clae_fast, op)).parameters
    if "temperature" in arguments:
        for number in (0.0, -1, math.nan, math.inf):
            yield {"temperature": number}, ValueError, "temperature must be positive and finite"
        yield {"temperature": "0.5"}, TypeError, "temperature must be a number, got str"
    if "exact" in arguments:
        yield {"exact": 1}, TypeError, "exact must be True or False, got int"


def every_bad_input() -> list:
    """Parameters: an op, its arguments, the error's type, and a part of its message."""
    return [
        pytest.param(op, {**right, **change}, error, message, id=f"{op}-{'-'.join(change)}")
        for op, right in RIGHT.items()
        for change, error, message in (*_of_all_ops(op), *OWN.get(op, ()))
    ]
