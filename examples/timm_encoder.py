"""A network of timm as the encoder. This one is a vision transformer, which has no BatchNorm.

pip install '.[examples]' && python examples/timm_encoder.py
The command for the same is python -m clae_fast.train --arch timm/vit_tiny_patch16_224
"""

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torchvision.transforms import v2

from clae_fast import nt_xent, pair_step
from clae_fast.attack import LinfAttack
from clae_fast.nn import Encoder, ProjectionHead, adversarial_twin
from clae_fast.nn.normalize import Normalize

NAME, SIZE, BATCH_SIZE, STEPS = "vit_tiny_patch16_224", 32, 32, 4


def main():
    torch.manual_seed(0)
    network = timm.create_model(NAME, num_classes=0, img_size=SIZE, patch_size=8, depth=4)
    config = network.pretrained_cfg
    # the encoder takes pixels in 0..1, so that the attack's radius counts pixels
    backbone = nn.Sequential(Normalize(config["mean"], config["std"]), network)
    encoder = Encoder(backbone, ProjectionHead(network.num_features, 512, 128))
    adv_encoder = adversarial_twin(encoder)
    both = nn.ModuleList([encoder, adv_encoder])
    optimizer = torch.optim.AdamW(both.parameters(), lr=5e-4, weight_decay=0.05)
    attack = LinfAttack(eps=8 / 255, lo=0.0, hi=1.0)

    digits = torch.tensor(load_digits().images / 16, dtype=torch.float32)
    images = digits[:, None].expand(-1, 3, -1, -1)
    crop = v2.RandomResizedCrop(SIZE, scale=(0.4, 1.0))
    for number in range(STEPS):
        batch = images[torch.randperm(len(images))[:BATCH_SIZE]]
        x_p, x_q = (torch.stack([crop(image) for image in batch]) for _ in range(2))
        optimizer.zero_grad()
        step = pair_step(encoder, adv_encoder, x_p, x_q, nt_xent, attack=attack)
        optimizer.step()
        print(f"step {number + 1}: loss {step.loss:.3f}, adversarial {step.adv_loss:.3f}")


if __name__ == "__main__":
    main()
