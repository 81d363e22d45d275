"""Backbones by name, the stem by image size, and heads."""

import itertools
import sys

import pytest
import torch
from torch import nn

from clae_fast.nn import Encoder, ProjectionHead, build_encoder
from clae_fast.nn.resnet import narrow_resnet


@pytest.mark.parametrize(
    ("arch", "size", "features"),
    [
        ("resnet18", 32, 512),
        ("resnet34", 16, 512),
        ("resnet50", 32, 2048),
        ("resnet18", 96, 512),
        ("resnet-narrow", 16, 64),
        ("timm/resnet18", 64, 512),
        ("timm/mobilenetv3_small_050", 64, 1024),  # features behind a last linear layer
        ("timm/vit_tiny_patch16_224", 64, 192),  # the image size is in its shapes
    ],
)
def test_features(arch, size, features):
    backbone, dim = build_encoder(arch, size)
    assert dim == features
    with torch.no_grad():
        h = backbone(torch.rand(2, 3, size, size))
    assert h.shape == (2, features)
    assert h.isfinite().all()


@pytest.mark.parametrize("arch", ["resnet101", "resnet152"])
def test_deep_resnets(arch):
    with torch.device("meta"):
        backbone, features = build_encoder(arch, 224)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in backbone.modules())
    assert convolutions == int(arch.removeprefix("resnet")) - 1 + 4  # and four shortcuts
    assert features == 2048


@pytest.mark.parametrize(("size", "first_map"), [(32, 32), (64, 64), (65, 17), (224, 56)])
def test_stem_follows_the_image_size(size, first_map):
    with torch.device("meta"):
        backbone, _ = build_encoder("resnet18", size)
        maps = []
        backbone.layer1.register_forward_pre_hook(lambda module, args: maps.append(args[0].shape))
        backbone(torch.rand(2, 3, size, size))
    assert maps == [(2, 64, first_map, first_map)]


def test_narrow_resnet():
    network, features = narrow_resnet(width=8)
    assert features == 32
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == 9
    # for digits on two cores: well below a ResNet-18's eleven million weights
    assert sum(w.numel() for w in narrow_resnet()[0].parameters()) < 350_000


LINEAR, NORM, RELU = nn.Linear, nn.BatchNorm1d, nn.ReLU


@pytest.mark.parametrize(
    ("layers", "norm", "kinds"),
    [
        (0, "none", []),
        (1, "none", [LINEAR]),
        (1, "hidden", [LINEAR]),
        (2, "none", [LINEAR, RELU, LINEAR]),
        (2, "hidden", [LINEAR, NORM, RELU, LINEAR]),
        (2, "all", [LINEAR, NORM, RELU, LINEAR, NORM]),
        (3, "none", [LINEAR, RELU, LINEAR, RELU, LINEAR]),
        (3, "hidden", [LINEAR, NORM, RELU, LINEAR, NORM, RELU, LINEAR]),
        (3, "all", [LINEAR, NORM, RELU, LINEAR, NORM, RELU, LINEAR, NORM]),
    ],
)
def test_projection_head(layers, norm, kinds):
    head = ProjectionHead(5, 7, 3, layers=layers, norm=norm)
    assert [type(layer) for layer in head] == kinds
    x = torch.rand(4, 5)
    z = head(x)
    assert z.shape == ((4, 3) if layers else (4, 5))
    assert head.out_dim == z.shape[1]
    assert layers or z is x
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    dims = [(5, 3)] if layers == 1 else [(5, 7), (7, 7), (7, 3)][:: 1 if layers == 3 else 2]
    assert [(layer.in_features, layer.out_features) for layer in linear] == dims[:layers]
    # a bias in front of BatchNorm would have no effect
    for layer, after in itertools.pairwise([*head, None]):
        if isinstance(layer, nn.Linear):
            assert (layer.bias is None) == isinstance(after, nn.BatchNorm1d)
    if norm == "all":
        assert head[-1].bias is None
        torch.testing.assert_close(z.mean(0), torch.zeros(3), rtol=0, atol=1e-6)
        z.square().sum().backward()
        assert all(weight.grad is not None for weight in head.parameters())


def test_encoder_gives_raw_projections_of_its_features():
    backbone, dim = narrow_resnet(width=8)
    encoder = Encoder(backbone, ProjectionHead(dim, 16, 4)).eval()
    x = torch.rand(3, 3, 8, 8)
    assert torch.equal(encoder.features(x), backbone(x))
    assert torch.equal(encoder(x), encoder.head(backbone(x)))
    assert encoder.dim == 4
    assert set(encoder.state_dict()) == {
        *(f"backbone.{key}" for key in backbone.state_dict()),
        *(f"head.{key}" for key in encoder.head.state_dict()),
    }


def test_bad_names_and_sizes(monkeypatch):
    with pytest.raises(ValueError, match=r"arch must be resnet18, .*, got 'resnet19'"):
        build_encoder("resnet19", 32)
    with pytest.raises(ValueError, match="arch names a model that timm does not have: 'resnot'"):
        build_encoder("timm/resnot", 32)
    with pytest.raises(ValueError, match="image_size must be positive, got 0"):
        build_encoder("resnet18", 0)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RuntimeError, match=r"timm is not installed: pip install"):
        build_encoder("timm/resnet18", 32)
