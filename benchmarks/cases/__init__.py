"""The registry of cases: what the CPU's commands and the GPU suite time, by name.

Each entry makes a `Case` of the sizes that it is given. A command or a stage says which sizes it
measures and which bars it holds them to.
"""

from collections.abc import Callable

from benchmarks.case import Case
from benchmarks.cases import losses
from benchmarks.cases.bank import bank, batch
from benchmarks.cases.images import linf_step, stem
from benchmarks.cases.language_models import unmasked
from benchmarks.cases.nt_xent import nt_xent

_MAKERS: tuple[Callable[..., Case], ...] = (
    *(nt_xent, unmasked, losses.queue, losses.pairs, losses.both_ways, losses.tied, losses.uel),
    *(losses.hard, losses.classes, losses.hard_classes, losses.nearest, losses.hardest),
    *(bank, batch, linf_step, stem),
)
CASES = {make.__name__: make for make in _MAKERS}
