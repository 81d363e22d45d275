"""The training loop: epochs, log points, checkpoints and resume. It knows no method's formula."""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from clae_fast import data
from clae_fast.config import Config
from clae_fast.distributed import World
from clae_fast.distributed.device import pick_device
from clae_fast.errors import CheckpointError, NonFiniteError
from clae_fast.nn import Encoder
from clae_fast.nn.sync_norm import convert
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepResult
from clae_fast.training import build, checkpoint
from clae_fast.training.engine import Engine
from clae_fast.training.metrics import LossWindow, MetricsLog
from clae_fast.training.optimizer import lr_factor
from clae_fast.training.run_folder import RunFolder
from clae_fast.training.watch import Watch


class Trainer:
    """A run: data, method, optimizer, and how many steps are done.

    Making one seeds torch's global generator with the run's seed.

    Args:
        config: The settings.
        world: The processes that train together; one alone by default.
        progress: Whether bars on stderr show how far it is.

    Attributes:
        world: The processes that train together.
        device: Where it trains.
        splits: The data set.
        train: The training images.
        labeled: The training images that have labels, to evaluate with.
        held: Labeled images for validation, which are in neither of these two; None without.
        test: The test images, which training never reads.
        method: Encoders and loss.
        engine: Takes the steps.
        global_step: Optimizer steps done.
        saved: Steps that are in a checkpoint, None before the first checkpoint.

    Raises:
        DataError: The data set cannot be used.
        ValueError: The settings do not fit the data or this machine.
    """

    def __init__(
        self, config: Config, world: World | None = None, *, progress: bool = True
    ) -> None:
        self.config = config
        self._progress = progress
        self.world = world or World.single(pick_device(config.engine.device))
        self.world.local_batch(config.optimization.batch_size)
        self.device = self.world.device
        with self.world.one_at_first():
            self.splits = build.load_data(config.data)
        (self.train, self.labeled, self.test), self.held = build.hold_out(config.run, self.splits)
        torch.manual_seed(config.run.seed)
        self.method = build.build_method(config, self.device)
        # the same seed gives the same weights only on machines that are alike
        self.world.share(self.method)
        if config.engine.sync_norm:
            convert(self.method, self.world)
        options = build.step_options(config)
        self.engine = Engine(config, self.method, options, self.device, self.world)
        self.global_step = 0
        self.saved: int | None = None
        self._steps_per_epoch = build.build_schedule(config, len(self.train)).steps_per_epoch
        self._lr_factor = lr_factor(config.optimization, self._steps_per_epoch)
        self._metrics_size = 0
        self._window = LossWindow()
        self._watch = Watch(config, self.labeled, self.held, self.device)
        # the step and the validation accuracy of the best checkpoint
        self._best: dict[str, float] | None = None

    @functools.cached_property
    def views(self) -> data.ViewSource:
        """The views of all steps to come, which are prepared when they are first asked for."""
        return build.build_views(
            self.config,
            self.train,
            self.world,
            start=self.global_step,
            dtype=self.engine.dtype,
            progress=self._progress,
        )

    def restore(self, folder: RunFolder) -> None:
        """Restores the state of a run's last checkpoint, if it has one.

        Raises:
            CheckpointError: The checkpoint is damaged, or of another run.
            ValueError: The run is already past its last epoch.
        """
        if not folder.checkpoint.exists():
            return
        state = checkpoint.load(folder.checkpoint)
        try:
            self._take(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"checkpoint {folder.checkpoint} is not one of this run: {checkpoint.reason(error)}"
            ) from error
        epochs, done = self.config.optimization.epochs, self.global_step / self._steps_per_epoch
        if done > epochs:
            raise ValueError(f"epochs is {epochs}, but the run has done {done:g}")

    def _take(self, state: dict[str, Any]) -> None:
        self.method.load_state_dict(state["method"])
        self.engine.load_state_dict(state)
        self.global_step = self.saved = state["step"]
        self._metrics_size = state["metrics_size"]
        # version 0.1 had no validation
        self._best = state.get("best")
        # version 0.1 saved at log points only, where the window is empty
        if "window" in state:
            self._window.load_state_dict(state["window"], self.device)
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def fit(
        self,
        folder: RunFolder,
        *,
        stopped: Callable[[], bool] = lambda: False,
        log: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        """Trains to the last epoch; the process that leads writes into `folder`.

        Args:
            folder: The run.
            stopped: Is asked after every step whether to end early, with a checkpoint. Only a
                process that trains alone asks.
            log: Is called with the step and the values of every log point.

        Raises:
            LostWorkerError: Another process is gone.
            NonFiniteError: Training diverged; the checkpoint before it remains.
            CheckpointError: A checkpoint cannot be written; the one before it remains.
            DataError: An image is damaged.
        """
        batch_size = self.config.optimization.batch_size
        self.method.train()
        if not self.world.leads:
            self._follow()
            return
        start, size, left = self.global_step, self._metrics_size, len(self.views)
        with (
            MetricsLog(folder, global_step=start, size=size, also=log) as metrics,
            tqdm(
                total=(start + left) * batch_size,
                initial=start * batch_size,
                unit="img",
                dynamic_ncols=True,
                disable=not self._progress,
            ) as bar,
        ):
            if start == 0:
                self._save(folder, metrics)
            for batch in self._batches(stopped):
                self._window.add(self._train_step(batch))
                self.global_step += 1
                bar.update(batch_size)
                save = self._saves_now()
                if save or self.global_step % self.config.run.log_every == 0:
                    self._log(folder, metrics, bar)
                    self._window = LossWindow()
                if save:
                    self._save(folder, metrics)
            if self.saved != self.global_step:
                self._save(folder, metrics)

    def _batches(self, stopped: Callable[[], bool]) -> Iterator[Batch]:
        """The batches to come, until `stopped` says to end."""
        batches = iter(self.views)
        while not (stopped() and self.world.size == 1):
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError:
                # the signal may have ended loader processes too
                if not stopped():
                    raise
                return
            yield batch

    def _follow(self) -> None:
        """Trains on this process's rows, while another process logs, validates and saves."""
        # random layers draw different numbers for different rows
        torch.manual_seed(hash((self.config.run.seed, self.global_step, self.world.rank)) % 2**63)
        if self.global_step == 0:
            self.world.require_equal(self.method)
        for batch in self.views:
            self._train_step(batch)
            self.global_step += 1
            if self._saves_now():
                self.world.require_equal(self.method)

    def _train_step(self, batch: Batch) -> StepResult:
        # there are always two large views, of which a method may take one
        taken = self.method.views + self.config.views.small_crops
        return self.engine.step(
            batch._replace(views=batch.views[:taken]),
            global_step=self.global_step,
            lr=self._lr(self.global_step),
            progress=self.global_step / (self.config.optimization.epochs * self._steps_per_epoch),
        )

    def _lr(self, global_step: int) -> float:
        return self.config.optimization.lr * self._lr_factor(global_step)

    def _saves_now(self) -> bool:
        every = self.config.run.checkpoint_every
        ends_epoch = self.global_step % self._steps_per_epoch == 0
        return ends_epoch or (every is not None and self.global_step % every == 0)

    def _ends_epoch(self, every: int | None) -> bool:
        """Whether this is the end of an epoch whose number `every` divides."""
        epoch, rest = divmod(self.global_step, self._steps_per_epoch)
        return every is not None and self.global_step > 0 and rest == 0 and epoch % every == 0

    def _validate(self) -> dict[str, float]:
        """Measures the encoder, and remembers the best accuracy on held out images."""
        found = self._watch.measure(cast(Encoder, self.method.encoder))
        self.method.train()
        best = self._best
        if "val_knn" in found and (best is None or found["val_knn"] > best["val_knn"]):
            self._best = {"step": self.global_step} | found
        return found

    def _log(self, folder: RunFolder, log: MetricsLog, bar: tqdm) -> None:
        losses = self._window.means()
        for name, value in losses.items():
            if not math.isfinite(value):
                raise self._diverged(f"{name} is {value}", folder)
        bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()}, refresh=False)
        epoch = self.global_step / self._steps_per_epoch
        rate = self._window.rate() * self.config.optimization.batch_size
        values = {"epoch": epoch, **losses, "lr": self._lr(self.global_step - 1)}
        if self._ends_epoch(self.config.run.val_every):
            values |= self._validate()
        log.write(self.global_step, values, rate)

    def _save(self, folder: RunFolder, log: MetricsLog) -> None:
        # the loss of the last step was taken before it moved the weights
        if not all(bool(p.isfinite().all()) for p in self.method.parameters()):
            raise self._diverged("a weight is not finite", folder)
        self.world.require_equal(self.method)
        cuda = self.device.type == "cuda"
        state = {
            "step": self.global_step,
            "method": self.method.state_dict(),
            **self.engine.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
            "metrics_size": log.sync(),
            "best": self._best,
            "window": self._window.state_dict(),
        }
        # last.pt comes last: a run that is killed before resumes from the step before, and writes
        # the others again
        for path in (*self._stays(folder), folder.checkpoint):
            checkpoint.save(path, state)
        self.saved = self.global_step

    def _stays(self, folder: RunFolder) -> list[Path]:
        """The paths, besides last.pt, that this step's checkpoint is written to."""
        paths = []
        if self._best is not None and self._best["step"] == self.global_step:
            paths.append(folder.best)
        if self._ends_epoch(self.config.run.keep_every):
            paths.append(folder.kept(self.global_step // self._steps_per_epoch))
        return paths

    def _diverged(self, what: str, folder: RunFolder) -> NonFiniteError:
        return NonFiniteError(
            f"{what} at step {self.global_step}, training diverged: try a smaller lr or eps; "
            f"{folder.checkpoint} is from before"
        )
