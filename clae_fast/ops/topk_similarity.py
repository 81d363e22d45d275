"""The keys nearest to each anchor, without a matrix of similarities."""

from __future__ import annotations

import torch
from torch import Tensor

from clae_fast import _check, _impl, _native
from clae_fast.ops._rows import row_blocks, unit_rows
from clae_fast.reference.topk_similarity import topk_similarity as reference

_impl.declare("topk_similarity", native=_impl.ANY, torch=_impl.ANY)
# a key's index and its similarity share 64 bits
_MAX_KEYS = 2**32 - 1

torch.library.define(
    "clae_fast::topk_similarity",
    "(Tensor anchor, Tensor keys, SymInt k, Tensor? exclude, str impl)"
    " -> (Tensor values, Tensor indices)",
)


@torch.library.register_fake("clae_fast::topk_similarity")
def _topk_similarity_fake(
    anchor: Tensor, keys: Tensor, k: int, *_: object
) -> tuple[Tensor, Tensor]:
    values = anchor.new_empty((anchor.shape[0], k), dtype=torch.float32)
    return values, torch.empty_like(values, dtype=torch.int64)


@torch.library.impl("clae_fast::topk_similarity", ("cpu", "cuda"))
def _topk_similarity_impl(
    anchor: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    k: int,
    exclude: Tensor | None,  # [N, E]
    impl: str,
) -> tuple[Tensor, Tensor]:
    _check.in_columns("exclude", exclude, len(keys))
    values, indices = _topk_similarity_fake(anchor, keys, k)
    if impl == "native":
        (exclude,) = _native.in_one_piece(exclude)
        given = (_native.Rows(anchor), _native.Rows(keys), exclude)
        sizes = (len(anchor), *keys.shape, 0 if exclude is None else exclude.shape[1], k)
        _native.run("topk_similarity", *given, *sizes, torch.get_num_threads(), values, indices)
        return values, indices
    with torch.autocast(anchor.device.type, enabled=False):
        u, v = unit_rows(anchor)[0], unit_rows(keys)[0]
        N, M = len(u), len(v)
        column = torch.arange(M, device=u.device)
        for start, stop in row_blocks(N, M):
            rows = slice(start, stop)
            s = u[rows] @ v.T
            if exclude is not None:
                s.scatter_(1, exclude[rows], -torch.inf)
            ranks = _ranks(s).sub_(column)
            best = ranks.topk(k, dim=1).values
            indices[rows] = -best & _MAX_KEYS
            values[rows] = s.gather(1, indices[rows])
        return values, indices


def _ranks(s: Tensor) -> Tensor:
    """Integers in the order of the similarities, NaN above all, with 32 bits free below them."""
    # no similarity is infinite; adding 0 turns -0 into 0
    bits = s.nan_to_num(nan=torch.inf, neginf=-torch.inf).add_(0).view(torch.int32)
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).long() << 32


_topk_similarity = torch.ops.clae_fast.topk_similarity.default


def topk_similarity(
    anchor: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    k: int,
    *,
    exclude: Tensor | None = None,  # [N, E]
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""The k largest cosine similarities of each anchor among the keys, and where they are.

    .. math:: s_{ij} = \frac{a_i \cdot k_j}{\|a_i\| \|k_j\|}

    The largest come first, and of equal ones the lower index: the order is total, and does not
    depend on the number of threads. Rows are normalized inside, as F.normalize with eps=1e-12
    does; nothing of N x M elements is stored. Not differentiable: gather the keys with the indices
    and take their similarities to differentiate.

    It finds hard negatives in a queue or a batch, positives in a bank, and the nearest neighbors
    that vote for a label.

    Args:
        anchor: Rows that look for keys, [N, D], fp32, fp16, bf16 or fp64; not normalized.
        keys: Rows to choose from, [M, D] with M < 2^32.
        k: How many to return of each row, from 1 to M - E.
        exclude: int64 [N, E], columns that a row must not return, such as its own or its
            positive's. Repeated ones count once. E is meant to be small.
        impl: "auto", "reference", "native" or "torch".

    Returns:
        The similarities, [N, k] of fp32, of fp64 for fp64, and the indices of their keys, int64
        [N, k]. NaN, which a NaN in either row makes, counts as larger than any number.

    Raises:
        TypeError: An argument of the wrong type, operands of different dtypes, or an `exclude` that
            is not int64.
        ValueError: Shapes other than [N, D] and [M, D] with N, M, D >= 1, a `k` out of range, an
            `exclude` of another shape or with columns that do not exist.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> anchor, queue = torch.randn(256, 128), torch.randn(65536, 128)
        >>> similarity, index = clae_fast.topk_similarity(anchor, queue, 64)
    """
    _check.projections("anchor", anchor)
    _check.projections("keys", keys)
    _check.same_place("keys", keys, "anchor", anchor)
    M = keys.shape[0]
    if keys.shape[1] != anchor.shape[1] or M > _MAX_KEYS:
        raise ValueError(
            "keys must have shape [M, D] with M < 2^32 where anchor has [N, D], "
            f"got {list(keys.shape)} for {list(anchor.shape)}"
        )
    excluded = 0
    if exclude is not None:
        _check.columns("exclude", exclude, anchor, "[N, E]")
        excluded = exclude.shape[1]
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if not 1 <= k <= M - excluded:
        raise ValueError(
            f"k must be from 1 to {M - excluded}, the number of keys that a row may return, got {k}"
        )
    impl = _impl.resolve("topk_similarity", impl, anchor, keys)
    if impl == "reference":
        _check.in_columns("exclude", exclude, len(keys))
        return reference(anchor, keys, k, exclude=exclude)
    return _topk_similarity(anchor.detach(), keys.detach(), k, exclude, impl)
