"""Several processes as one: who they are, what they exchange, where each computes."""

from clae_fast.distributed.world import World, init, reports_first, started_by_torchrun

__all__ = ["World", "init", "reports_first", "started_by_torchrun"]
