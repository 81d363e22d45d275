"""What training logs: losses between log points, and the files that log points go to."""

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clae_fast.steps.options import StepResult
from clae_fast.training.run_folder import RunFolder


class LossWindow:
    """Losses since the last log point, summed on the device so that no step waits for them."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        # a plain step has no adversarial loss
        self._counts: Counter[str] = Counter()
        self._steps, self._start = 0, time.perf_counter()

    def add(self, result: StepResult) -> None:
        """Adds the losses of a step."""
        self._steps += 1
        for name, value in (("loss", result.loss), ("adv_loss", result.adv_loss)):
            if value is not None:
                self._sums[name] = self._sums.get(name, 0) + value
                self._counts[name] += 1

    def means(self) -> dict[str, float]:
        """The mean of each loss by its name in metrics.jsonl."""
        return {name: float(total) / self._counts[name] for name, total in self._sums.items()}

    def rate(self) -> float:
        """Steps per second, of the steps that this process took."""
        return self._steps / (time.perf_counter() - self._start)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"sums": self._sums, "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restores what `state_dict` gave."""
        self._sums = {name: total.to(device) for name, total in state["sums"].items()}
        self._counts = Counter(state["counts"])


class MetricsLog:
    """Writes log points to metrics.jsonl and TensorBoard.

    Args:
        folder: The run.
        global_step: Steps that are already done.
        size: Bytes of metrics.jsonl that belong to these steps; what follows is dropped.
        also: Is called with the step and the values that TensorBoard gets, at every log point.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        global_step: int,
        size: int,
        also: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = str(folder.path / "metrics.jsonl")
        self._file = open(path, "ab")  # noqa: SIM115 - closed by __exit__
        # truncating to more than there is would fill the file with zeros
        self._file.truncate(min(size, self._file.tell()))
        self._events = SummaryWriter(str(folder.path), purge_step=global_step)
        self._also = also

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # on a full disk closing fails as well, after the error that says so
        with contextlib.suppress(*([OSError] if kind else [])):
            self._file.close()
            self._events.close()

    def write(self, global_step: int, values: dict[str, float], images_per_second: float) -> None:
        """Adds a log point; the rate, which no rerun repeats, goes to TensorBoard alone.

        Raises:
            OSError: The file cannot be written, for example on a full disk.
        """
        try:
            self._file.write((json.dumps({"step": global_step} | values) + "\n").encode())
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error
        values = values | {"images_per_second": images_per_second}
        for name, value in values.items():
            self._events.add_scalar(name, value, global_step)
        if self._also is not None:
            self._also(global_step, values)

    def sync(self) -> int:
        """Makes the lines so far durable and returns their size in bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()
