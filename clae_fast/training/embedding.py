"""Features of all images below a folder, by a trained encoder."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from clae_fast import data
from clae_fast.distributed.device import to_device
from clae_fast.training.encoders import FrozenEncoder


@torch.no_grad()
def embed(
    encoder: FrozenEncoder,
    folder: Path,
    *,
    batch_size: int = 256,
    workers: int = 0,
    on_corrupt: str = "fail",
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Features of all images below a folder.

    Args:
        encoder: As `clae_fast.load_encoder` gives it.
        folder: Where the images are, at any depth.
        batch_size: Images that are encoded at once.
        workers: Loader processes, at most one per core; 0 loads in this process.
        on_corrupt: What happens at an image that cannot be read: "fail" raises, "skip" leaves it
            out.
        progress: Whether a bar on stderr shows how far it is.

    Returns:
        Features [N, F], float32, and the images' paths below the folder [N], sorted.

    Raises:
        DataError: There is no image, or one cannot be read.
    """
    files = data.image_files(folder)
    # an image's label is its number
    split = data.Split.whole(files, np.arange(len(files)))
    split = replace(split, corrupt=data.CorruptImages(on_corrupt))
    device = next(encoder.parameters()).device
    loader = data.image_loader(
        split,
        encoder.transform,
        batch_size=batch_size,
        workers=workers,
        pin_memory=device.type == "cuda",
    )
    features, rows = [], []
    with tqdm(total=len(files), unit="img", dynamic_ncols=True, disable=not progress) as bar:
        for x, numbers in loader:
            features.append(encoder(to_device(x, device)).float().cpu())
            rows.append(numbers)
            bar.update(len(numbers))
    names = [os.fsdecode(name) for name in files.names[torch.cat(rows).numpy()].tolist()]
    return torch.cat(features).numpy(), np.array(names)
