"""BatchNorm by groups of a batch: exactly what a pass for each group does."""

import copy

import pytest
import torch
from norm_cases import encoder, views
from step_cases import norm_buffers
from torch import Tensor, nn

from clae_fast.nn import adversarial_twin
from clae_fast.nn.grouped_norm import grouped_norm

NORMS = {
    "torch's": lambda: nn.BatchNorm2d(4),
    "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "no running statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "not affine": lambda: nn.BatchNorm2d(4, affine=False),
    "in eval mode": lambda: nn.BatchNorm2d(4).eval(),
    "timm's with an activation": lambda: pytest.importorskip("timm.layers").BatchNormAct2d(4),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("groups", [2, 3])
def test_equals_a_pass_for_each_group(norm, groups):
    module, x = encoder(NORMS[norm]()), views(groups)
    one_by_one = copy.deepcopy(module)
    kinds = [type(layer) for layer in module.modules()]
    with grouped_norm(module, groups):
        z = module(torch.cat(x))
    expected = torch.cat([one_by_one(view) for view in x])
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-14)
    assert [type(layer) for layer in module.modules()] == kinds
    for output in (z, expected):
        output.pow(3).sum().backward()
    for weight, reference in zip(module.parameters(), one_by_one.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, reference.grad, rtol=1e-12, atol=1e-12)
    for name, buffer in norm_buffers(one_by_one).items():
        torch.testing.assert_close(norm_buffers(module)[name], buffer, rtol=1e-12, atol=0)
    if norm == "torch's":
        assert not torch.allclose(module(torch.cat(x)), expected)


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("groups", [2, 3])
def test_parts_of_one_batch_move_running_statistics_once(groups, momentum):
    module, x = encoder(nn.BatchNorm2d(4, momentum=momentum)), views(groups)
    nn.init.normal_(module[1].running_mean)
    before = copy.deepcopy(module)
    with grouped_norm(module, groups, split=True):
        z = module(torch.cat(x))
    assert module[1].momentum == momentum
    one_by_one = [copy.deepcopy(before) for _ in x]
    expected = torch.cat([one(view) for one, view in zip(one_by_one, x, strict=True)])
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-14)
    for name, buffer in norm_buffers(module).items():
        if not name.endswith("num_batches_tracked"):
            mean = torch.stack([norm_buffers(one)[name] for one in one_by_one]).mean(0)
            torch.testing.assert_close(buffer, mean, rtol=1e-12, atol=1e-14)


def test_the_momentum_comes_back_after_an_error():
    module = encoder(nn.BatchNorm2d(4))
    # BatchNorm1d has no statistics of a single row
    with (
        pytest.raises(ValueError, match="more than 1 value per channel"),
        grouped_norm(module, 5, split=True),
    ):
        module(views(1)[0])
    assert module[1].momentum == module[-1].momentum == 0.1


def test_the_class_comes_back_after_an_error():
    module = encoder(nn.BatchNorm2d(4))
    with pytest.raises(KeyError), grouped_norm(module, 2):
        raise KeyError
    assert type(module[1]) is nn.BatchNorm2d
    assert type(module[-1]) is nn.BatchNorm1d


def test_the_twin_is_its_own():
    module, (x,) = encoder(nn.BatchNorm2d(4)), views(1)
    twin = adversarial_twin(module)
    before = norm_buffers(twin)
    with grouped_norm(module, 2):
        assert type(twin[1]) is nn.BatchNorm2d
        module(torch.cat((x, x)))
    for name, buffer in norm_buffers(twin).items():
        assert torch.equal(buffer, before[name])


def test_keeps_channels_last():
    module = nn.BatchNorm2d(4).to(memory_format=torch.channels_last)
    x = torch.rand(6, 4, 5, 5).to(memory_format=torch.channels_last)
    with grouped_norm(module, 2):
        assert module(x).is_contiguous(memory_format=torch.channels_last)


class Body(nn.Sequential):
    """Torch 2.11 compiles what is not torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiles_into_one_graph_for_each_number_of_groups():
    torch.compiler.reset()
    module = Body(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    eager = copy.deepcopy(module)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    module.compile(backend=backend, fullgraph=True, dynamic=False)
    x = torch.cat(views(2))
    for _ in range(2):
        for groups in (1, 2):
            with (
                grouped_norm(module, groups, split=groups == 2),
                grouped_norm(eager, groups, split=groups == 2),
            ):
                torch.testing.assert_close(module(x), eager(x), rtol=1e-12, atol=1e-14)
    assert len(graphs) == 2
    for graph in graphs:
        assert "conv2d" in graph.code
    for name, buffer in norm_buffers(eager).items():
        torch.testing.assert_close(norm_buffers(module)[name], buffer, rtol=1e-12, atol=0)
