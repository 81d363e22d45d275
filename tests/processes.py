"""Several processes on this machine that make one world, joined by gloo."""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clae_fast import distributed


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def context() -> multiprocessing.context.BaseContext:
    """Starts processes that find everything imported."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(
        ["pytest", "clae_fast.train", "torchvision.transforms.v2", "torch.utils.tensorboard"]
    )
    return found


def run(
    function: Callable[..., Any], size: int, folder: Path, *args: Any, timeout: float = 60
) -> list[Any]:
    """Calls `function(world, *args)` in `size` processes and returns what they return, by rank.

    Raises:
        AssertionError: one failed, or was not done after `timeout` seconds; none is left over.
    """
    paths = [folder / f"rank-{rank}.pt" for rank in range(size)]
    for path in paths:
        path.unlink(missing_ok=True)
    port = free_port()
    processes = [
        context().Process(target=_call, args=(function, rank, size, port, paths[rank], args))
        for rank in range(size)
    ]
    try:
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        assert not any(process.is_alive() for process in processes), f"not done in {timeout} s"
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
    found = [torch.load(path, weights_only=False) if path.exists() else {} for path in paths]
    errors = [f"rank {rank}: {result.get('error')}" for rank, result in enumerate(found)]
    assert [process.exitcode for process in processes] == [0] * size, "\n".join(errors)
    return [result["value"] for result in found]


def _call(
    function: Callable[..., Any], rank: int, size: int, port: int, path: Path, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    variables = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    result: dict[str, Any] = {}
    try:
        world = distributed.init("cpu")
        result["value"] = function(world, *args)
        world.shutdown()
    except BaseException:
        result["error"] = traceback.format_exc()
        raise
    finally:
        torch.save(result, path)
