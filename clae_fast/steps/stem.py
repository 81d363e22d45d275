"""Finds the encoder's first convolution, where the attack's backward pass can end.

The attack needs the sign of the view's gradient. Where the view goes into one convolution and
nowhere else, `clae_fast.stem_step` computes the adversarial view from the gradient at that
convolution's output, in one kernel. The gradient of the view itself is never stored, and neither is
the one before a Normalize layer. Both are as large as the view, and a convolution's input gradient
is slow to compute for 3 channels.

Each forward pass is inspected anew, by its autograd graph. Nothing is cached and nothing in the
encoder is replaced, so a changed encoder cannot lead to a wrong result.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from clae_fast.nn.normalize import Normalize
from clae_fast.ops.stem_step import has_kernel, kernel_takes

# for each node, the nodes that take its output, and at which position
_Consumers = dict[Any, list[tuple[Any, int]]]
# autograd's names for a leaf, and for a cast such as autocast's
_LEAF = "torch::autograd::AccumulateGrad"
_CAST = "ToCopyBackward0"


class Stem(NamedTuple):
    """The first convolution of an encoder, as one forward pass used it.

    Attributes:
        node: The convolution's node in the autograd graph.
        convolution: The arguments `weight`, `stride` and `padding` of `stem_step`.
        trained: Whether the weight is a leaf, so that a backward pass to the leaves reaches `node`.
        leaves: All leaves of the graph except the view. A backward pass to these computes no
            gradient of the view.
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
    """Encodes the view and keeps what is needed to find the stem.

    Args:
        encoder: The encoder.
        view: The view, which requires a gradient.
        impl: Implementation of `stem_step`.

    Returns:
        The encoder's output, and a function to call before the backward pass. It returns the stem,
        or None where the backward pass has to go all the way to the view.
    """
    if not has_kernel(impl, view.device):
        return encoder(view), lambda: None
    image = view

    def follow(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal image
        # Normalize divides by a positive std, which changes no sign of a gradient
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
    """The submodules that are not compiled. A hook on a compiled one would compile it once more."""
    if module._compiled_call_impl is None and type(module).__name__ != "OptimizedModule":
        yield module
        for child in module.children():
            yield from _eager(child)


def _find(output: Tensor, view: Tensor, image: Tensor) -> Stem | None:
    """The stem between `image`, which is the view after Normalize, and `output`."""
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

    None for a graph with a reentrant checkpoint, in which a backward pass cannot be told its
    leaves.
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
    """The only consumer of a node and the node's position there; (None, 0) without just one."""
    found = consumers.get(node, [])
    return found[0] if len(found) == 1 else (None, 0)


def _leaf(node: Any) -> Tensor | None:
    """The leaf that a node stands for, perhaps behind a cast."""
    if node.name() == _CAST:
        node = node.next_functions[0][0]
    return node.variable if node.name() == _LEAF else None
