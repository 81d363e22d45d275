"""The schedules on compiled encoders: the same results, and units as they are compiled."""

import copy
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from step_cases import WEIGHT, attack, encoders, method, norm_buffers, views
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from clae_fast.nn import Encoder, adversarial_twin
from clae_fast.nn.resnet import ConvNet
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions

pytestmark = [
    # dynamo looks at the gradients of what it gets
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


class Operations:
    """A backend that counts operations of convolutions and products as its graphs run."""

    def __init__(self) -> None:
        self.count = 0
        self.graphs = 0

    def __call__(self, graph, inputs):
        compile_graph = aot_autograd(
            fw_compiler=self._compile,
            bw_compiler=self._compile,
            inference_compiler=self._compile,
            partition_fn=min_cut_rematerialization_partition,
        )
        return compile_graph(graph, inputs)

    def _compile(self, graph, inputs):
        operations = sum(map(self._of, graph.graph.nodes))
        self.graphs += 1

        def run(*operands):
            self.count += operations
            return graph(*operands)

        return make_boxed_func(run)

    def _of(self, node) -> int:
        formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
        if formula is None:
            return 0

        def value(operand):
            return operand.meta["val"] if isinstance(operand, torch.fx.Node) else operand

        args, kwargs = tree_map(value, (node.args, node.kwargs))
        return formula(*args, **kwargs, out_val=node.meta["val"])

    def of(self, run) -> int:
        """Of one run; others come first and compile."""
        for _ in range(2):
            graphs, self.count = self.graphs, 0
            run()
        assert self.graphs == graphs  # nothing is compiled anew
        return self.count


def compiled(pair: nn.ModuleList, backend) -> nn.ModuleList:
    for encoder in pair:
        encoder.compile(backend=backend, dynamic=False)
    return pair


@pytest.fixture
def units():
    """Units of a step of SimCLR's."""
    operations = Operations()
    pair, x = compiled(encoders(torch.float32), operations), views(dtype=torch.float32)
    built = method("simclr", pair)
    with torch.no_grad():
        unit = operations.of(lambda: pair[0](x[0]))
    assert unit > 1e5

    def of(kind: str, **options) -> float:
        def step():
            built.step(Batch(x), StepOptions(kind=kind, **{"attack": attack()} | options))

        return operations.of(step) / unit

    return of


def test_units(units):
    assert units("none") == 6
    assert units("none", batched=True) == 6
    assert units("pair") == 9
    assert units("self") == 11
    assert units("released") > 11
    assert units("pair", adv_fraction=0.5, adv_replace=True) == 7


@pytest.mark.parametrize(("norm", "expected"), [("train", 13), ("eval", 15)])
def test_units_of_several_steps(units, norm, expected):
    assert units("pair", attack=replace(attack(), steps=3, norm=norm)) == expected


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("none", {}),
        ("none", {"batched": True}),
        ("pair", {}),
        ("pair", {"micro_batch": 3}),
        ("self", {}),
        ("self", {"adv_fraction": 0.5, "adv_replace": True}),
        ("pair", {"attack": replace(attack(), steps=2)}),
        ("self", {"attack": replace(attack(), steps=2, norm="eval")}),
    ],
)
def test_results(kind, options):
    x = views()
    pair = encoders()
    other = copy.deepcopy(pair)
    compiled(pair, "aot_eager")
    options = {"kind": kind, "attack": attack(), "adv_weight": WEIGHT, **options}
    # the second one has the variants of the first
    for _ in range(2):
        result = method("simclr", pair).step(Batch(x), StepOptions(**options))
        expected = method("simclr", other).step(Batch(x), StepOptions(**options))
        for given, reference in zip(result, expected, strict=True):
            torch.testing.assert_close(given, reference, rtol=1e-12, atol=0)
    for weight, reference in zip(pair.parameters(), other.parameters(), strict=True):
        if reference.grad is not None:
            torch.testing.assert_close(weight.grad, reference.grad, rtol=1e-9, atol=1e-12)
    for name, buffer in norm_buffers(other).items():
        torch.testing.assert_close(norm_buffers(pair)[name], buffer, rtol=1e-12, atol=1e-15)


def test_default_backend():
    layers = {
        "stem": nn.Conv2d(3, 8, 3, padding=1),
        "norm": nn.BatchNorm2d(8),
        "relu": nn.ReLU(),
        "conv": nn.Conv2d(8, 8, 3, stride=2),
        "flatten": nn.Flatten(),
    }
    encoder = Encoder(ConvNet(OrderedDict(layers)), nn.Linear(72, 8))
    pair, x = nn.ModuleList([encoder, adversarial_twin(encoder)]), views(dtype=torch.float32)
    other = copy.deepcopy(pair)
    compiled(pair, "inductor")
    options = {"kind": "self", "attack": attack()}
    result = method("simclr", pair).step(Batch(x), StepOptions(**options))
    expected = method("simclr", other).step(Batch(x), StepOptions(**options))
    torch.testing.assert_close(result.loss, expected.loss)
    # gradients of about zero may have either sign
    assert (result.x_adv == expected.x_adv).double().mean() > 0.99
    for weight, reference in zip(pair.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, reference.grad, rtol=1e-3, atol=1e-4)
