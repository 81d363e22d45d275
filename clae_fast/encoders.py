"""Encoders of runs: built from settings, restored from a checkpoint, or published ones, frozen."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from clae_fast import checkpoint
from clae_fast.checkpoint import CheckpointError
from clae_fast.config import Config
from clae_fast.nn import Encoder, ProjectionHead, build_encoder
from clae_fast.nn.encoder import timm_model
from clae_fast.nn.mode import evaluating
from clae_fast.nn.normalize import Normalize
from clae_fast.run_folder import RunFolder


class FrozenEncoder(Encoder):
    """A trained encoder that stays as it is: in eval mode, without gradients. Gives features.

    Args:
        backbone: [N, C, H, W] -> [N, F].
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone, nn.Identity())
        self.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Leaves it in eval mode, whatever mode its owner takes."""
        return super().train(False)


def build(config: Config, device: torch.device | str = "cpu") -> Encoder:
    """The encoder of a run on `device`, initialised from torch's global generator.

    Weights are channels_last, the layout that convolutions are fastest in on CPU and GPU.

    Raises:
        ValueError: an unknown architecture, or one that does not take images of this size.
        RuntimeError: it needs a package that is not installed.
    """
    backbone, features = build_encoder(config.arch, config.image_size)
    head = ProjectionHead(
        features,
        config.hidden_dim,
        config.proj_dim,
        layers=config.head_layers,
        norm=config.head_norm,
    )
    encoder = Encoder(nn.Sequential(Normalize(config.mean, config.std), backbone), head)
    encoder.to(device).to(memory_format=torch.channels_last)
    try:
        width(encoder, config.image_size)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"image_size {config.image_size} does not fit arch {config.arch}: {reason}"
        ) from error
    return encoder


@torch.no_grad()
def width(encoder: nn.Module, image_size: int) -> int:
    """D where images of this size become [N, D].

    Raises:
        RuntimeError, AssertionError: they do not fit.
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
    """The encoder in a checkpoint of a run, and the optimiser step that it is from.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of another run.
        ValueError, RuntimeError: as of `build`.
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


def load_encoder(
    source: str, *, image_size: int, device: torch.device | str = "cpu"
) -> tuple[FrozenEncoder, int]:
    """A trained encoder, with its normalisation inside.

    Args:
        source: The folder of a run, whose best checkpoint in validation counts, or the last where
            there is none; a checkpoint file in one; "timm/NAME" or "torchvision/NAME", a classifier
            of these libraries with its default weights, which they fetch or have in their cache.
        image_size: Height and width of the images.
        device: Where it computes.

    Returns:
        The frozen encoder, from pixels in 0..1 to features, [N, 3, H, W] -> [N, F], and F.

    Raises:
        ValueError: There is no such encoder, its weights cannot be had, or it does not take images
            of this size.
    """
    library, _, name = source.partition("/")
    try:
        if library == "timm":
            backbone = _from_timm(name, image_size)
        elif library == "torchvision":
            backbone = _from_torchvision(name)
        else:
            backbone = _from_run(Path(source))
        encoder = FrozenEncoder(backbone).to(device).to(memory_format=torch.channels_last)
        return encoder, width(encoder, image_size)
    # libraries and networks fail in their own ways
    except Exception as error:
        raise ValueError(f"no encoder from {source!r}: {checkpoint.reason(error)}") from error


def _from_run(path: Path) -> nn.Module:
    if not path.exists():
        raise FileNotFoundError(
            "neither a run folder, a checkpoint in one, timm/NAME nor torchvision/NAME"
        )
    if path.is_dir():
        folder = RunFolder.open(path)
        path = folder.best_or_last
    else:
        folder = RunFolder.open(path.absolute().parents[1])
    encoder, _ = restore(folder, path)
    return encoder.backbone


def _from_timm(name: str, image_size: int) -> nn.Module:
    network, _ = timm_model(name, image_size, pretrained=True)
    config: Any = network.pretrained_cfg
    return nn.Sequential(Normalize(config["mean"], config["std"]), network)


def _from_torchvision(name: str) -> nn.Module:
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
    return nn.Sequential(Normalize(expects.mean, expects.std), network)
