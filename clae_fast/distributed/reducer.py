"""Sums all gradients over the processes while the last backward pass of a step still runs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from clae_fast.distributed import World

# a parameter's place in a bucket starts at a multiple of so many bytes, as vector loads want it
_ALIGNMENT = 16


class GradientReducer:
    """Sums gradients over the processes, while the last backward pass of a step still runs.

    Gradients lie in flat buckets, from the last parameter to the first, which is about the order in
    which a backward pass completes them. Each `.grad` is a view of its bucket. A bucket is sent
    when the last backward pass has completed all of its gradients that it reaches. Other gradients,
    such as those of the adversarial BatchNorm, were completed by an earlier pass. The first step
    shows which ones the last pass reaches, so that step overlaps nothing. All processes send the
    buckets in the same order.

    The result is the sum, not the mean (`World.gather_loss` says why). Scaled gradients stay
    scaled. An infinity or a NaN of one process reaches all. One process alone only zeroes its
    gradients.

    Args:
        parameters: The parameters to reduce. Those that require no gradient are left out, and one
            that comes twice counts once.
        world: The processes, which all have the same parameters in the same order.
        bucket_bytes: How many bytes fill a bucket.

    Example:
        >>> reducer.zero_grad()
        >>> loss(z_p.detach(), encoder(x_q)).backward()
        >>> with reducer.last_backward():
        ...     z_p.backward(dz_p)
        >>> reducer.finish()
        >>> optimizer.step()
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], world: World, *, bucket_bytes: int = 25 << 20
    ) -> None:
        self._world = world
        self._parameters = [p for p in dict.fromkeys(parameters) if p.requires_grad]
        # the parameters that a backward pass has reached since the last zeroing
        self._reached: set[nn.Parameter] = set()
        self._buckets: list[_Bucket] = []
        # the bucket to send next
        self._next = 0
        self._overlaps = self._learned = False
        if world.size > 1:
            filled = _filled(self._parameters[::-1], bucket_bytes)
            self._buckets = [_Bucket(parameters) for parameters in filled]
            for parameter in self._parameters:
                parameter.register_post_accumulate_grad_hook(self._accumulated)
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.grads}
        self.zero_grad()

    def zero_grad(self) -> None:
        """Zeroes all gradients; call it instead of the optimizer's `zero_grad`."""
        for parameter in self._parameters:
            parameter.grad = None
        for bucket in self._buckets:
            bucket.flat.zero_()
            for parameter, grad in bucket.grads.items():
                parameter.grad = grad
        self._reached.clear()
        self._next = 0

    def last_backward(self) -> AbstractContextManager[None]:
        """A context for a step's last backward pass, during which complete buckets are sent."""
        return self._last_backward() if self._buckets else nullcontext()

    @contextmanager
    def _last_backward(self) -> Iterator[None]:
        for bucket in self._buckets:
            bucket.pending = set(bucket.expected)
        self._overlaps = True
        try:
            self._send_complete()
            yield
        finally:
            self._overlaps = False
        self._learned = True
        for bucket in self._buckets:
            bucket.pending.clear()
        self._send_complete()

    def _accumulated(self, parameter: nn.Parameter) -> None:
        """The hook that autograd calls whenever it has added to a gradient."""
        self._reached.add(parameter)
        if not self._overlaps:
            return
        bucket = self._bucket_of[parameter]
        if bucket.sent:
            raise RuntimeError(
                f"a gradient of shape {list(parameter.shape)} came after its bucket was sent: "
                "last_backward() must hold one backward pass, which reaches no other parameters "
                "than in the steps before"
            )
        bucket.expected.add(parameter)
        bucket.pending.discard(parameter)
        self._send_complete()

    def _send_complete(self) -> None:
        """Sends the next buckets, up to the first one that still waits for a gradient."""
        while self._learned and self._next < len(self._buckets):
            bucket = self._buckets[self._next]
            if bucket.pending:
                return
            bucket.send(self._world, self._reached)
            self._next += 1

    def finish(self) -> None:
        """Waits for the sums; then the optimizer may step, or the gradients be unscaled.

        What no backward pass has reached has no gradient (None), so that no optimizer moves it.

        Raises:
            LostWorkerError: Another process is gone.
            RuntimeError: There was no last backward pass.
        """
        if self._next < len(self._buckets):
            raise RuntimeError("finish() comes after the step's `with reducer.last_backward():`")
        for bucket in self._buckets:
            bucket.wait()
            for parameter in bucket.grads:
                if parameter not in self._reached:
                    parameter.grad = None


class _Bucket:
    """Gradients that travel together."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        first = parameters[0]
        offsets = [0]
        for p in parameters:
            offsets.append(offsets[-1] + _room(p))
        self.flat = torch.zeros(offsets[-1], dtype=first.dtype, device=first.device)
        self.grads = {
            p: self.flat.as_strided(p.shape, _strides(p), offset)
            for p, offset in zip(parameters, offsets[:-1], strict=True)
        }
        # those that last backward passes have reached so far, and those that this one has not yet
        self.expected: set[nn.Parameter] = set()
        self.pending: set[nn.Parameter] = set()
        self._wait: Callable[[], None] | None = None

    @property
    def sent(self) -> bool:
        return self._wait is not None

    def send(self, world: World, reached: set[nn.Parameter]) -> None:
        for parameter, grad in self.grads.items():
            if parameter in reached and parameter.grad is not grad:
                raise RuntimeError(
                    f"the gradient of a parameter of shape {list(parameter.shape)} is not in its "
                    "bucket: zero gradients by reducer.zero_grad()"
                )
        self._wait = world.start_all_reduce(self.flat)

    def wait(self) -> None:
        assert self._wait is not None
        self._wait()
        self._wait = None


def _filled(parameters: list[nn.Parameter], bucket_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype and device, as they come, as many as fill a bucket."""
    bucket: list[nn.Parameter] = []
    size = 0
    for p in parameters:
        alike = bucket and (p.dtype, p.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or size >= bucket_bytes):
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += _room(p) * p.element_size()
    if bucket:
        yield bucket


def _room(p: Tensor) -> int:
    """The elements that a parameter takes in a bucket."""
    unit = max(1, _ALIGNMENT // p.element_size())
    return -(-p.numel() // unit) * unit


def _strides(p: Tensor) -> tuple[int, ...]:
    """The parameter's own strides where it is dense, or else a row-major tensor's."""
    return torch.empty_like(p, device="meta").stride()
