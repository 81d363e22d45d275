"""Measures the training engine's steps, plain, pair and self, and those of its peers.

    python -m benchmarks.engine --device cuda                        # ResNet-18, 512 of 32x32
    python -m benchmarks.engine --device cuda --arch resnet50 --batch-size 256 --image-size 224
    python -m benchmarks.engine --batch-size 32 --image-size 16      # the CPU, to try it

A step goes from two views to the moved weights, with Adam. Our steps run as
`python -m clae_fast.train` runs them, by default in fp16, compiled and captured on a GPU:

    plain, plain batched, pair, self    on views that are on the device
    pair from images                    on 8-bit images there, augmented at every step

The peers run in the same rounds, each in its best form:

    released                released CLAE's step and loss, fp32 as released (TF32 on a GPU)
    released with loader    the same on images that four workers augment with torchvision and PIL
    lightly plain           a plain step with lightly's head and loss, fp32 or fp16 autocast,
                            contiguous or channels_last: the fastest of the four

Operations are those of one plain step, by torch's FLOP counter. Peak memory is that of one step,
not captured, above weights and views, in a process of its own.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import _cli, machine, memory, timing
from benchmarks.case import CPU
from benchmarks.cases.nt_xent import released_nt_xent
from benchmarks.cases.views import TwoViews
from benchmarks.results import Row, table, write_json
from benchmarks.setting import Setting
from clae_fast import data, nn
from clae_fast.attack import LinfAttack
from clae_fast.config.layers import resolve
from clae_fast.data.split import Arrays
from clae_fast.nn.normalize import Normalize
from clae_fast.steps import schedules
from clae_fast.steps.batch import Batch
from clae_fast.training.build import build_method, step_options
from clae_fast.training.engine import Engine

TEMPERATURE = 0.5
OURS = {
    "plain": {"attack": "none"},
    "plain batched": {"attack": "none", "batch_views": True},
    "pair": {"attack": "pair"},
    "self": {"attack": "self"},
}
FROM_IMAGES = "pair from images"
RELEASED, WITH_LOADER, LIGHTLY = "released", "released with loader", "lightly plain"
# what others' times are given over
_AGAINST = ("plain", "pair", FROM_IMAGES)
# images that a data set of these benchmarks has, and processes that load it as released
IMAGES, WORKERS = 8192, 4
_LAYOUTS = (torch.contiguous_format, torch.channels_last)


def main(argv: list[str] | None = None) -> int:
    args, setting = _parse(argv)
    facts = machine.shown(setting.device)
    rows = measure(setting, rounds=args.rounds, peers=args.peers)
    print(f"\n{setting}")
    keys = "ms p20_ms p80_ms images_per_second over_plain tflops peak_mib"
    print(table(rows, "step", keys))
    if args.json:
        result = {"machine": facts, **setting.facts(), "rounds": args.rounds, "rows": rows}
        write_json(args.json, result)
    return 0


def measure(setting: Setting, *, rounds: int, peers: Sequence[str]) -> list[Row]:
    """A row of times, ratios and peaks for each of our steps and of the peers that are here."""
    steps = {name: ours(name, setting) for name in (*OURS, FROM_IMAGES)}
    for name in peers:
        try:
            steps[name] = _PEERS[name](setting)
        except Exception as failure:  # whatever a peer raises, the others go on
            print(f"  left out: {name}: {type(failure).__name__}: {failure}", flush=True)
    for call in steps.values():
        # compiled, captured and warm
        for _ in range(6):
            call()
    timings = timing.interleave(
        steps, rounds=rounds, device=setting.device, min_seconds=0.2, max_seconds=float("inf")
    )
    plain = min(("plain", "plain batched"), key=lambda name: timings[name].ms)
    operations = _operations(setting)
    # the allocator does not count the memory that a graph holds
    uncaptured = partial(ours, setting=setting, capture="no")
    peaks = {
        name: memory.peak_of(uncaptured, name, device=setting.device, calls=3)
        for name in ("plain", "pair")
    }
    return [
        {
            "step": name,
            **timings[name].row(),
            "images_per_second": 1e3 * setting.batch_size / timings[name].ms,
            "over_plain": timings[name].over(timings[plain]),
            "plain": plain,
            "over_ours": {other: timings[name].over(timings[other]) for other in _AGAINST},
            "tflops": 1e-9 * operations / timings[name].ms if name in OURS else None,
            "peak_mib": peaks.get(name),
        }
        for name in steps
    ]


def ours(name: str, setting: Setting, **settings: Any) -> Callable[[], object]:
    """One of our steps, as the trainer takes it, ready to be called again and again."""
    engine, number = _engine(name, setting, **settings), itertools.count()
    if name != FROM_IMAGES:
        batch = Batch(tuple(setting.views(engine.dtype, torch.channels_last)))
        return lambda: engine.step(batch, global_step=next(number), lr=1e-3, progress=0.0)
    batches = _batches(setting, engine.dtype)
    return lambda: engine.step(next(batches), global_step=next(number), lr=1e-3, progress=0.0)


def _engine(name: str, setting: Setting, **settings: Any) -> Engine:
    config = resolve(
        {
            "arch": setting.arch,
            "image_size": setting.image_size,
            "batch_size": setting.batch_size,
            "device": str(setting.device),
            "temperature": TEMPERATURE,
            "hidden_dim": 512,
            "proj_dim": 128,
            "optimizer": "adam",
            **OURS.get(name, OURS["pair"]),
            **settings,
        }
    )
    torch.manual_seed(0)
    method = build_method(config, setting.device).train()
    return Engine(config, method, step_options(config), setting.device)


def _batches(setting: Setting, dtype: torch.dtype) -> Iterator[Batch]:
    """Views of a data set that lies on the device, without end."""
    images = _images(setting)
    split = data.Split.whole(Arrays(images), np.arange(len(images)) % 10)
    return iter(
        data.view_source(
            split,
            data.BatchSchedule(len(split), setting.batch_size, epochs=10**6, seed=0),
            data.RECIPES["simclr_cifar" if setting.image_size <= 64 else "simclr"],
            image_size=setting.image_size,
            device=setting.device,
            dtype=dtype,
            workers=0,
            resident="yes",
        )
    )


def _images(setting: Setting) -> np.ndarray:
    """Random images as bytes, [S, H, W, 3]: some batches, whatever their size."""
    count = max(IMAGES // (8 if setting.image_size > 64 else 1), 4 * setting.batch_size)
    shape = (count, setting.image_size, setting.image_size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _released(setting: Setting) -> Callable[[], object]:
    train = _released_step(setting)
    views = setting.views(torch.float32, torch.contiguous_format)
    return lambda: train(*views)


def _released_with_loader(setting: Setting) -> Callable[[], object]:
    train, views = _released_step(setting), _loaded(setting)
    return lambda: train(*(view.to(setting.device, non_blocking=True) for view in next(views)))


def _released_step(setting: Setting) -> Callable[[Tensor, Tensor], None]:
    """Released CLAE's step on its own network's parts: fp32, contiguous, 15 units, its loss."""
    torch.manual_seed(0)
    backbone, features = nn.build_encoder(setting.arch, setting.image_size)
    half = (0.5, 0.5, 0.5)
    normalized = torch.nn.Sequential(Normalize(half, half), backbone)
    encoder = nn.Encoder(normalized, nn.ProjectionHead(features, 512, 128)).to(setting.device)
    adv_encoder = nn.adversarial_twin(encoder)
    trained = dict.fromkeys([*encoder.parameters(), *adv_encoder.parameters()])
    optimizer = torch.optim.Adam(trained, lr=3e-4)
    loss = released_nt_xent(2 * setting.batch_size, TEMPERATURE, setting.device)
    attack = LinfAttack(eps=0.015, impl="reference")

    def train(x_p: Tensor, x_q: Tensor) -> None:
        optimizer.zero_grad()
        schedules.released_step(encoder, adv_encoder, x_p, x_q, loss, attack=attack)
        optimizer.step()

    return train


def _loaded(setting: Setting) -> Iterator[list[Tensor]]:
    """A data set as released: PIL images in memory, augmented twice by torchvision."""
    from PIL import Image
    from torchvision import transforms as T

    jitter = T.RandomApply([T.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8)
    crop, flip = T.RandomResizedCrop(setting.image_size), T.RandomHorizontalFlip()
    view = T.Compose([crop, flip, jitter, T.RandomGrayscale(0.2), T.ToTensor()])
    dataset = TwoViews([Image.fromarray(image) for image in _images(setting)], [view, view])
    # one epoch without end, so that no worker starts anew between two timed steps
    endless = RandomSampler(dataset, replacement=True, num_samples=10**9)
    loader = DataLoader(
        dataset,
        batch_size=setting.batch_size,
        sampler=endless,
        # more than there are cores would slow the peer
        num_workers=min(WORKERS, len(os.sched_getaffinity(0))),
        pin_memory=setting.device.type == "cuda",
    )
    return iter(loader)


def _lightly(setting: Setting) -> Callable[[], object]:
    """The fastest form of lightly's plain step."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    calls = {}
    halves = (False, True) if setting.device.type == "cuda" else (False,)
    for autocast, layout in itertools.product(halves, _LAYOUTS):
        torch.manual_seed(0)
        backbone, features = nn.build_encoder(setting.arch, setting.image_size)
        head = SimCLRProjectionHead(features, 512, 128)
        model = torch.nn.Sequential(backbone, head).to(setting.device, memory_format=layout)
        call = partial(
            _plain_by_hand,
            model,
            NTXentLoss(temperature=TEMPERATURE),
            torch.optim.Adam(model.parameters(), lr=3e-4, fused=True),
            torch.amp.GradScaler(setting.device.type, enabled=autocast),
            *setting.views(torch.float32, layout),
        )
        for _ in range(3):
            call()
        calls[f"autocast {autocast}, {layout}"] = call
    return calls[timing.fastest(calls, setting.device)]


def _plain_by_hand(
    model: torch.nn.Module,
    criterion: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    x_p: Tensor,
    x_q: Tensor,
) -> None:
    optimizer.zero_grad()
    with torch.autocast(x_p.device.type, torch.float16, enabled=scaler.is_enabled()):
        loss = criterion(model(x_p), model(x_q))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


_PEERS: dict[str, Callable[[Setting], Callable[[], object]]] = {
    RELEASED: _released,
    WITH_LOADER: _released_with_loader,
    LIGHTLY: _lightly,
}


def _operations(setting: Setting) -> float:
    """Of one plain step, counted on a few images."""
    few = Setting(setting.arch, 4, setting.image_size, CPU)
    call = ours("plain", few, precision="fp32", compile="no")
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() * setting.batch_size / 4


def _parse(argv: list[str] | None) -> tuple[Any, Setting]:
    parser = _cli.Parser(prog="python -m benchmarks.engine", description=__doc__.splitlines()[0])
    known = _cli.name_list(_PEERS)
    parser.add_argument("--peers", type=known, default=list(_PEERS), metavar=",".join(_PEERS))
    return _cli.parse_training(parser, argv, batch_size=512, rounds=9)


if __name__ == "__main__":
    sys.exit(main())
