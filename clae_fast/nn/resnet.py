"""ResNets made of torchvision's parts, with a stem that fits the size of the images."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

# up to this size, in pixels, the ImageNet stem with its stride of 4 would leave too little
SMALL_IMAGE = 64


class ConvNet(nn.Sequential):
    """A sequence of layers that begins with a convolution.

    The attack's backward pass ends at this convolution (`clae_fast.steps.stem`). So it stays eager
    where the rest, the body, is compiled.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, features]."""
        return self.body(self[0](x))

    def body(self, y: Tensor) -> Tensor:
        """Applies all layers but the first."""
        for layer in list(self)[1:]:
            y = layer(y)
        return y

    def compile(self, **options: Any) -> None:
        """Compiles the body, with these options of `torch.compile`."""
        self.body = torch.compile(self.body, **options)  # type: ignore[method-assign]


def resnet(arch: str, image_size: int) -> tuple[ConvNet, int]:
    """A ResNet of torchvision without its classifier (He et al., CVPR 2016).

    Images of at most 64 pixels get the CIFAR stem: one 3x3 convolution of stride 1 replaces the 7x7
    convolution of stride 2 and the max pooling.

    Args:
        arch: "resnet18", "resnet34", "resnet50", "resnet101" or "resnet152".
        image_size: Height and width of the images.

    Returns:
        The network and the length of its features.
    """
    from torchvision import models

    network = models.get_model(arch, weights=None)
    # layers keep torchvision's names, so that its checkpoints fit
    layers = OrderedDict(network.named_children())
    features = layers.pop("fc").in_features
    if image_size <= SMALL_IMAGE:
        layers["conv1"] = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(layers["conv1"].weight, mode="fan_out", nonlinearity="relu")
        del layers["maxpool"]
    return ConvNet(layers | {"flatten": nn.Flatten()}), features


def narrow_resnet(width: int = 16) -> tuple[ConvNet, int]:
    """A ResNet of 8 layers for images of about 16x16: a CIFAR stem and three basic blocks.

    Args:
        width: How many channels the first block has; each later block doubles the channels and
            halves the image.

    Returns:
        The network and the length of its features, 4 * width.
    """
    from torchvision.models.resnet import BasicBlock, conv1x1

    def down(channels: int) -> nn.Module:
        shortcut = nn.Sequential(conv1x1(channels, 2 * channels, 2), nn.BatchNorm2d(2 * channels))
        return BasicBlock(channels, 2 * channels, stride=2, downsample=shortcut)

    network = ConvNet(
        OrderedDict(
            conv1=nn.Conv2d(3, width, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(width),
            relu=nn.ReLU(inplace=True),
            layer1=BasicBlock(width, width),
            layer2=down(width),
            layer3=down(2 * width),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
        )
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network, 4 * width
