"""Encoders: a backbone, which is found by name, and a projection head."""

from typing import Any

import torch
from torch import Tensor, nn

from clae_fast.nn.resnet import ConvNet, narrow_resnet, resnet

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def build_encoder(arch: str, image_size: int) -> tuple[nn.Module, int]:
    """Builds a backbone without a classifier, with random weights.

    Args:
        arch: "resnet18", "resnet34", "resnet50", "resnet101" or "resnet152" of torchvision, which
            have the CIFAR stem for images of up to 64 pixels; "resnet-narrow", which has three
            blocks and is for images of about 16x16; or "timm/NAME" for any model of timm.
        image_size: Height and width of the images.

    Returns:
        The backbone, [N, 3, H, W] -> [N, features], and `features`.

    Raises:
        ValueError: `arch` is unknown, or `image_size` is not positive.
        RuntimeError: `arch` needs timm, which is not installed.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be positive, got {image_size}")
    if arch in RESNETS:
        return resnet(arch, image_size)
    if arch == "resnet-narrow":
        return narrow_resnet()
    if arch.startswith("timm/"):
        return timm_model(arch.removeprefix("timm/"), image_size)
    raise ValueError(f"arch must be {', '.join(RESNETS)}, resnet-narrow or timm/NAME, got {arch!r}")


def timm_model(
    name: str, image_size: int | None, *, pretrained: bool = False
) -> tuple[nn.Module, int]:
    """A model of timm without its classifier.

    Args:
        name: The model's name in timm, with or without the tag of its weights.
        image_size: Height and width of the images; None for the size that it was made for.
        pretrained: Whether it gets its published weights, from timm's cache or the hub.

    Returns:
        The backbone and the length of its features, as `build_encoder` returns them.

    Raises:
        ValueError: timm has no such model.
        RuntimeError: timm is not installed.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise RuntimeError("timm is not installed: pip install 'clae_fast[timm]'") from error
    if not timm.is_model(name):
        raise ValueError(f"arch names a model that timm does not have: {name!r}")
    # the shapes of a vision transformer depend on the image size; other models take any size
    config = timm.get_pretrained_cfg(name)
    fixed = config is not None and config.fixed_input_size
    size: dict[str, Any] = {"img_size": image_size} if fixed and image_size is not None else {}
    network: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, **size)
    return network, getattr(network, "head_hidden_size", network.num_features)


class ProjectionHead(nn.Sequential):
    """Linear layers with ReLU between them, which map features to projections.

    Args:
        in_dim: Length of the features.
        hidden_dim: Length of the hidden layers.
        out_dim: Length of the projection.
        layers: How many linear layers there are; with 0 the features are the projections.
        norm: Which linear layers BatchNorm follows: "none"; "hidden", all but the last; or "all".
            A linear layer in front of BatchNorm has no bias, and BatchNorm after the last layer has
            none either.

    Attributes:
        out_dim: Length of the projection, which is that of the features where there are no layers.
    """

    def __init__(
        self, in_dim: int, hidden_dim: int, out_dim: int, *, layers: int = 2, norm: str = "none"
    ) -> None:
        parts: list[nn.Module] = []
        for _ in range(layers - 1):
            parts.append(nn.Linear(in_dim, hidden_dim, bias=norm == "none"))
            if norm != "none":
                parts.append(nn.BatchNorm1d(hidden_dim))
            parts.append(nn.ReLU(inplace=True))
            in_dim = hidden_dim
        if layers > 0:
            parts.append(nn.Linear(in_dim, out_dim, bias=norm != "all"))
            if norm == "all":
                parts.append(nn.BatchNorm1d(out_dim))
                parts[-1].register_parameter("bias", None)
        super().__init__(*parts)
        self.out_dim = out_dim if layers > 0 else in_dim


class Encoder(nn.Module):
    """A backbone and a projection head. Projections are raw: the losses normalize them.

    Args:
        backbone: [N, C, H, W] -> [N, F].
        head: [N, F] -> [N, D].

    Attributes:
        autocast: The type that autocast computes projections in, fp16 or bf16; None leaves that to
            the caller. Backward passes run outside of autocast, as torch recommends.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.autocast: torch.dtype | None = None

    @property
    def dim(self) -> int:
        """Length of the projections, D: the head's `out_dim`."""
        head: Any = self.head
        return int(head.out_dim)

    def features(self, x: Tensor) -> Tensor:
        """Features h = backbone(x), [N, F], which evaluation uses."""
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        """Projections z = head(backbone(x)), [N, D]."""
        if self.autocast is None:
            return self.head(self.features(x))
        with torch.autocast(x.device.type, self.autocast):
            return self.head(self.features(x))

    def compile(self, **options: Any) -> None:
        """Compiles the backbone; the first convolution of a `ConvNet` stays eager.

        Args:
            options: Options of `torch.compile`.
        """
        parts = [part for part in self.backbone.modules() if isinstance(part, ConvNet)]
        for part in parts:
            part.compile(**options)
        if not parts:
            self.backbone.compile(**options)
