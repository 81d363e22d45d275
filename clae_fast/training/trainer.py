"""The training loop: epochs, log points, checkpoints and resume. It knows no method's formula."""

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from clae_fast import data
from clae_fast.config import Config
from clae_fast.distributed import World
from clae_fast.distributed.device import pick_device
from clae_fast.errors import CheckpointError, NonFiniteError
from clae_fast.evaluation import extract_features, knn_accuracy, leave_one_out_knn
from clae_fast.evaluation.features import batches
from clae_fast.nn import Encoder
from clae_fast.nn.sync_norm import convert
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepResult
from clae_fast.training import checkpoint
from clae_fast.training.build import build_attack, build_method, hold_out
from clae_fast.training.engine import Engine
from clae_fast.training.optimizer import lr_factor
from clae_fast.training.run_folder import MetricsLog, RunFolder

# labelled images that show how training goes, where none are held out
_WATCHED = 512


class Trainer:
    """A run: data, method, optimiser and the place in the schedule.

    Building one seeds torch's global generator with `config.run.seed`.

    Args:
        config: the settings.
        world: the processes that train together; one alone by default.
        progress: whether bars on stderr show how far it is.

    Attributes:
        world: those processes.
        device: where it trains.
        splits: the data set.
        train: the training images.
        labelled: those of them that have labels, to evaluate with.
        held: labelled images for validation, no part of the two; None without.
        test: the test images, untouched by training.
        method: encoders and loss.
        engine: takes the steps.
        step: optimiser steps done.
        saved: those that a checkpoint has, None before the first.

    Raises:
        DataError: the data set cannot be used.
        ValueError: settings that do not fit the data or this machine.
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
            self.splits = data.load(
                config.data.dataset,
                data_dir=config.data.data_dir,
                limit=config.data.limit,
                download=config.data.download,
                on_corrupt=config.data.on_corrupt,
            )
        (self.train, self.labelled, self.test), self.held = hold_out(config, self.splits)
        torch.manual_seed(config.run.seed)
        self.method = build_method(config, self.device)
        # the same seed gives the same weights on machines that are alike
        self.world.share(self.method)
        if config.engine.sync_norm:
            convert(self.method, self.world)
        self.engine = Engine(config, self.method, build_attack(config), self.device, self.world)
        self.step = 0
        self.saved: int | None = None
        self._steps_per_epoch = data.BatchSchedule(
            len(self.train),
            config.optimization.batch_size,
            epochs=config.optimization.epochs,
            seed=config.run.seed,
        ).steps_per_epoch
        self._lr_factor = lr_factor(config.optimization, self._steps_per_epoch)
        self._metrics_size = 0
        self._window = _Window()
        # the step and the validation accuracy of the best checkpoint
        self._best: dict[str, float] | None = None

    @functools.cached_property
    def views(self) -> data.ViewSource:
        """The views of all steps to come, which are prepared when they are first asked for.

        Raises:
            DataError: an image is damaged.
            ValueError: the images have to stay on the device, and do not fit.
        """
        config = self.config
        return data.view_source(
            self.train,
            data.Recipe.of(config.views),
            image_size=config.views.image_size,
            batch_size=config.optimization.batch_size,
            epochs=config.optimization.epochs,
            seed=config.run.seed,
            start=self.step,
            device=self.device,
            dtype=self.engine.dtype,
            workers=config.data.workers,
            resident=config.data.resident,
            labels=self.method.needs_labels,
            small_crops=config.views.small_crops,
            small_crop_size=config.views.small_crop_size,
            small_crop_scale=config.views.small_crop_scale,
            rank=self.world.rank,
            world=self.world.size,
            progress=self._progress,
        )

    def restore(self, folder: RunFolder) -> None:
        """Takes up the state of a run's checkpoint, if it got as far as the first.

        Raises:
            CheckpointError: the checkpoint is damaged, or not of such a run.
            ValueError: the run is already past its last epoch.
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
        if self.step > self.config.optimization.epochs * self._steps_per_epoch:
            raise ValueError(
                f"epochs is {self.config.optimization.epochs}, but the run has done "
                f"{self.step / self._steps_per_epoch:g}"
            )

    def _take(self, state: dict[str, Any]) -> None:
        self.method.load_state_dict(state["method"])
        self.engine.load_state_dict(state)
        self.step = self.saved = state["step"]
        self._metrics_size = state["metrics_size"]
        # version 0.1 had no validation
        self._best = state.get("best")
        # nor did it stop between log points
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
            folder: the run.
            stopped: whether to end before that, with a checkpoint after the step under way; asked
                after every step, and heeded by a process that is alone.
            log: takes log points as well, as `MetricsLog.write` does.

        Raises:
            LostWorkerError: another process is gone.
            NonFiniteError: training diverged; the checkpoint before it remains.
            CheckpointError: a checkpoint cannot be written; the one before it remains.
            DataError: an image is damaged.
        """
        config = self.config
        self.method.train()
        if not self.world.leads:
            self._follow()
            return
        done, size = (
            self.step * config.optimization.batch_size,
            len(self.views) * config.optimization.batch_size,
        )
        with (
            MetricsLog(folder, step=self.step, size=self._metrics_size, also=log) as metrics,
            tqdm(
                total=done + size,
                initial=done,
                unit="img",
                dynamic_ncols=True,
                disable=not self._progress,
            ) as bar,
        ):
            if self.step == 0:
                self._save(folder, metrics)
            for batch in self._batches(stopped):
                self._window.add(self._train_step(batch))
                self.step += 1
                bar.update(config.optimization.batch_size)
                save = self._saves_at(self.step)
                if save or self.step % config.run.log_every == 0:
                    self._log(folder, metrics, bar)
                    self._window = _Window()
                if save:
                    self._save(folder, metrics)
            if self.saved != self.step:
                self._save(folder, metrics)

    def _batches(self, stopped: Callable[[], bool]) -> Iterator[Batch]:
        """The batches to come, until somebody wishes to stop."""
        batches = iter(self.views)
        while not (stopped() and self.world.size == 1):
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError:
                # loader processes may have had the same signal
                if not stopped():
                    raise
                return
            yield batch

    def _follow(self) -> None:
        """Trains on this process's rows, while another one logs, validates and saves."""
        # random layers draw other numbers for other rows
        torch.manual_seed(hash((self.config.run.seed, self.step, self.world.rank)) % 2**63)
        if self.step == 0:
            self.world.require_equal(self.method)
        for batch in self.views:
            self._train_step(batch)
            self.step += 1
            if self._saves_at(self.step):
                self.world.require_equal(self.method)

    def _train_step(self, batch: Batch) -> StepResult:
        # two large views are made at least, of which a method may take one
        batch = batch._replace(
            views=batch.views[: self.method.views + self.config.views.small_crops]
        )
        done = self.step / (self.config.optimization.epochs * self._steps_per_epoch)
        return self.engine.step(batch, number=self.step, lr=self._lr(self.step), progress=done)

    def _lr(self, step: int) -> float:
        return self.config.optimization.lr * self._lr_factor(step)

    def _saves_at(self, step: int) -> bool:
        every = self.config.run.checkpoint_every
        return step % self._steps_per_epoch == 0 or (every is not None and step % every == 0)

    def _ends_epoch(self, every: int | None) -> bool:
        """Whether this is the end of an epoch whose number `every` divides."""
        epoch, rest = divmod(self.step, self._steps_per_epoch)
        return every is not None and self.step > 0 and rest == 0 and epoch % every == 0

    def _validate(self) -> float:
        """Accuracy in per cent of the held out images, voted for by those that are trained on."""
        assert self.held is not None
        encoder = cast(Encoder, self.method.encoder)
        voters, held = (
            extract_features(encoder, split, self.config, self.device)
            for split in (self.labelled, self.held)
        )
        self.method.train()
        accuracy = knn_accuracy(*voters, *held)
        if self._best is None or accuracy > self._best["val_knn"]:
            self._best = {"step": self.step, "val_knn": accuracy}
        return accuracy

    @functools.cached_property
    def _watched(self) -> list[tuple[Tensor, Tensor]]:
        """A few labelled training images in bytes, and their labels, on the device."""
        found = batches(self.labelled.evenly(_WATCHED), self.config, self.device)
        return [((255 * x).round().byte(), labels) for x, labels in found]

    @torch.no_grad()
    def _watch(self) -> float:
        """Accuracy in per cent of these, which vote for each other; it chooses nothing."""
        encoder = cast(Encoder, self.method.encoder)
        encoder.eval()
        # as in `extract_features`
        with torch.compiler.set_stance("force_eager"):
            features = torch.cat([encoder.features(x / 255) for x, _ in self._watched])
        self.method.train()
        return leave_one_out_knn(features, torch.cat([labels for _, labels in self._watched]))

    def _log(self, folder: RunFolder, log: MetricsLog, bar: tqdm) -> None:
        losses = self._window.means()
        for name, value in losses.items():
            if not math.isfinite(value):
                raise self._diverged(f"{name} is {value}", folder)
        bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()}, refresh=False)
        epoch = self.step / self._steps_per_epoch
        rate = self._window.rate() * self.config.optimization.batch_size
        values = {"epoch": epoch, **losses, "lr": self._lr(self.step - 1)}
        if self._ends_epoch(self.config.run.val_every):
            if self.held is not None:
                values["val_knn"] = self._validate()
            else:
                values["train_knn"] = self._watch()
        log.write(self.step, values, rate)

    def _save(self, folder: RunFolder, log: MetricsLog) -> None:
        # the loss of the last step was taken before it moved the weights
        if not all(bool(p.isfinite().all()) for p in self.method.parameters()):
            raise self._diverged("a weight is not finite", folder)
        self.world.require_equal(self.method)
        cuda = self.device.type == "cuda"
        state = {
            "step": self.step,
            "method": self.method.state_dict(),
            **self.engine.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
            "metrics_size": log.sync(),
            "best": self._best,
            "window": self._window.state_dict(),
        }
        # the last one last: what a process killed in between lacks, it writes when it goes on
        for path in (*self._stays(folder), folder.checkpoint):
            checkpoint.save(path, state)
        self.saved = self.step

    def _stays(self, folder: RunFolder) -> list[Path]:
        """Where this step's checkpoint outlives the next."""
        paths = []
        if self._best is not None and self._best["step"] == self.step:
            paths.append(folder.best)
        if self._ends_epoch(self.config.run.keep_every):
            paths.append(folder.kept(self.step // self._steps_per_epoch))
        return paths

    def _diverged(self, what: str, folder: RunFolder) -> NonFiniteError:
        return NonFiniteError(
            f"{what} at step {self.step}, training diverged: try a smaller lr or eps; "
            f"{folder.checkpoint} is from before"
        )


class _Window:
    """Losses since the last log point, summed on the device so that no step waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        # a plain step between adversarial ones has one loss
        self._counts: Counter[str] = Counter()
        self._steps, self._start = 0, time.perf_counter()

    def add(self, result: StepResult) -> None:
        self._steps += 1
        for name, value in (("loss", result.loss), ("adv_loss", result.adv_loss)):
            if value is not None:
                self._sums[name] = self._sums.get(name, 0) + value
                self._counts[name] += 1

    def means(self) -> dict[str, float]:
        return {name: float(total) / self._counts[name] for name, total in self._sums.items()}

    def rate(self) -> float:
        """Steps in a second, of those that this process took."""
        return self._steps / (time.perf_counter() - self._start)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self._sums = {name: total.to(device) for name, total in state["sums"].items()}
        self._counts = Counter(state["counts"])
