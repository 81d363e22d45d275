"""The adversarial step in PyTorch Lightning, with manual optimization.

pip install '.[examples]' && python examples/lightning_simclr.py
"""

import pytorch_lightning
import torch
import torchvision
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from clae_fast import nt_xent, pair_step
from clae_fast.attack import LinfAttack
from clae_fast.nn import adversarial_twin

IMAGES, BATCH_SIZE, EPOCHS, SIZE = 128, 32, 2, 32


class AdversarialSimCLR(pytorch_lightning.LightningModule):
    """SimCLR with the pair attack."""

    def __init__(self):
        super().__init__()
        # pair_step runs the backward passes, and Lightning does the rest
        self.automatic_optimization = False
        self.encoder = torchvision.models.resnet18(num_classes=128)
        self.adv_encoder = adversarial_twin(self.encoder)
        self.attack = LinfAttack(eps=8 / 255, lo=0.0, hi=1.0)
        self.views = v2.RandomResizedCrop(SIZE, scale=(0.4, 1.0))

    def training_step(self, batch, batch_idx):
        (images,) = batch
        x_p, x_q = (torch.stack([self.views(image) for image in images]) for _ in range(2))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        step = pair_step(self.encoder, self.adv_encoder, x_p, x_q, nt_xent, attack=self.attack)
        optimizer.step()
        self.log_dict({"loss": step.loss, "adv_loss": step.adv_loss})

    def configure_optimizers(self):
        # parameters() yields each shared weight once
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main():
    pytorch_lightning.seed_everything(0)
    digits = torch.tensor(load_digits().images[:IMAGES] / 16, dtype=torch.float32)
    images = TensorDataset(digits[:, None].expand(-1, 3, -1, -1))
    loader = DataLoader(images, BATCH_SIZE, shuffle=True, drop_last=True)
    trainer = pytorch_lightning.Trainer(
        max_epochs=EPOCHS, logger=False, enable_checkpointing=False, log_every_n_steps=1
    )
    trainer.fit(AdversarialSimCLR(), loader)
    for name, value in trainer.callback_metrics.items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
