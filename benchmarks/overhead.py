"""Measures what adversarial training costs: step time and peak memory, over plain training's.

    python -m benchmarks.overhead                           # ResNet-18, 64 images of 32x32
    python -m benchmarks.overhead --arch resnet50 --batch-size 256 --image-size 224 --device cuda
    python -m benchmarks.overhead --methods all             # or moco,caco: every method instead

A step is forward, backward, Adam and zero_grad on two views that are there already, in fp32. The
schedules are:

    plain           SimCLR, 6 units (a unit is one encoder forward of one view)
    plain_batched   both its views in one pass, BatchNorm by views, 6 units
    pair            the second view attacked inside the clean pair, 9 units
    self            the first view attacked against itself, as released, 11 units
    released        the order of the released code with our loss, 15 units
    released_as_is  the same with the released loss
    pair_added      pair, a fifth of the rows with an adversarial view beside the clean one, 6.6
    pair_replaced   pair, a fifth of the rows with an adversarial view for the clean one, 6.4
    pair_micro      pair in four chunks with cached embeddings, 12 units

With `--methods` the rows are the steps of methods instead, without an attack and with the pair
attack of one step, with the settings that their classes default to.

So that no ratio is bought with a slow baseline, time is over the faster of the two plain steps, and
plain is held against a SimCLR step written by hand in torch, on the same network, in the same
rounds. Every step uses channels_last where that is faster for plain and by hand, and the contiguous
layout otherwise. Peak memory is that of one step above weights, optimizer state and views.
"""

from __future__ import annotations

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
from benchmarks import _cli, machine, memory, timing
from benchmarks.cases.nt_xent import released_nt_xent
from benchmarks.results import Bar, Row, table, verdicts, write_json
from benchmarks.setting import Setting
from clae_fast import nn
from clae_fast.attack import LinfAttack
from clae_fast.methods import METHODS, Method
from clae_fast.steps import schedules
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions

PLAIN = ("plain", "plain_batched")
SCHEDULES = (
    *(*PLAIN, "pair", "self", "released", "released_as_is"),
    *("pair_added", "pair_replaced", "pair_micro"),
)
BY_HAND = "by hand"
CLASSES = 10
PLAIN_UNITS = 6
TEMPERATURE = 0.5
FRACTION = 0.2
CHUNKS = 4
ATTACK = LinfAttack(eps=8 / 255, lo=0.0, hi=1.0)
BARS = {
    name: Bar(f"{name} <= {bound} x the faster plain", at_most=bound, form="{:.3f}")
    for name, bound in (("pair", 1.6), ("self", 2.0))
}
PLAIN_BAR = Bar("plain <= 1.03 x a step by hand", at_most=1.03, form="{:.3f}")


def main(argv: list[str] | None = None) -> int:
    args, setting = _parse(argv)
    facts = machine.shown(setting.device)
    layout = _faster_layout(setting)
    layout_name = str(layout).removeprefix("torch.")
    print(f"\n{setting}, fp32, {layout_name}")
    names = _rows_of(args.methods)
    steps = {name: build(name, setting, layout) for name in (*names, BY_HAND)}
    flops = {name: _flops(training_step) for name, training_step in steps.items()}
    timings = timing.interleave(
        steps, rounds=args.rounds, device=setting.device, min_seconds=0.2, max_seconds=float("inf")
    )
    del steps
    measured = {
        name: {**timed.row(), "peak_mib": _peak(name, setting, layout)}
        for name, timed in timings.items()
    }
    peaks = {name: row["peak_mib"] for name, row in measured.items()}
    faster = min(PLAIN, key=lambda name: timings[name].ms)
    rows = [
        {
            "schedule": name,
            "units_ratio": flops[name] / flops["plain"],
            "time_ratio": timings[name].over(timings[faster]),
            "memory_ratio": _ratio(peaks[name], peaks["plain"]),
            **measured[name],
        }
        for name in names
    ]
    by_hand = {
        "plain_time_ratio": timings["plain"].over(timings[BY_HAND]),
        "plain_memory_ratio": _ratio(peaks["plain"], peaks[BY_HAND]),
        **measured[BY_HAND],
    }
    print(f"  x time: over {faster}")
    print(_table(rows, by_hand))
    got = {row["schedule"]: row["time_ratio"] for row in rows}
    values = {bar: got[name] for name, bar in BARS.items() if name in got}
    found = verdicts({**values, PLAIN_BAR: by_hand["plain_time_ratio"]})
    _cli.print_bars(found)
    if args.json:
        how = {"layout": layout_name, "time_over": faster}
        result = {"machine": facts, **setting.facts(), **how}
        write_json(args.json, {**result, "rows": rows, "by_hand": by_hand, "bars": found})
    return 0


def _rows_of(methods: Sequence[str]) -> tuple[str, ...]:
    """The schedules, or plain ones and rows such as "moco: none" and "moco: pair"."""
    methods = METHODS if "all" in methods else methods
    steps = [f"{method}: {kind}" for method in methods for kind in ("none", "pair")]
    return (*PLAIN, *steps) if steps else SCHEDULES


def build(schedule: str, setting: Setting, layout: torch.memory_format) -> Callable[[], None]:
    """One training step of a schedule, ready to be called again and again."""
    torch.manual_seed(0)
    backbone, features = nn.build_encoder(setting.arch, setting.image_size)
    encoder = nn.Encoder(backbone, nn.ProjectionHead(features, features, 128))
    encoder = encoder.to(setting.device, memory_format=layout)
    x_p, x_q = setting.views(torch.float32, layout)
    method, of_method, kind = schedule.partition(": ")
    if of_method:
        return _method_step(METHODS[method], kind, encoder, (x_p, x_q))
    adv_encoder = nn.adversarial_twin(encoder)
    loss = partial(clae_fast.nt_xent, temperature=TEMPERATURE)
    clean = (encoder, x_p, x_q)
    adversarial = (encoder, adv_encoder, x_p, x_q)
    pair = partial(schedules.pair_step, *adversarial, loss, attack=ATTACK)
    released = partial(schedules.released_step, *adversarial, attack=ATTACK)
    tied = partial(clae_fast.tied_nt_xent, temperature=TEMPERATURE)
    as_is = released_nt_xent(2 * setting.batch_size, TEMPERATURE)
    passes: dict[str, Callable[[], object]] = {
        BY_HAND: partial(_simclr_by_hand, *clean),
        "plain": partial(schedules.plain_step, *clean, loss),
        "plain_batched": partial(schedules.plain_step, *clean, loss, batched=True),
        "pair": pair,
        "self": partial(schedules.self_step, *adversarial, loss, attack=ATTACK, attack_grad=tied),
        "released": partial(released, loss=loss),
        "released_as_is": partial(released, loss=as_is),
        "pair_added": partial(pair, adv_fraction=FRACTION),
        "pair_replaced": partial(pair, adv_fraction=FRACTION, adv_replace=True),
        "pair_micro": partial(pair, micro_batch=-(-setting.batch_size // CHUNKS)),
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


def _faster_layout(setting: Setting) -> torch.memory_format:
    """channels_last, if it is faster for plain and by hand."""
    layouts = (torch.contiguous_format, torch.channels_last)
    names = (BY_HAND, "plain")
    steps = {(name, layout): build(name, setting, layout) for name in names for layout in layouts}
    for training_step in steps.values():
        training_step()
    timings = timing.interleave(steps, rounds=3, device=setting.device)
    gains = [timings[name, layouts[0]].over(timings[name, layouts[1]]) for name in names]
    return torch.channels_last if min(gains) > 1 else torch.contiguous_format


def _flops(training_step: Callable[[], None]) -> int:
    """Operations of one step, which is also its first: it makes the optimizer's state."""
    with FlopCounterMode(display=False) as counter:
        training_step()
    return counter.get_total_flops()


def _peak(schedule: str, setting: Setting, layout: torch.memory_format) -> float | None:
    # a first call makes the optimizer's state and loads the code
    return memory.peak_of(build, schedule, setting, layout, device=setting.device, calls=1)


def _ratio(peak: float | None, plain: float | None) -> float | None:
    return None if peak is None or not plain else peak / plain


def _table(rows: list[Row], by_hand: Row) -> str:
    units = [{**row, "units": PLAIN_UNITS * row["units_ratio"]} for row in rows]
    keys = "ms p20_ms p80_ms units units_ratio time_ratio peak_mib memory_ratio"
    first = {"schedule": BY_HAND, "units": PLAIN_UNITS, **by_hand}
    return table([first, *units], "schedule", keys)


def _parse(argv: list[str] | None) -> tuple[Any, Setting]:
    parser = _cli.Parser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    help = f"their steps instead of the schedules: all, or of {', '.join(METHODS)}"
    names = _cli.name_list(("all", *METHODS))
    parser.add_argument("--methods", type=names, default=(), metavar="NAMES", help=help)
    return _cli.parse_training(parser, argv, batch_size=64, rounds=5)


if __name__ == "__main__":
    sys.exit(main())
