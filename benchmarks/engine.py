"""What the training engine makes of a machine: a step's cost over plain's, and over its peers'.

    python -m benchmarks.engine --device cuda                        # ResNet-18, 512 of 32x32
    python -m benchmarks.engine --device cuda --arch resnet50 --batch-size 256 --image-size 224
    python -m benchmarks.engine --batch-size 32 --image-size 16      # the CPU, to try it

A step goes from two views to the moved weights, with Adam. Ours run as `python -m clae_fast.train`
runs them, by default in fp16, compiled and captured on a GPU:

    plain, plain batched, pair, self    on views that are on the device
    pair from images                    on 8-bit images there, augmented at every step

and the peers in the same rounds, each in its best form:

    released                released CLAE's step and loss, fp32 as released (TF32 on a GPU)
    released with loader    the same on images that four workers augment with torchvision and PIL
    lightly plain           a plain step with lightly's head and loss, fp32 or fp16 autocast,
                            contiguous or channels_last: the fastest of the four

Ratios are medians of the ratios within rounds. Operations are those of one plain step, by torch's
FLOP counter. Peak memory is that of one step, not captured, above weights and views, in a process
of its own.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import _cli, memory, timing
from benchmarks.peers import released_nt_xent
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
_FORMS = [
    (autocast, layout)
    for autocast in (False, True)
    for layout in (torch.contiguous_format, torch.channels_last)
]


@dataclass(frozen=True)
class Setting:
    """What is trained on what."""

    arch: str
    batch_size: int
    image_size: int
    device: torch.device

    @property
    def images(self) -> int:
        """Images in the data set: some batches, whatever their size."""
        return max(IMAGES // (8 if self.image_size > 64 else 1), 4 * self.batch_size)

    def views(self, dtype: torch.dtype, layout: torch.memory_format) -> list[Tensor]:
        """Two views of a batch in [0, 1]."""
        shape = (self.batch_size, 3, self.image_size, self.image_size)
        return [
            torch.rand(shape, device=self.device).to(dtype, memory_format=layout) for _ in range(2)
        ]


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    machine = timing.machine(args.device)
    print(timing.header(machine))
    setting = Setting(args.arch, args.batch_size, args.image_size, args.device)
    rows = measure(setting, rounds=args.rounds, peers=args.peers)
    print(f"\n{setting.arch}, {setting.batch_size} of {setting.image_size}x{setting.image_size}")
    _report(rows)
    if args.json:
        result = {"machine": machine, **asdict(setting), "device": str(setting.device)}
        _cli.write_json(args.json, {**result, "rounds": args.rounds, "rows": rows})
    return 0


def measure(setting: Setting, *, rounds: int, peers: Sequence[str]) -> list[dict[str, Any]]:
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
    peaks = {
        name: memory.in_fresh_process(_peak_here, name, asdict(setting))
        for name in ("plain", "pair")
    }
    return [
        {
            "step": name,
            "ms": timings[name].ms,
            "p20_ms": timings[name].p20_p80_ms[0],
            "p80_ms": timings[name].p20_p80_ms[1],
            "samples": len(timings[name].seconds),
            "quiet": timings[name].quiet,
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
    split = data.Split.whole(Arrays(_images(setting)), np.arange(setting.images) % 10)
    return iter(
        data.view_source(
            split,
            data.RECIPES["simclr_cifar" if setting.image_size <= 64 else "simclr"],
            image_size=setting.image_size,
            batch_size=setting.batch_size,
            epochs=10**6,
            seed=0,
            start=0,
            device=setting.device,
            dtype=dtype,
            workers=0,
            resident="yes",
        )
    )


def _images(setting: Setting) -> np.ndarray:
    """Random images as bytes, [S, H, W, 3]."""
    shape = (setting.images, setting.image_size, setting.image_size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _released(setting: Setting) -> Callable[[], object]:
    train = _released_step(setting)
    views = setting.views(torch.float32, torch.contiguous_format)
    return lambda: train(*views)


def _released_with_loader(setting: Setting) -> Callable[[], object]:
    train, views = _released_step(setting), _loaded(setting)

    def call() -> None:
        train(*(view.to(setting.device, non_blocking=True) for view in next(views)))

    return call


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


class _TwoViews(Dataset):
    """A data set as released: PIL images in memory, augmented twice by torchvision."""

    def __init__(self, setting: Setting) -> None:
        from torchvision import transforms as T

        self.images = _images(setting)
        jitter = T.RandomApply([T.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8)
        crop, flip = T.RandomResizedCrop(setting.image_size), T.RandomHorizontalFlip()
        self.view = T.Compose([crop, flip, jitter, T.RandomGrayscale(0.2), T.ToTensor()])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from PIL import Image

        image = Image.fromarray(self.images[index])
        return self.view(image), self.view(image)


def _loaded(setting: Setting) -> Iterator[list[Tensor]]:
    dataset = _TwoViews(setting)
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
    for autocast, layout in _FORMS if setting.device.type == "cuda" else _FORMS[:2]:
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
    return calls[timing.fastest(calls)]


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
    few = Setting(setting.arch, 4, setting.image_size, torch.device("cpu"))
    call = ours("plain", few, precision="fp32", compile="no")
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() * setting.batch_size / 4


def _peak_here(name: str, setting: dict[str, Any]) -> float | None:
    """Peak of one step in this process, or None where memory is too short for it."""
    here = Setting(**setting)
    call = ours(name, here, capture="no")
    try:
        for _ in range(3):
            call()
        return memory.peak_mib(call, here.device)
    except (RuntimeError, MemoryError):
        return None


def _report(rows: list[dict[str, Any]]) -> None:
    print(
        f"  {'':<22}{'ms':>10}{'p20':>10}{'p80':>10}{'images/s':>11}{'x plain':>9}{'TFLOP/s':>9}"
        f"{'MiB':>9}{'quiet':>8}"
    )
    for row in rows:
        tflops = "" if row["tflops"] is None or "plain" not in row["step"] else row["tflops"]
        numbers = [
            f"{value:>{width}.{digits}f}" if isinstance(value, float) else f"{'':>{width}}"
            for value, width, digits in (
                (row["ms"], 10, 2),
                (row["p20_ms"], 10, 2),
                (row["p80_ms"], 10, 2),
                (row["images_per_second"], 11, 0),
                (row["over_plain"], 9, 3),
                (tflops, 9, 1),
                (row["peak_mib"], 9, 0),
            )
        ]
        print(f"  {row['step']:<22}{''.join(numbers)}{row['quiet']:>5}/{row['samples']:<2}")


def _parse(argv: list[str] | None) -> Any:
    parser = _cli.Parser(prog="python -m benchmarks.engine", description=__doc__.splitlines()[0])
    known = tuple(_PEERS)
    parser.add_argument(
        "--peers", type=_cli.name_list(known), default=list(known), metavar=",".join(known)
    )
    return _cli.parse_training(parser, argv, batch_size=512, rounds=9)


if __name__ == "__main__":
    sys.exit(main())
