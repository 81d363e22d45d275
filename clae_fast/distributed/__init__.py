"""Several processes train as one: what they are, what they exchange, and where they compute."""

from clae_fast.distributed.world import World, init, reports_first, started_by_torchrun

__all__ = ["World", "init", "reports_first", "started_by_torchrun"]
