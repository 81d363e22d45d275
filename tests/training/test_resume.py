"""A run that was stopped and resumed is the run that was not, to the last bit, on the CPU."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from clae_fast import train
from clae_fast.config.layers import resolve
from clae_fast.methods import METHODS, SimCLR
from clae_fast.training import checkpoint
from clae_fast.training.run_folder import RunFolder
from clae_fast.training.trainer import Trainer

# three epochs of two steps on 16 images of 8x8
TINY = {
    "device": "cpu",
    "limit": 16,
    "image_size": 8,
    "batch_size": 8,
    "epochs": 3,
    "hidden_dim": 16,
    "proj_dim": 8,
    "log_every": 3,
    "checkpoint_every": 3,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class StopError(Exception):
    """Stands for anything that ends a process."""


def fit(path, config, stops=()):
    """A run that is stopped before each of the steps `stops`, and resumed."""
    original = Trainer._train_step
    left = list(stops)

    def train_step(self, views):
        if left and self.global_step == left[0]:
            left.pop(0)
            raise StopError
        return original(self, views)

    folder = RunFolder.create(path, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", train_step)
        while True:
            trainer = Trainer(folder.config)
            # where the generator stood in the process that resumes must not matter
            torch.manual_seed(len(left) + 99) if folder.checkpoint.exists() else None
            trainer.restore(folder)
            try:
                trainer.fit(folder)
            except StopError:
                continue
            assert not left
            return folder


def assert_same_run(a, b):
    """Weights, optimizer, schedule, generators and metrics, to the last bit."""
    states = [checkpoint.load(folder.checkpoint) for folder in (a, b)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert (a.path / "metrics.jsonl").read_bytes() == (b.path / "metrics.jsonl").read_bytes()


SCHEDULES = {
    "cosine": {"schedule": "cosine", "warmup_epochs": 0},
    "warm-up": {"schedule": "cosine", "warmup_epochs": 2},
    "constant": {"schedule": "constant", "warmup_epochs": 1},
    "step": {
        "schedule": "step",
        "warmup_epochs": 0,
        "milestones": (1, 2),
        "factors": (0.1, 0.05),
    },
}
OPTIMIZERS = ("adam", "adamw", "sgd", "lars")
# stopped within the first epoch, at a boundary, within a later one, and several times
CASES = [
    ("cosine", "adam", "pair", "simclr", (1,)),
    ("cosine", "sgd", "none", "plain", (2,)),
    ("warm-up", "lars", "self", "uel", (3,)),
    ("warm-up", "adamw", "pair", "plain", (1, 3, 5)),
    ("constant", "sgd", "self", "simclr", (0, 3, 4)),
    ("constant", "adamw", "none", "uel", (5,)),
    ("step", "adam", "self", "plain", (2, 2, 5)),
    ("step", "lars", "pair", "uel", (4,)),
]


@pytest.mark.parametrize(("schedule", "optimizer", "attack", "method", "stops"), CASES)
def test_schedules_optimizers_attacks_methods(tmp_path, schedule, optimizer, attack, method, stops):
    config = resolve(
        {
            **TINY,
            **SCHEDULES[schedule],
            "optimizer": optimizer,
            "attack": attack,
            "method": method,
            "weight_decay": 0.01,
            "decay_1d": optimizer != "sgd",
            "lr": 0.01,
        }
    )
    whole = fit(tmp_path / "whole", config)
    assert_same_run(whole, fit(tmp_path / "stopped", config, stops))


@pytest.mark.parametrize("workers", [(2, 2), (0, 2)])
@pytest.mark.parametrize("resident", ["yes", "no"])
def test_loader_processes(tmp_path, workers, resident):
    config = resolve(TINY | {"workers": workers[0], "resident": resident})
    whole = fit(tmp_path / "whole", config)
    other = resolve(TINY | {"workers": workers[1], "resident": "no"})
    assert_same_run(whole, fit(tmp_path / "stopped", other, stops=(1, 4)))


def test_validation_and_its_best_checkpoint(tmp_path):
    config = resolve(TINY | {"limit": 40, "val_size": 20, "attack": "none"})
    whole = fit(tmp_path / "whole", config)
    stopped = fit(tmp_path / "stopped", config, stops=(1, 3, 5))
    assert_same_run(whole, stopped)
    best = [checkpoint.load(folder.best) for folder in (whole, stopped)]
    torch.testing.assert_close(*best, rtol=0, atol=0)


class Queue(SimCLR):
    """Adds the rows of earlier batches to the loss: state in buffers, moved after the step."""

    name = "queue"

    def __init__(self, encoder, *, temperature=0.5, adversarial=False):
        super().__init__(encoder, temperature=temperature, adversarial=adversarial)
        self.register_buffer("rows", torch.randn(24, 8))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))
        self._keys = None

    def loss(self, z_a, z_b, context):
        self._keys = z_b.detach()
        negatives = z_a @ self.rows.T
        return super().loss(z_a, z_b) + negatives.logsumexp(dim=1).mean()

    def after_step(self):
        start = int(self.next)
        self.rows[start : start + len(self._keys)] = self._keys
        self.next.fill_((start + len(self._keys)) % len(self.rows))


def test_a_queue_in_buffers(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "queue", Queue)
    # the name is not among the choices of a configuration
    config = resolve(TINY | {"lr": 1e-3})
    object.__setattr__(config.objective, "method", "queue")
    whole = fit(tmp_path / "whole", config)
    assert checkpoint.load(whole.checkpoint)["method"]["next"] == 0
    assert_same_run(whole, fit(tmp_path / "stopped", config, stops=(1, 4)))


FLAGS = [
    *itertools.chain(*(("--" + name.replace("_", "-"), str(v)) for name, v in TINY.items())),
    *("--schedule", "constant", "--val-size", "8"),
]


def command_line(path, *flags):
    assert train.main([*FLAGS, "--out", str(path), *flags]) == 0
    return RunFolder.open(path)


def test_an_extended_run_equals_a_longer_one(tmp_path):
    long = command_line(tmp_path / "long", "--limit", "24", "--epochs", "4")
    short = command_line(tmp_path / "short", "--limit", "24", "--epochs", "2")
    assert train.main(["--resume", str(short.path), "--epochs", "4"]) == 0
    short = RunFolder.open(short.path)
    assert short.config == long.config
    assert_same_run(long, short)
    for name in ("results.json", "config.json"):
        assert (long.path / name).read_bytes() == (short.path / name).read_bytes()


def test_a_run_cannot_end_before_where_it_is(tmp_path, capsys):
    run = command_line(tmp_path / "run", "--limit", "24")
    assert train.main(["--resume", str(run.path), "--epochs", "2"]) == 2
    assert capsys.readouterr().err.endswith("error: epochs is 2, but the run has done 3\n")
    assert RunFolder.open(run.path).config == run.config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return command_line(tmp_path_factory.mktemp("runs") / "whole", "--limit", "24")


@pytest.mark.parametrize(
    ("number", "moment", "count"),
    [
        (signal.SIGTERM, "last.pt.tmp", 3),
        (signal.SIGINT, "best.pt", 1),
        (signal.SIGTERM, "val_knn", 2),
        (signal.SIGINT, "results.json", 1),
    ],
)
def test_signals_at_bad_moments(whole, tmp_path, monkeypatch, capsys, number, moment, count):
    code, said = {signal.SIGTERM: (143, "terminated"), signal.SIGINT: (130, "interrupted")}[number]
    run, moments = tmp_path / "run", []

    def strike(call, name):
        def struck(*args, **kwargs):
            moments.append(name(*args))
            if moments[-1] == moment and moments.count(moment) == count:
                os.kill(os.getpid(), number)
            return call(*args, **kwargs)

        return struck

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", strike(os.fsync, _open_file))
        patch.setattr(os, "replace", strike(os.replace, lambda _, target: target.name))
        patch.setattr(Trainer, "_validate", strike(Trainer._validate, lambda _: "val_knn"))
        assert train.main([*FLAGS, "--limit", "24", "--out", str(run)]) == code
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert re.fullmatch(rf"{said}; step \d is saved; continue with --resume {run}", line)
    assert not list(run.rglob("*.tmp"))
    assert not (run / "results.json").exists()
    assert train.main(["--resume", str(run)]) == 0
    assert_same_run(whole, RunFolder.open(run))
    results = [(path / "results.json").read_bytes() for path in (whole.path, run)]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 4), (signal.SIGTERM, 5), (signal.SIGINT, 6)],
)
def test_a_signal_ends_the_run_after_the_step_under_way(
    whole, tmp_path, monkeypatch, capsys, number, step
):
    original, run = Trainer._train_step, tmp_path / "run"

    def train_step(self, batch):
        if self.global_step == step - 1:
            os.kill(os.getpid(), number)
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", train_step)
        code = train.main([*FLAGS, "--limit", "24", "--out", str(run)])
    said = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}[number]
    assert code == 128 + number
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"{said}; step {step} is saved; continue with --resume {run}"
    )
    assert checkpoint.load(run / "checkpoints" / "last.pt")["step"] == step
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert train.main(["--resume", str(run)]) == 0
    assert_same_run(whole, RunFolder.open(run))


def test_a_second_signal_ends_it_at_once(tmp_path, monkeypatch, capsys):
    def train_step(self, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the step goes on")

    run = tmp_path / "run"
    monkeypatch.setattr(Trainer, "_train_step", train_step)
    assert train.main([*FLAGS, "--limit", "24", "--out", str(run)]) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"interrupted; step 0 is saved; continue with --resume {run}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_loader_processes_too(tmp_path, number):
    """As a terminal sends Ctrl-C, and a job scheduler SIGTERM."""
    run = tmp_path / "run"
    flags = [*FLAGS, "--limit", "24", "--epochs", "9999", "--log-every", "1"]
    flags += ["--resident", "no", "--workers", "2", "--out", str(run)]
    process = subprocess.Popen(
        [sys.executable, "-m", "clae_fast.train", *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        metrics, deadline = run / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    lines = [line for line in re.split(r"[\r\n]+", err) if line and "img/s" not in line]
    step = checkpoint.load(run / "checkpoints" / "last.pt")["step"]
    said = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}[number]
    assert lines == [f"{said}; step {step} is saved; continue with --resume {run}"]


def _open_file(descriptor):
    return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
