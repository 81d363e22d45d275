"""The adversarial step in several processes, with the weights of one process with the whole batch.

torchrun --nproc-per-node 2 examples/torchrun_ddp.py
Each process takes a GPU. Without GPUs they use the CPU and gloo.

DistributedDataParallel expects one backward pass a step, in which every parameter gets its
gradient, and this step has several. So the processes gather each other's embeddings as negatives,
and sum the gradients once, while the last backward pass runs.
"""

import torch
from sklearn.datasets import load_digits
from torchvision.transforms import v2

from clae_fast import distributed, nt_xent, pair_step
from clae_fast.attack import LinfAttack
from clae_fast.distributed.reducer import GradientReducer
from clae_fast.nn import Encoder, ProjectionHead, adversarial_twin, build_encoder
from clae_fast.nn.sync_norm import convert

BATCH_SIZE, STEPS, SIZE = 64, 6, 16


def main():
    # without torchrun this is a world of one process
    world = distributed.init("auto")
    torch.manual_seed(0)
    backbone, features = build_encoder("resnet-narrow", SIZE)
    encoder = Encoder(backbone, ProjectionHead(features, 128, 64)).to(world.device)
    both = torch.nn.ModuleList([encoder, adversarial_twin(encoder)])
    world.share(both)
    convert(both, world)
    optimizer = torch.optim.AdamW(both.parameters(), lr=3e-3)
    reducer = GradientReducer(both.parameters(), world)
    loss = world.gather_loss(nt_xent)
    attack = LinfAttack(eps=0.06, lo=0.0, hi=1.0)

    digits = torch.tensor(load_digits().images / 16, dtype=torch.float32)
    images = digits[:, None].expand(-1, 3, -1, -1)
    crop = v2.RandomResizedCrop(SIZE, scale=(0.4, 1.0))
    for number in range(STEPS):
        # all processes draw the same batch, and each takes its own rows
        batch = images[torch.randperm(len(images))[:BATCH_SIZE]]
        views = (torch.stack([crop(image) for image in batch]) for _ in range(2))
        x_p, x_q = (world.own_rows(x).to(world.device) for x in views)
        reducer.zero_grad()
        step = pair_step(*both, x_p, x_q, loss, attack=attack, last_backward=reducer.last_backward)
        reducer.finish()
        optimizer.step()
        if world.leads:
            print(f"step {number + 1}: loss {step.loss:.3f}, adversarial {step.adv_loss:.3f}")
    world.require_equal(both)
    world.shutdown()


if __name__ == "__main__":
    main()
