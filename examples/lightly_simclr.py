"""SimCLR as lightly writes it, with the fused NT-Xent instead of lightly's loss.

pip install '.[examples]' && python examples/lightly_simclr.py
"""

import numpy as np
import torch
import torchvision
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

from clae_fast.nn import NTXentLoss

IMAGES, BATCH_SIZE, EPOCHS, SIZE = 256, 64, 2, 32


class Digits(Dataset):
    """scikit-learn's digits as transformed RGB images."""

    def __init__(self, transform):
        self.pixels = (load_digits().images[:IMAGES] * 15).astype(np.uint8)
        self.transform = transform

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.pixels[index]).convert("RGB"))


class SimCLR(nn.Module):
    """A backbone and lightly's projection head."""

    def __init__(self):
        super().__init__()
        resnet = torchvision.models.resnet18()
        self.backbone = nn.Sequential(*list(resnet.children())[:-1], nn.Flatten())
        self.head = SimCLRProjectionHead(512, 512, 128)

    def forward(self, x):
        return self.head(self.backbone(x))


def main():
    torch.manual_seed(0)
    model = SimCLR()
    transform = SimCLRTransform(input_size=SIZE, hf_prob=0.0, cj_prob=0.0, gaussian_blur=0.0)
    loader = DataLoader(Digits(transform), BATCH_SIZE, shuffle=True, drop_last=True)
    # in lightly this is lightly.loss.NTXentLoss(temperature=0.5)
    criterion = NTXentLoss(temperature=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9)
    for epoch in range(EPOCHS):
        for x_p, x_q in loader:
            loss = criterion(model(x_p), model(x_q))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
