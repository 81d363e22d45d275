"""The adversarial twin shares every tensor but BatchNorm's, whoever made the encoder."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clae_fast.nn import adversarial_twin


class Tokens(nn.Module):
    """A parameter and a buffer of its own beside a BatchNorm layer, as attention models have."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(3))
        self.register_buffer("index", torch.arange(3.0))
        self.norm = nn.BatchNorm1d(3)
        self.again = self.norm

    def forward(self, x):
        return self.norm(x + self.token + self.index)


def from_torchvision(name):
    return getattr(pytest.importorskip("torchvision.models"), name)(weights=None)


def from_timm(name):
    return pytest.importorskip("timm").create_model(name, num_classes=0)


ENCODERS = {
    "torchvision": lambda: from_torchvision("resnet50"),
    "timm": lambda: from_timm("resnet18"),
    "timm with fused activations": lambda: from_timm("efficientnet_b0"),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(
        from_torchvision("resnet18"), process_group=torch.Generator()
    ),
    "own tensors": Tokens,
}


@pytest.mark.parametrize("build", ENCODERS.values(), ids=ENCODERS.keys())
def test_shares_all_but_batchnorm(build):
    encoder = build()
    twin = adversarial_twin(encoder)
    assert type(twin) is type(encoder)
    assert twin is not encoder
    norms = {name for name, module in encoder.named_modules() if isinstance(module, _BatchNorm)}
    assert norms
    seen = 0
    for kind in ("named_parameters", "named_buffers"):
        mine, its = dict(getattr(encoder, kind)()), dict(getattr(twin, kind)())
        assert mine.keys() == its.keys()
        for name, tensor in mine.items():
            own = name.rpartition(".")[0] in norms
            assert (its[name] is tensor) != own, name
            assert torch.equal(its[name], tensor), name
            if own:
                assert its[name].data_ptr() != tensor.data_ptr(), name
            seen += own
    assert seen == 5 * len(norms)
    weights = {*encoder.parameters(), *twin.parameters()}
    assert len(weights) == len(list(encoder.parameters())) + 2 * len(norms)


def test_process_group_is_kept():
    encoder = ENCODERS["SyncBatchNorm"]()
    assert adversarial_twin(encoder).bn1.process_group is encoder.bn1.process_group


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_statistics_and_affine_are_apart(name):
    encoder = ENCODERS[name]()
    twin = adversarial_twin(encoder)
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(twin(x), encoder(x))
    assert twin.bn1.num_batches_tracked == 1
    before = copy.deepcopy(encoder.state_dict())
    twin(2 * x).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert encoder.bn1.weight.grad is None
    assert twin.bn1.weight.grad is not None
    assert encoder.conv1.weight.grad is not None  # one weight, one gradient
    assert twin.conv1.weight.grad is encoder.conv1.weight.grad


def test_sharing_outlives_a_change_of_dtype_and_a_copy():
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    pair = copy.deepcopy(nn.ModuleList([encoder, adversarial_twin(encoder)]).double())
    assert pair[0][0].weight is pair[1][0].weight
    assert pair[0][1].weight is not pair[1][1].weight
    assert len(list(pair.parameters())) == 2 + 2 * 2


def test_momentum():
    encoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3))
    assert adversarial_twin(encoder)[1].momentum == 0.01
    assert adversarial_twin(encoder, momentum=0.5)[1].momentum == 0.5
    assert encoder[1].momentum == 0.3


def test_tied_batchnorm_stays_tied():
    twin = adversarial_twin(Tokens())
    assert twin.norm is twin.again


def test_an_encoder_without_batchnorm_shares_everything():
    encoder = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    twin = adversarial_twin(encoder)
    for mine, its in zip(encoder.parameters(), twin.parameters(), strict=True):
        assert mine is its


def test_keeps_the_mode():
    encoder = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3).eval())
    twin = adversarial_twin(encoder)
    assert twin[0].training
    assert not twin[1].training
    twin.eval()
    assert encoder[0].training


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"encoder must be a torch\.nn\.Module, got function"):
        adversarial_twin(test_bad_arguments)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\], got 1\.5"):
        adversarial_twin(nn.Linear(1, 1), momentum=1.5)
