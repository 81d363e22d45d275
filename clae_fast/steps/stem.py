"""The convolution that alone sees the attacked view: where the attack's backward pass may end.

The attack takes the sign of the view's gradient. Where the view feeds one convolution and nothing
else, the gradient at that convolution's output decides it, and `clae_fast.stem_step` makes the
adversarial view of it in one kernel: the convolution's input gradient, as large as the view and
slow for 3 channels, is never stored, nor is that of a Normalize in front.

Whether it is so is read off the autograd graph of every forward pass. Nothing is remembered and
nothing in the encoder replaced, so an encoder that changes is seen to have changed.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from clae_fast.nn.normalize import Normalize
from clae_fast.ops.stem_step import has_kernel, kernel_takes

# of each node of a graph, with its position among their inputs
_Consumers = dict[Any, list[tuple[Any, int]]]
# names of nodes: a leaf, a cast such as autocast's
_LEAF = "torch::autograd::AccumulateGrad"
_CAST = "ToCopyBackward0"


class Stem(NamedTuple):
    """The convolution.

    Attributes:
        node: Its node in the graph, whose backward function gets the gradient at its output.
        convolution: Its weight, stride and padding, as `stem_step` names them.
        trained: Whether a backward pass to the leaves reaches it, since its weight is one.
        leaves: Every leaf below the output but for the view: where a backward pass goes that leaves
            the view's gradient out.
    """

    node: Any
    convolution: dict[str, Any]
    trained: bool
    leaves: list[Tensor]


def forward(
    encoder: nn.Module,
    view: Tensor,  # [N, C, H, W], no leaf
    impl: str,
) -> tuple[Tensor, Callable[[], Stem | None]]:
    """Encodes the view.

    Args:
        encoder: The encoder.
        view: The view, which wants a gradient.
        impl: Implementation of `stem_step`.

    Returns:
        The encoder's output, and a function to call before the backward pass, that returns the
        stem, or None where that pass is needed to its end.
    """
    if not has_kernel(impl, view.device):
        return encoder(view), lambda: None
    image = view

    def follow(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal image
        # std is positive: the gradients on both sides of it have the same signs
        if args and args[0] is image and output.shape == image.shape:
            image = output

    hooks = [
        module.register_forward_hook(follow)
        for module in _eager(encoder)
        if type(module) is Normalize
    ]
    try:
        z = encoder(view)
    finally:
        for hook in hooks:
            hook.remove()
    return z, lambda: _find(z, view, image)


def _eager(module: nn.Module) -> Iterator[nn.Module]:
    """What is not compiled: what is would be compiled anew for every hook."""
    if module._compiled_call_impl is None and type(module).__name__ != "OptimizedModule":
        yield module
        for child in module.children():
            yield from _eager(child)


def _find(output: Tensor, view: Tensor, image: Tensor) -> Stem | None:
    """The stem between `output` and `image`, which is what Normalize makes of `view`."""
    graph = _graph(output.grad_fn, view.grad_fn)
    if graph is None or any(t._backward_hooks or t.retains_grad for t in (view, image)):
        return None
    consumers, leaves = graph
    node: Any = view.grad_fn
    position = 0
    while node is not None and node is not image.grad_fn:
        node, _ = _consumer(consumers, node)
    while node is not None and (node is image.grad_fn or node.name() == _CAST):
        node, position = _consumer(consumers, node)
    if node is None or node.name() != "ConvolutionBackward0" or position != 0:
        return None
    (y,) = node._input_metadata
    stride, *strides = node._saved_stride
    padding, *paddings = node._saved_padding
    if (
        y.device != view.device
        or node._saved_transposed
        or node._saved_groups != 1
        or (node._saved_dilation, strides, paddings) != ((1, 1), [stride], [padding])
    ):
        return None
    source, _ = node.next_functions[1]
    weight = node._saved_weight.detach() if source is None else _leaf(source)
    if weight is None or not kernel_takes(y.dtype, weight, view, stride, padding):
        return None
    convolution = {"weight": weight, "stride": stride, "padding": padding}
    return Stem(node, convolution, source is not None, leaves)


def _graph(root: Any, end: Any) -> tuple[_Consumers, list[Tensor]] | None:
    """The consumers of every node between `root` and `end`, and the leaves.

    None with a reentrant checkpoint, which takes no backward pass to some of the leaves.
    """
    if root is None:
        return None
    consumers: _Consumers = {root: []}
    leaves: list[Tensor] = []
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node is end:
            continue
        inputs = [(i, at) for i, (at, _) in enumerate(node.next_functions) if at is not None]
        if node.name() == _LEAF:
            leaves.append(node.variable)
        if node.name() == "CheckpointFunctionBackward":
            return None
        for position, at in inputs:
            if at not in consumers:
                consumers[at] = []
                waiting.append(at)
            consumers[at].append((node, position))
    return consumers, leaves


def _consumer(consumers: _Consumers, node: Any) -> tuple[Any, int]:
    """The one consumer of a node and the node's position there; (None, 0) where there are more."""
    found = consumers.get(node, [])
    return found[0] if len(found) == 1 else (None, 0)


def _leaf(node: Any) -> Tensor | None:
    """The leaf that a node is, or casts."""
    if node.name() == _CAST:
        node = node.next_functions[0][0]
    return node.variable if node.name() == _LEAF else None
