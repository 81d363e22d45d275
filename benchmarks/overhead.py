"""What adversarial training costs: step time and peak memory of the schedules, over plain's.

    python -m benchmarks.overhead                           # ResNet-18, 64 images of 32x32
    python -m benchmarks.overhead --arch resnet50 --batch-size 256 --image-size 224 --device cuda
    python -m benchmarks.overhead --methods all             # or moco,caco: every method instead

A step is forward, backward, Adam and zero_grad on two views that are there already, in fp32. One
process, interleaved rounds; ratios are medians of the ratios within rounds. The schedules:

    plain           SimCLR, 6 units (a unit is one encoder forward of one view)
    plain_batched   both its views in one pass, BatchNorm by views, 6 units
    pair            the second view attacked inside the clean pair, 9 units
    self            the first view attacked against itself, as released, 11 units
    released        the order of the released code with our loss, 15 units
    released_as_is  the same with the released loss
    pair_added      pair, a fifth of the rows with an adversarial view beside the clean one, 6.6
    pair_replaced   pair, a fifth of the rows with an adversarial view for the clean one, 6.4
    pair_micro      pair in four chunks with cached embeddings, 12 units

With `--methods` the rows are the steps of methods, without an attack and with the pair attack of
one step, with the settings that their classes default to.

So that no ratio is bought with a slow baseline, time is over the faster of the two plain steps, and
plain is held against a SimCLR step written by hand in torch, on the same network, in the same
rounds. Every step uses channels_last where that is faster for plain and by hand, the contiguous
layout otherwise. Units are counted by torch's FLOP counter. Peak memory is that of one step above
weights, optimiser state and views: on the CPU the VmHWM of a fresh process, on a GPU the
allocator's peak.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import clae_fast
from benchmarks import _cli, memory, timing
from benchmarks.peers import released_nt_xent
from clae_fast import nn
from clae_fast.attack import LinfAttack
from clae_fast.methods import METHODS, Method
from clae_fast.steps import schedules
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions

PLAIN = ("plain", "plain_batched")
SCHEDULES = (
    *PLAIN,
    "pair",
    "self",
    "released",
    "released_as_is",
    "pair_added",
    "pair_replaced",
    "pair_micro",
)
BY_HAND = "by hand"
CLASSES = 10
PLAIN_UNITS = 6
TEMPERATURE = 0.5
FRACTION = 0.2
CHUNKS = 4
ATTACK = LinfAttack(eps=8 / 255, lo=0.0, hi=1.0)
BARS = {"pair": 1.6, "self": 2.0}
PLAIN_BAR = 1.03


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    machine = timing.machine(args.device)
    print(timing.header(machine))
    setting = (args.arch, args.image_size, args.device)
    layout = _faster_layout(args.batch_size, setting)
    print(
        f"\n{args.arch}, {args.batch_size} x 3 x {args.image_size} x {args.image_size}, fp32, "
        f"{str(layout).removeprefix('torch.')}"
    )
    rows_of = (*PLAIN, *_steps_of(args.methods)) if args.methods else SCHEDULES
    names = (*rows_of, BY_HAND)
    steps = {name: build(name, args.batch_size, layout, *setting) for name in names}
    flops = {name: _flops(training_step) for name, training_step in steps.items()}
    timings = timing.interleave(
        steps, rounds=args.rounds, device=args.device, min_seconds=0.2, max_seconds=float("inf")
    )
    del steps
    peaks = {
        name: memory.in_fresh_process(_peak_here, name, args.batch_size, layout, setting)
        for name in names
    }
    measured = {
        name: {
            "ms": timings[name].ms,
            "p20_ms": timings[name].p20_p80_ms[0],
            "p80_ms": timings[name].p20_p80_ms[1],
            "peak_mib": peaks[name],
            "samples": len(timings[name].seconds),
            "quiet": timings[name].quiet,
        }
        for name in names
    }
    faster = min(PLAIN, key=lambda name: timings[name].ms)
    rows = [
        {
            "schedule": name,
            "units_ratio": flops[name] / flops["plain"],
            "time_ratio": timings[name].over(timings[faster]),
            "memory_ratio": _ratio(peaks[name], peaks["plain"]),
            **measured[name],
        }
        for name in rows_of
    ]
    by_hand = {
        "plain_time_ratio": timings["plain"].over(timings[BY_HAND]),
        "plain_memory_ratio": _ratio(peaks["plain"], peaks[BY_HAND]),
        **measured[BY_HAND],
    }
    print(f"  x time: over {faster}")
    verdicts = _report(rows, by_hand)
    if args.json:
        result = {
            "machine": machine,
            "arch": args.arch,
            "batch_size": args.batch_size,
            "image_size": args.image_size,
            "device": str(args.device),
            "layout": str(layout).removeprefix("torch."),
            "time_over": faster,
            "rows": rows,
            "by_hand": by_hand,
            "bars": verdicts,
        }
        _cli.write_json(args.json, result)
    return 0


def _steps_of(methods: Sequence[str]) -> list[str]:
    """Rows such as "moco: none" and "moco: pair"."""
    return [f"{method}: {kind}" for method in methods for kind in ("none", "pair")]


def build(
    schedule: str,
    batch_size: int,
    layout: torch.memory_format,
    arch: str,
    image_size: int,
    device: torch.device,
) -> Callable[[], None]:
    """One training step of a schedule, ready to be called again and again."""
    torch.manual_seed(0)
    backbone, features = nn.build_encoder(arch, image_size)
    encoder = nn.Encoder(backbone, nn.ProjectionHead(features, features, 128))
    encoder = encoder.to(device, memory_format=layout)
    shape = (batch_size, 3, image_size, image_size)
    x_p, x_q = (torch.rand(shape, device=device).to(memory_format=layout) for _ in range(2))
    method, of_method, kind = schedule.partition(": ")
    if of_method:
        return _method_step(METHODS[method], kind, encoder, (x_p, x_q))
    adv_encoder = nn.adversarial_twin(encoder)
    loss = partial(clae_fast.nt_xent, temperature=TEMPERATURE)
    clean = (encoder, x_p, x_q)
    adversarial = (encoder, adv_encoder, x_p, x_q)
    pair = partial(schedules.pair_step, *adversarial, loss, attack=ATTACK)
    passes: dict[str, Callable[[], object]] = {
        BY_HAND: partial(_simclr_by_hand, *clean),
        "plain": partial(schedules.plain_step, *clean, loss),
        "plain_batched": partial(schedules.plain_step, *clean, loss, batched=True),
        "pair": pair,
        "self": partial(
            schedules.self_step,
            *adversarial,
            loss,
            attack=ATTACK,
            attack_grad=partial(clae_fast.tied_nt_xent, temperature=TEMPERATURE),
        ),
        "released": partial(schedules.released_step, *adversarial, loss, attack=ATTACK),
        "released_as_is": partial(
            schedules.released_step,
            *adversarial,
            released_nt_xent(2 * batch_size, TEMPERATURE),
            attack=ATTACK,
        ),
        "pair_added": partial(pair, adv_fraction=FRACTION),
        "pair_replaced": partial(pair, adv_fraction=FRACTION, adv_replace=True),
        "pair_micro": partial(pair, micro_batch=-(-batch_size // CHUNKS)),
    }
    trained = list(encoder.parameters())
    if schedule not in (BY_HAND, *PLAIN):
        shared = {id(weight) for weight in trained}
        trained += [weight for weight in adv_encoder.parameters() if id(weight) not in shared]
    optimizer = torch.optim.Adam(trained, lr=3e-4)

    def training_step() -> None:
        passes[schedule]()
        optimizer.step()
        optimizer.zero_grad()

    return training_step


def _method_step(
    kind_of: type[Method], kind: str, encoder: nn.Encoder, views: tuple[Tensor, Tensor]
) -> Callable[[], None]:
    """One training step of a method."""
    more: dict[str, Any] = {}
    if kind_of.needs_teacher:
        more["teacher"] = copy.deepcopy(encoder.backbone).eval().requires_grad_(False)
        encoder.head = torch.nn.Identity()
    method = kind_of(encoder, adversarial=kind != "none", **more)
    method.to(views[0].device)
    labels = torch.arange(len(views[0]), device=views[0].device) % CLASSES
    batch = Batch(views[: kind_of.views], labels if kind_of.needs_labels else None)
    options = StepOptions(kind=kind, attack=None if kind == "none" else ATTACK)
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=3e-4)

    def training_step() -> None:
        method.before_step(0.5)
        method.step(batch, options)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step()

    return training_step


def _simclr_by_hand(encoder: torch.nn.Module, x_p: Tensor, x_q: Tensor) -> None:
    """SimCLR as one writes it in torch: a pass a view, in-place masking, cross-entropy."""
    n = 2 * len(x_p)
    z = F.normalize(torch.cat((encoder(x_p), encoder(x_q))))
    logits = torch.mm(z / TEMPERATURE, z.t()).fill_diagonal_(-torch.inf)
    F.cross_entropy(logits, torch.arange(n, device=z.device).roll(n // 2)).backward()


def _faster_layout(batch_size: int, setting: tuple[str, int, torch.device]) -> torch.memory_format:
    layouts = (torch.contiguous_format, torch.channels_last)
    steps = {
        f"{name} {layout}": build(name, batch_size, layout, *setting)
        for name in (BY_HAND, "plain")
        for layout in layouts
    }
    for training_step in steps.values():
        training_step()
    timings = timing.interleave(steps, rounds=3, device=setting[2])
    gains = [
        timings[f"{name} {layouts[0]}"].over(timings[f"{name} {layouts[1]}"])
        for name in (BY_HAND, "plain")
    ]
    return torch.channels_last if min(gains) > 1 else torch.contiguous_format


def _flops(training_step: Callable[[], None]) -> int:
    """Operations of one step, which is also its first: it makes the optimiser's state."""
    with FlopCounterMode(display=False) as counter:
        training_step()
    return counter.get_total_flops()


def _peak_here(
    schedule: str,
    batch_size: int,
    layout: torch.memory_format,
    setting: tuple[str, int, torch.device],
) -> float | None:
    """Peak of one step in this process, or None where memory is too short for it."""
    device = setting[2]
    training_step = build(schedule, batch_size, layout, *setting)
    try:
        training_step()  # makes the optimiser's state and loads the code
        return memory.peak_mib(training_step, device)
    except (RuntimeError, MemoryError):
        return None


def _ratio(peak: float | None, plain: float | None) -> float | None:
    return None if peak is None or not plain else peak / plain


def _report(rows: list[dict[str, Any]], by_hand: dict[str, Any]) -> dict[str, str]:
    """Print the table and the bars; return the bars."""
    print(
        f"  {'':<18}{'ms':>10}{'p20':>10}{'p80':>10}{'units':>8}{'x units':>9}{'x time':>8}"
        f"{'MiB':>9}{'x memory':>10}{'quiet':>8}"
    )

    def line(name: str, row: dict[str, Any], units: str, ratios: tuple[str, str, str]) -> None:
        peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        print(
            f"  {name:<18}{row['ms']:>10.1f}{row['p20_ms']:>10.1f}{row['p80_ms']:>10.1f}"
            f"{units:>8}{ratios[0]:>9}{ratios[1]:>8}{peak:>9}{ratios[2]:>10}"
            f"{row['quiet']:>5}/{row['samples']:<2}"
        )

    line(BY_HAND, by_hand, "6.00", ("", "", ""))
    for row in rows:
        memory_ratio = "-" if row["memory_ratio"] is None else f"{row['memory_ratio']:.3f}"
        ratios = (f"{row['units_ratio']:.3f}", f"{row['time_ratio']:.3f}", memory_ratio)
        line(row["schedule"], row, f"{PLAIN_UNITS * row['units_ratio']:.2f}", ratios)

    got = {row["schedule"]: row["time_ratio"] for row in rows}
    bounds = {
        f"{name} <= {bound} x the faster plain": (got[name], bound)
        for name, bound in BARS.items()
        if name in got
    }
    bounds[f"plain <= {PLAIN_BAR} x a step by hand"] = (by_hand["plain_time_ratio"], PLAIN_BAR)
    verdicts = {
        bar: f"{'met' if ratio <= bound else 'missed'} ({ratio:.3f})"
        for bar, (ratio, bound) in bounds.items()
    }
    print("\nbars:")
    for bar, verdict in verdicts.items():
        print(f"  {verdict:<16} {bar}")
    return verdicts


def _parse(argv: list[str] | None) -> Any:
    parser = _cli.Parser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--methods",
        type=_methods,
        default=(),
        metavar="NAMES",
        help=f"their steps instead of the schedules: all, or of {', '.join(METHODS)}",
    )
    return _cli.parse_training(parser, argv, batch_size=64, rounds=5)


def _methods(text: str) -> tuple[str, ...]:
    names = tuple(METHODS) if text == "all" else tuple(text.split(","))
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no method {unknown[0]!r}: {', '.join(METHODS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
