"""Data sets from the command line, as a user meets them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clae_fast import evaluate, train
from clae_fast.config.layers import resolve
from clae_fast.train import _default_out

TINY = [
    *("--dataset", "folder", "--arch", "resnet-narrow", "--image-size", "8", "--device", "cpu"),
    *("--batch-size", "4", "--epochs", "1", "--warmup-epochs", "0"),
]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for row in range(8):
            file = tmp_path / "images" / part / "ab"[row % 2] / f"{row}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(file)
    return tmp_path / "images"


def run(folder, *flags):
    out = folder.parent / "run"
    argv = [*TINY, "--data-dir", folder, "--out", out, *flags]
    return train.main([str(arg) for arg in argv]), out


@pytest.mark.parametrize("workers", [0, 2])
class TestCorrupt:
    def test_the_run_ends_in_one_line(self, folder, workers, capsys):
        (folder / "train" / "a" / "2.png").write_bytes(b"")
        code, _ = run(folder, "--workers", workers)
        assert code == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert line == f"error: {folder}/train/a/2.png: damaged image (of no known format)"

    def test_or_goes_on_and_counts(self, folder, workers, capsys):
        (folder / "train" / "a" / "2.png").write_bytes(b"")
        (folder / "test" / "b" / "1.png").write_bytes(b"no image")
        code, out = run(folder, "--workers", workers, "--on-corrupt", "skip", "--epochs", 2)
        assert code == 0
        for again in (False, True):
            if again:
                assert evaluate.main([str(out)]) == 0
            lines = capsys.readouterr().err.splitlines()
            assert [line.partition(": ")[2] for line in lines if line.startswith("skipped")] == [
                f"{folder}/{file}: damaged image (of no known format)"
                for file in ("train/a/2.png", "test/b/1.png")
            ]
            assert json.loads((out / "results.json").read_text())["corrupt"] == 2

    def test_nothing_readable_is_one_line(self, folder, workers, capsys):
        for file in (folder / "train").rglob("*.png"):
            file.write_bytes(b"")
        code, _ = run(folder, "--workers", workers, "--on-corrupt", "skip")
        assert code == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: none of the 8 images can be read; {folder}/train/")


class TestProcesses:
    def test_a_killed_worker_ends_the_run_in_one_line(self, folder, monkeypatch, capsys):
        main = os.getpid()

        def decode(*_):
            # as the kernel does when memory is short
            assert os.getpid() != main
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr("clae_fast.data.encoded.decode", decode)
        code, _ = run(folder, "--workers", 1)
        assert code == 1
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("error: DataLoader worker (pid")
        assert line.endswith(": is memory short? --resume with fewer --workers")

    def test_no_worker_outlives_ctrl_c(self, folder):
        flags = ["--epochs", "100000", "--workers", "2", "--log-every", "1", "--attack", "none"]
        flags += ["--resident", "no"]
        argv = [*TINY, "--data-dir", str(folder), "--out", str(folder.parent / "run"), *flags]
        process = subprocess.Popen(
            [sys.executable, "-m", "clae_fast.train", *argv],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            workers = wait_for(lambda: training(process, folder.parent / "run"))
            # it reaches all processes of the terminal
            os.killpg(process.pid, signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130
        assert "Traceback" not in stderr
        assert "continue with --resume" in stderr.splitlines()[-1]
        wait_for(lambda: not any(os.path.exists(f"/proc/{worker}") for worker in workers))


def training(process, run):
    """The worker processes, once metrics are written."""
    assert process.poll() is None, process.stderr.read()
    metrics = run / "metrics.jsonl"
    if not metrics.exists() or not metrics.read_text():
        return []
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


class TestLayouts:
    def test_a_name_of_the_hub_makes_one_folder(self):
        config = resolve({"dataset": "hf/owner/name"})
        assert re.fullmatch(r"runs/[\d-]+-simclr-pair-hf-owner-name", str(_default_out(config)))

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--data-dir", "nowhere"], "data_dir: there is no folder nowhere"),
            (["--data-dir", "empty"], "empty has no folder train: it is empty"),
            ([], "data_dir is required for the folder data set"),
            (["--dataset", "mnist"], "dataset must be one of digits, cifar10"),
            (["--dataset", "cifar10", "--data-dir", "empty"], "or add --download"),
            (["--dataset", "stl10", "--data-dir", "empty"], "or add --download"),
            (["--dataset", "tiny_imagenet", "--data-dir", "empty"], "or add --download"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, tmp_path, monkeypatch, capsys, flags, message):
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path)
        assert train.main([*TINY, *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line
        assert os.listdir() == ["empty"]

    @pytest.mark.parametrize("path", ["train", "train/a", "train/a/0.png"])
    def test_what_may_not_be_read_is_one_line(self, folder, capsys, path):
        (folder / path).chmod(0)
        if os.access(folder / path, os.R_OK):
            pytest.skip("this user may read everything")
        code, _ = run(folder)
        (folder / path).chmod(0o700)
        assert code in (1, 2)
        *_, line = capsys.readouterr().err.splitlines()
        assert line == f"error: {folder / path}: Permission denied"
