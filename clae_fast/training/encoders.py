"""Encoders of runs: built from settings, restored from a checkpoint, or published ones, frozen."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from clae_fast.config import Config
from clae_fast.data import eval_transform, to_rgb
from clae_fast.errors import CheckpointError
from clae_fast.nn import Encoder, ProjectionHead, build_encoder
from clae_fast.nn.encoder import timm_model
from clae_fast.nn.mode import evaluating
from clae_fast.nn.normalize import Normalize
from clae_fast.training import checkpoint
from clae_fast.training.run_folder import RunFolder


class Transform:
    """Cuts out the middle of an image of any size, as evaluation does, with pixels in 0..1.

    Args:
        image_size: Height and width of the result.
    """

    def __init__(self, image_size: int) -> None:
        self._middle = eval_transform(image_size)

    def __call__(self, image: Any) -> Tensor:
        """Takes a PIL image of any mode, or a tensor [3, H, W] of bytes or floats to [3, S, S]."""
        return self._middle(to_rgb(image) if isinstance(image, Image.Image) else image)


class FrozenEncoder(Encoder):
    """A trained encoder that does not change: in eval mode, without gradients. It gives features.

    Args:
        normalize: Takes pixels in 0..1 to what the network expects.
        network: [N, C, H, W] -> [N, F]; its weights have the names that its library gives them.
        image_size: Height and width of the images that it is for.
        step: Optimizer steps that it was trained for, None where that is not known.

    Raises:
        RuntimeError, AssertionError: The network does not take images of this size.

    Attributes:
        dim: Length of the features, F.
        image_size: As given.
        step: As given.
        transform: Takes an image to what the encoder expects, [3, S, S].
    """

    def __init__(
        self, normalize: nn.Module, network: nn.Module, image_size: int, step: int | None = None
    ) -> None:
        backbone = nn.Sequential(normalize, network)
        features = width(backbone, image_size)
        super().__init__(backbone, ProjectionHead(features, 0, 0, layers=0))
        self.image_size = image_size
        self.step = step
        self.transform = Transform(image_size)
        self.requires_grad_(False)
        self.train()

    @property
    def network(self) -> nn.Module:
        """The network behind the normalization."""
        _, network = self.backbone.children()
        return network

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Stays in eval mode, whatever mode its owner takes."""
        return super().train(False)


def build(config: Config, device: torch.device | str = "cpu") -> Encoder:
    """The encoder of a run on `device`, initialized from torch's global generator.

    Weights are channels_last, the layout in which convolutions are fastest on CPU and GPU.

    Raises:
        ValueError: The architecture is unknown or does not take images of this size.
        RuntimeError: A package that is needed is not installed.
    """
    size = config.views.image_size
    backbone, features = build_encoder(config.encoder.arch, size)
    head = ProjectionHead(
        features,
        config.encoder.hidden_dim,
        config.encoder.proj_dim,
        layers=config.encoder.head_layers,
        norm=config.encoder.head_norm,
    )
    encoder = Encoder(nn.Sequential(Normalize(config.views.mean, config.views.std), backbone), head)
    encoder.to(device).to(memory_format=torch.channels_last)
    try:
        width(encoder, size)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"image_size {size} does not fit arch {config.encoder.arch}: {reason}"
        ) from error
    return encoder


@torch.no_grad()
def width(encoder: nn.Module, image_size: int) -> int:
    """The D of the [N, D] that the encoder makes of images of this size.

    Raises:
        RuntimeError, AssertionError: The encoder does not take images of this size.
    """
    device = next(encoder.parameters()).device
    with evaluating(encoder):
        z = encoder(torch.zeros(2, 3, image_size, image_size, device=device))
    if z.ndim != 2:
        raise RuntimeError(f"its features are of shape {list(z.shape)}")
    return z.shape[1]


def restore(
    folder: RunFolder, path: Path, device: torch.device | str = "cpu"
) -> tuple[Encoder, int]:
    """The encoder in a checkpoint of a run, and the optimizer step of the checkpoint.

    Raises:
        CheckpointError: The checkpoint is missing, damaged or of another run.
        ValueError, RuntimeError: As `build` raises them.
    """
    state = checkpoint.load(path)
    encoder = build(folder.config, device)
    prefix = "encoder."
    try:
        weights = {
            name.removeprefix(prefix): value
            for name, value in state["method"].items()
            if name.startswith(prefix)
        }
        encoder.load_state_dict(weights)
        return encoder, state["step"]
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {path} is not one of this run: {checkpoint.reason(error)}"
        ) from error


def restore_frozen(
    folder: RunFolder,
    path: Path,
    *,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
) -> FrozenEncoder:
    """The frozen encoder in a checkpoint, for images of `image_size` or else of the run's size.

    Raises:
        CheckpointError, ValueError, RuntimeError: As `restore` raises them.
    """
    encoder, step = restore(folder, path, device)
    normalize, network = encoder.backbone.children()
    size = folder.config.views.image_size if image_size is None else image_size
    return FrozenEncoder(normalize, network, size, step)


def load_encoder(
    source: str | Path, *, image_size: int | None = None, device: torch.device | str = "cpu"
) -> FrozenEncoder:
    """A trained encoder, frozen, which normalizes its input itself and has a fitting transform.

    Args:
        source: The folder of a run, which stands for its best checkpoint in validation, or its last
            one without validation; a checkpoint file in such a folder; or "timm/NAME" or
            "torchvision/NAME", a classifier of these libraries with its default weights, which the
            library fetches or has in its cache.
        image_size: Height and width of the images; by default of those that it was trained on.
        device: Where it computes.

    Returns:
        The encoder, from pixels in 0..1 to features, [N, 3, H, W] -> [N, F].

    Raises:
        ValueError: There is no such encoder, its weights cannot be had, or it does not take images
            of this size.

    Example:
        >>> encoder = clae_fast.load_encoder("runs/cifar10")
        >>> h = encoder(encoder.transform(PIL.Image.open("cat.jpg"))[None])  # [1, F]
    """
    library, _, name = str(source).partition("/")
    try:
        if library == "timm":
            encoder = _from_timm(name, image_size)
        elif library == "torchvision":
            encoder = _from_torchvision(name, image_size)
        else:
            encoder = _from_run(Path(source), image_size)
        encoder.to(device).to(memory_format=torch.channels_last)
        return encoder
    # libraries and networks fail in their own ways
    except Exception as error:
        raise ValueError(f"no encoder from {str(source)!r}: {checkpoint.reason(error)}") from error


def _from_run(path: Path, image_size: int | None) -> FrozenEncoder:
    if not path.exists():
        raise FileNotFoundError(
            "neither a run folder, a checkpoint in one, timm/NAME nor torchvision/NAME"
        )
    if path.is_dir():
        folder = RunFolder.open(path)
        path = folder.best_or_last
    else:
        folder = RunFolder.open(path.absolute().parents[1])
    return restore_frozen(folder, path, image_size=image_size)


def _from_timm(name: str, image_size: int | None) -> FrozenEncoder:
    network, _ = timm_model(name, image_size, pretrained=True)
    config: Any = network.pretrained_cfg
    size = config["input_size"][-1] if image_size is None else image_size
    return FrozenEncoder(Normalize(config["mean"], config["std"]), network, size)


def _from_torchvision(name: str, image_size: int | None) -> FrozenEncoder:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError("torchvision has no such classifier")
    weights = models.get_model_weights(name).DEFAULT
    network = models.get_model(name, weights=weights)
    linear = [at for at, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise ValueError("its classes come out of no linear layer")
    network.set_submodule(linear[-1], nn.Identity())
    expects = weights.transforms()
    size = expects.crop_size[0] if image_size is None else image_size
    return FrozenEncoder(Normalize(expects.mean, expects.std), network, size)
