"""The stage of the banks of learnable keys: CaCo's and AdCo's work on a batch, against torch."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.case import OURS
from benchmarks.cases import CASES
from benchmarks.cases.bank import TEMPERATURES
from benchmarks.gpu.stage import Suite, Task, judged
from benchmarks.results import Bar

N, K, D = 256, 65536, 128
CHECKED_KEYS = 8192
AT_LEAST = 4.0


def bank(suite: Suite) -> Iterator[Task]:
    """Loss, encoder's gradient and bank's update."""
    for method in TEMPERATURES:
        text = f"best of torch over replayed {OURS}, {method}, N={N}, K={K}, D={D}"
        # torch.compile takes most of the time
        yield judged("bank", text, 150, _compare, suite, method, at_least=AT_LEAST)


def _compare(suite: Suite, method: str, bar: Bar) -> None:
    n, k, d = suite.size(N, 8), suite.size(K, 64), suite.size(D, 16)
    case = CASES["batch"](method, n, k, d)
    small = CASES["batch"](method, n, suite.size(CHECKED_KEYS, 64), d)
    measured, _ = suite.against_peers(case, small, case.peers, small)
    ours = measured[OURS, "replayed"]
    ratios = {name: timed.over(ours) for (name, _), timed in measured.items()}
    best = min(set(ratios) - {OURS}, key=ratios.__getitem__)
    for (name, _), timed in measured.items():
        row = {**timed.row("us"), "stage": "bank", "method": method, "candidate": name}
        row |= {"N": n, "K": k, "D": d, "ratio": ratios[name]}
        suite.results.judge(bar if name == best else None, ratios[name], row)
