"""Features of images: `python -m clae_fast.embed RUN DIR -o features.npz`.

The file has "features" [N, F], float32; "names" [N], the images' paths below DIR, sorted; and
"step", the optimiser step of the checkpoint.
"""

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from clae_fast import cli, data
from clae_fast.distributed.device import pick_device, to_device
from clae_fast.training.checkpoint import write_atomically
from clae_fast.training.encoders import FrozenEncoder, restore_frozen
from clae_fast.training.run_folder import RunFolder


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
        encoder: as `clae_fast.load_encoder` gives it.
        folder: where the images are, at any depth.
        batch_size: images encoded at once.
        workers: loader processes, at most one a core; 0 loads in this one.
        on_corrupt: what an image that cannot be read does: "fail", or "skip".
        progress: whether a bar on stderr shows how far it is.

    Returns:
        Features [N, F], float32, and the images' paths below the folder [N], sorted.

    Raises:
        DataError: there is no image, or one cannot be read.
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        The exit code: 0, 1 failed, 2 bad input, 130 interrupted, 143 terminated.
    """
    return cli.run(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> None:
    args = _parser().parse(argv)
    folder, out, batch_size = (args.pop(name) for name in ("folder", "out", "batch_size"))
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out must be a file in a folder that is there, got {out}")
    if batch_size < 1:
        raise ValueError(f"--batch-size must be positive, got {batch_size}")
    run = RunFolder.open(args.pop("run"))
    path = run.find(args.pop("checkpoint", None))
    config = run.config.replace(**args)
    encoder = restore_frozen(run, path, device=pick_device(config.engine.device))
    features, names = embed(
        encoder,
        folder,
        batch_size=batch_size,
        workers=config.data.workers,
        on_corrupt=config.data.on_corrupt,
        progress=True,
    )
    buffer = io.BytesIO()
    np.savez(buffer, features=features, names=names, step=np.int64(encoder.step or 0))
    write_atomically(out, buffer.getbuffer())
    images, width = features.shape
    print(f"features: {images} x {width}, step {encoder.step}")
    print(f"file: {out}")


def _parser() -> cli.Parser:
    parser = cli.Parser(
        {
            "python -m clae_fast.embed runs/cifar10 photos -o features.npz": "all images below",
        },
        prog="python -m clae_fast.embed",
        description="Features of all images below a folder, by the encoder of a run. The file has "
        "features [N, F], names [N], which are paths below the folder, and step.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder")
    add("folder", type=Path, metavar="DIR", help="folder of images, at any depth")
    add("-o", "--out", type=Path, required=True, metavar="FILE", help="file to write, .npz")
    add(
        "--checkpoint",
        metavar="NAME",
        help="best, last, another of the run such as epoch-0010, or a file; "
        "by default the best where there is one",
    )
    add("--batch-size", type=int, default=256, metavar="N", help="images encoded at once [256]")
    cli.add_settings(parser, ("workers", "device", "on_corrupt"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
