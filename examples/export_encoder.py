"""Exports the encoder of a run, as safetensors for timm or torchvision, and with torch.export.

pip install '.[examples]' && python examples/export_encoder.py [RUN]
Without RUN, the program makes a short run first.
"""

import sys
import tempfile
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from clae_fast import load_encoder, train
from clae_fast.training.run_folder import RunFolder

ARCH, SIZE = "timm/resnet10t", 32


def short_run(path):
    """Makes a run of one step, to have something to export."""
    flags = ["--arch", ARCH, "--image-size", str(SIZE), "--limit", "32", "--batch-size", "32"]
    if train.main([*flags, "--epochs", "1", "--quiet", "--out", str(path)]):
        sys.exit("the run failed")
    return path


def in_its_library(arch, image_size):
    """The same network from its own library, untrained and without a classifier."""
    if arch.startswith("timm/"):
        return timm.create_model(arch.removeprefix("timm/"), num_classes=0)
    network = models.get_model(arch)
    network.fc = nn.Identity()
    if image_size <= 64:
        # small images keep their size in the first layer
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    return network


def main(run, out):
    encoder = load_encoder(run)
    arch = RunFolder.open(run).config.encoder.arch
    x = torch.rand(4, 3, encoder.image_size, encoder.image_size)

    # the weights have the names of timm or torchvision; safetensors wants them contiguous
    weights = {name: w.contiguous() for name, w in encoder.network.state_dict().items()}
    save_file(weights, out / "encoder.safetensors")
    network = in_its_library(arch, encoder.image_size)
    network.load_state_dict(load_file(out / "encoder.safetensors"), strict=True)
    normalize, _ = encoder.backbone
    torch.testing.assert_close(network.eval()(normalize(x)), encoder(x))
    mean, std = (values.flatten().tolist() for values in (normalize.mean, normalize.std))
    print(f"{out / 'encoder.safetensors'}: loads into {arch}, mean {mean}, std {std}")

    # the exported program needs none of this Python code, and takes any number of images
    images = torch.export.Dim("images")
    program = torch.export.export(encoder, (x,), dynamic_shapes=({0: images},))
    torch.export.save(program, out / "encoder.pt2")
    loaded = torch.export.load(out / "encoder.pt2").module()
    torch.testing.assert_close(loaded(x[:3]), encoder(x[:3]))
    print(f"{out / 'encoder.pt2'}: [N, 3, S, S] -> [N, {encoder.dim}], S = {encoder.image_size}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]), Path())
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(short_run(Path(folder) / "run"), Path(folder))
