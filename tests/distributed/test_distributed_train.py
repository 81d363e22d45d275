"""The command in two processes, as torchrun starts them."""

import json
import os
import re
import signal
import sys
import time

import processes
import pytest
import torch

from clae_fast import train
from clae_fast.training import checkpoint
from clae_fast.training.trainer import Trainer

# two epochs of four steps on 32 digits of 8x8
TINY = [
    *("--device", "cpu", "--limit", "32", "--image-size", "8", "--batch-size", "8"),
    *("--epochs", "2", "--checkpoint-every", "3", "--log-every", "2"),
]


def command(rank, port, folder, stop, flags):
    """What a process does: the command line, ended by a signal at some rank's step."""
    for descriptor, name in ((1, "out"), (2, "err")):
        with open(folder / f"{rank}.{name}", "w") as file:
            os.dup2(file.fileno(), descriptor)
    # line by line, as a signal leaves them
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    original = Trainer._train_step

    def train_step(self, views):
        if (rank, self.global_step) == stop[:2]:
            os.kill(os.getpid(), stop[2])
        return original(self, views)

    Trainer._train_step = train_step
    sys.exit(train.main([str(flag) for flag in flags]))


def launch(folder, *flags, stop=(-1, 0, 0), timeout=90):
    """Exit codes and what was printed, stdout and stderr, of two processes of a run."""
    port = processes.free_port()
    context = processes.context()
    started = [
        context.Process(target=command, args=(rank, port, folder, stop, flags)) for rank in range(2)
    ]
    deadline = time.monotonic() + timeout
    try:
        for process in started:
            process.start()
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process in started:
            process.kill()
            process.join()
    codes = [process.exitcode for process in started]
    # the progress bar shares stderr, and the store warns where its host is lost
    said = []
    for name in ("out", "err"):
        text = "".join((folder / f"{rank}.{name}").read_text() for rank in range(2))
        lines = [line for line in re.split(r"[\r\n]", text) if not re.search("img/s|^frame", line)]
        said.append([line for line in lines if re.match(r"[a-z]+( [a-z]+)*[:;]", line)])
    return codes, *said


def metrics(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_training(a, b):
    """In fp32, where sums are taken in another order."""
    for mine, its in zip(metrics(a), metrics(b), strict=True):
        assert mine == pytest.approx(its, rel=1e-3)
    states = [checkpoint.load(run / "checkpoints" / "last.pt") for run in (a, b)]
    assert states[0]["step"] == states[1]["step"]
    for name, value in states[0]["method"].items():
        torch.testing.assert_close(value, states[1]["method"][name], rtol=0.05, atol=0.02)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process's run with the same global batch."""
    run = tmp_path_factory.mktemp("runs") / "alone"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert train.main([*TINY, "--out", str(run)]) == 0
    torch.set_num_threads(threads)
    return run


def test_two_processes_train_as_one(alone, tmp_path):
    run = tmp_path / "run"
    codes, out, err = launch(tmp_path, *TINY, "--out", run)
    assert codes == [0, 0], err
    assert err == []
    assert out[1] == "device: cpu, 2 processes"
    # one process prints
    assert out[-1] == f"run folder: {run}"
    assert len(out) == 11
    assert_same_training(run, alone)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_worker_ends_the_run_which_one_process_resumes(alone, tmp_path, capsys, lost):
    run = tmp_path / "run"
    codes, _, err = launch(tmp_path, *TINY, "--out", run, stop=(lost, 5, signal.SIGKILL))
    assert codes == ([-signal.SIGKILL, 1] if lost == 0 else [1, -signal.SIGKILL])
    (line,) = err
    assert line.startswith("error: another process of the run is lost: ")
    assert line.endswith(f"; continue with --resume {run}")
    assert checkpoint.load(run / "checkpoints" / "last.pt")["step"] == 4
    assert train.main(["--resume", str(run)]) == 0
    assert_same_training(run, alone)
    capsys.readouterr()


def test_an_interrupt_is_one_line_and_two_processes_resume(alone, tmp_path):
    run = tmp_path / "run"
    codes, _, err = launch(tmp_path, *TINY, "--out", run, stop=(1, 4, signal.SIGTERM))
    assert codes == [1, 143]
    assert err == [f"terminated; continue with --resume {run}"]
    codes, _, err = launch(tmp_path, "--resume", run)
    assert codes == [0, 0], err
    assert_same_training(run, alone)


def test_bad_input_is_one_line(tmp_path):
    run = tmp_path / "run"
    codes, out, err = launch(tmp_path, *TINY, "--batch-size", "7", "--out", run)
    assert codes == [2, 2]
    # twice where the first one, which counts reports, has left; torchrun counts itself
    assert set(err) == {"error: batch_size must be divisible by the 2 processes, got 7"}
    assert out == []
    assert not run.exists()
    codes, _, err = launch(tmp_path, "--temperature", "0")
    assert codes == [2, 2]
    assert err == ["error: temperature must be positive, got 0.0"]
