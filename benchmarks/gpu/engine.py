"""The stage of the training step: what an attack adds to it, and how fast the peers are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks import engine
from benchmarks.engine import FROM_IMAGES, LIGHTLY, RELEASED, WITH_LOADER
from benchmarks.gpu.stage import Suite, Task, bar
from benchmarks.results import Bar
from benchmarks.setting import Setting

# the dense 16-bit rate of an H200, as measured, in 10^12 operations a second
PEAK_TFLOPS = 790
# what a step may cost over the faster of the two plain ones
RATIOS = {"pair": 1.55, "self": 1.95}
# how many times as fast ours must be
SPEEDUPS = {("pair", RELEASED): 4.0, (FROM_IMAGES, WITH_LOADER): 8.0, ("pair", LIGHTLY): 1.0}
# arch, batch, image size, seconds, and whether peers and the share of the peak are measured
CASES = (
    ("resnet18", 512, 32, 180, True, False),
    ("resnet18", 1024, 32, 100, False, True),
    ("resnet50", 256, 224, 240, False, False),
)


def steps(suite: Suite) -> Iterator[Task]:
    """Plain, batched, pair and self steps, and the peers'."""
    for arch, batch_size, image_size, seconds, peers, share in CASES:
        what = f"{arch}, {batch_size} of {image_size}x{image_size}"
        bars: dict[object, Bar] = {}
        if share:
            text = f"plain step's share of {PEAK_TFLOPS} TFLOP/s, {what}"
            bars["share"] = bar("engine", text, at_least=0.30)
        else:
            for name, bound in RATIOS.items():
                bars[name] = bar("engine", f"{name} over plain, {what}", at_most=bound)
            text = f"peak memory of pair over plain, {what}"
            bars["memory"] = bar("engine", text, at_most=1.02)
        for pair in SPEEDUPS if peers else ():
            text = f"{pair[0]} against {pair[1]}, {what}"
            bars[pair] = bar("engine", text, at_least=SPEEDUPS[pair])
        setting = Setting(
            arch if not suite.rehearsal else "resnet-narrow",
            suite.size(batch_size, 8),
            suite.size(image_size, 16),
            suite.device,
        )
        run = partial(_steps, suite, what, setting, bars)
        yield Task("engine", what, seconds, run, tuple(bars.values()))


def _steps(suite: Suite, what: str, setting: Setting, bars: dict[object, Bar]) -> None:
    peers = list(dict.fromkeys(peer for _, peer in SPEEDUPS if (_, peer) in bars))
    rows = engine.measure(setting, rounds=2 if suite.rehearsal else 9, peers=peers)
    found = {row["step"]: row for row in rows}
    for row in rows:
        suite.results.add({"stage": "engine", "setting": what, **row})
    for key, bound in bars.items():
        value = _value(key, found)
        if value is not None:
            suite.results.judge(bound, value, {"stage": "engine", "setting": what})


def _value(key: object, found: dict[str, dict]) -> float | None:
    """What a bar bounds, or None where a peer is not here or memory did not suffice."""
    if key == "share":
        fastest = min((found["plain"], found["plain batched"]), key=lambda row: row["ms"])
        return fastest["tflops"] / PEAK_TFLOPS
    if key == "memory":
        pair, plain = (found[name]["peak_mib"] for name in ("pair", "plain"))
        return pair / plain if pair and plain else None
    if isinstance(key, tuple):
        name, peer = key
        return found[peer]["over_ours"][name] if peer in found else None
    return found[key]["over_plain"]
