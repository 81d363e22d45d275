"""Features of images: `python -m clae_fast.embed RUN DIR -o features.npz`.

The file has "features" [N, F], float32; "names" [N], the images' paths below DIR, sorted; and
"step", the optimizer step of the checkpoint.
"""

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clae_fast import cli
from clae_fast.distributed.device import pick_device
from clae_fast.training.checkpoint import write_atomically
from clae_fast.training.embedding import embed
from clae_fast.training.encoders import restore_frozen
from clae_fast.training.run_folder import RunFolder


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


main = cli.command(_main)


def _parser() -> cli.Parser:
    parser = cli.Parser(
        "embed",
        {"python -m clae_fast.embed runs/cifar10 photos -o features.npz": "all images below"},
        description="Computes the features of all images below a folder by the encoder of a run. "
        "The file has features [N, F], names [N], which are paths below the folder, and step.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder")
    add("folder", type=Path, metavar="DIR", help="folder of images, at any depth")
    add("-o", "--out", type=Path, required=True, metavar="FILE", help="file to write, .npz")
    cli.add_checkpoint(parser)
    add("--batch-size", type=int, default=256, metavar="N", help="images encoded at once [256]")
    cli.add_settings(parser, ("workers", "device", "on_corrupt"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
