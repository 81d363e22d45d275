"""Encoders: a backbone found by name, and a projection head."""

from typing import Any

import torch
from torch import Tensor, nn

from clae_fast.nn.resnet import ConvNet, narrow_resnet, resnet

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def build_encoder(arch: str, image_size: int) -> tuple[nn.Module, int]:
    """Builds a backbone, randomly initialised and without a classifier.

    Args:
        arch: "resnet18", "resnet34", "resnet50", "resnet101", "resnet152" (torchvision's, with the
            CIFAR stem up to 64 pixels), "resnet-narrow" (three blocks, for images of 16x16 or so),
            or "timm/NAME" for any model of timm.
        image_size: Height and width of the images.

    Returns:
        The backbone, [N, 3, H, W] -> [N, features], and `features`.

    Raises:
        ValueError: If `arch` is unknown or `image_size` is not positive.
        RuntimeError: If `arch` needs timm and it is not installed.
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
        name: As timm has it, perhaps with the tag of weights.
        image_size: Height and width of the images; None for those that it was made for.
        pretrained: Whether to take its weights from timm's cache or the hub.

    Returns:
        As `build_encoder`.

    Raises:
        ValueError: If timm does not have it.
        RuntimeError: If timm is not installed.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise RuntimeError("timm is not installed: pip install 'clae_fast[timm]'") from error
    if not timm.is_model(name):
        raise ValueError(f"arch names a model that timm does not have: {name!r}")
    # vision transformers have the image size in their shapes, the others take any
    config = timm.get_pretrained_cfg(name)
    fixed = config is not None and config.fixed_input_size
    size: dict[str, Any] = {"img_size": image_size} if fixed and image_size is not None else {}
    network: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, **size)
    return network, getattr(network, "head_hidden_size", network.num_features)


class ProjectionHead(nn.Sequential):
    """Linear layers with ReLU between them, from features to what the loss is taken at.

    Args:
        in_dim: Length of the features.
        hidden_dim: Length of the hidden layers.
        out_dim: Length of the projection.
        layers: Linear layers; with 0 the features are the projection.
        norm: Where BatchNorm follows a linear layer, which then has no bias: "none"; "hidden",
            between the layers; "all", after the last one too, where BatchNorm has no bias either.

    Attributes:
        out_dim: Length of the projection; of the features where there are no layers.
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
    """A backbone and a projection head; the projections are raw, the losses normalise them.

    Args:
        backbone: [N, C, H, W] -> [N, F].
        head: [N, F] -> [N, D].

    Attributes:
        autocast: Type in which projections are computed, fp16 or bf16; None leaves it to the
            caller. Backward passes follow, and run outside of autocast, as they should.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.autocast: torch.dtype | None = None

    @property
    def dim(self) -> int:
        """Length of the projections, D, as the head's `out_dim` has it."""
        head: Any = self.head
        return int(head.out_dim)

    def features(self, x: Tensor) -> Tensor:
        """What evaluation uses: h = backbone(x), [N, F]."""
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        """Projections z = head(backbone(x)), [N, D]."""
        if self.autocast is None:
            return self.head(self.features(x))
        with torch.autocast(x.device.type, self.autocast):
            return self.head(self.features(x))

    def compile(self, **options: Any) -> None:
        """Compiles the backbone, but for what a `ConvNet` keeps apart.

        Args:
            options: Of `torch.compile`.
        """
        parts = [part for part in self.backbone.modules() if isinstance(part, ConvNet)]
        for part in parts:
            part.compile(**options)
        if not parts:
            self.backbone.compile(**options)
