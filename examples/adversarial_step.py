"""CLAE's step in a loop of your own: it takes 9 units, where plain SimCLR takes 6.

python examples/adversarial_step.py
"""

import torch
from sklearn.datasets import load_digits

from clae_fast import augment, augment_params, nt_xent, pair_step
from clae_fast.attack import LinfAttack
from clae_fast.nn import Encoder, ProjectionHead, adversarial_twin, build_encoder

BATCH_SIZE, EPOCHS, SIZE = 128, 2, 16
VIEWS = {
    "crop_min_scale": 0.4,
    "flip": False,
    "color_jitter": (0.4, 0.4, 0.0, 0.0),
    "color_jitter_prob": 0.8,
    "grey_prob": 0.0,
    "blur_prob": (0.0, 0.0),
    "solarize_prob": (0.0, 0.0),
}


def batches(epoch):
    """Yields both views of each batch of digits, with pixels in 0..1."""
    digits = torch.from_numpy(load_digits().images * 15).byte()
    images = digits[:, None].expand(-1, 3, -1, -1).contiguous()
    for rows in torch.randperm(len(images)).split(BATCH_SIZE)[:-1]:
        params = augment_params(rows, seed=0, epoch=epoch, height=8, width=8, **VIEWS)
        yield augment(images, params, rows=rows, size=SIZE)


def main():
    torch.manual_seed(0)
    backbone, features = build_encoder("resnet-narrow", SIZE)
    encoder = Encoder(backbone, ProjectionHead(features, 128, 64))
    # the twin shares all weights except those of BatchNorm, which also has its own statistics
    adv_encoder = adversarial_twin(encoder)
    both = torch.nn.ModuleList([encoder, adv_encoder])
    optimizer = torch.optim.AdamW(both.parameters(), lr=3e-3)
    attack = LinfAttack(eps=0.06, lo=0.0, hi=1.0)
    for epoch in range(EPOCHS):
        for x_p, x_q in batches(epoch):
            optimizer.zero_grad()
            # leaves the gradients of both losses in .grad, as backward() would
            step = pair_step(encoder, adv_encoder, x_p, x_q, nt_xent, attack=attack)
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {step.loss:.3f}, adversarial {step.adv_loss:.3f}")


if __name__ == "__main__":
    main()
