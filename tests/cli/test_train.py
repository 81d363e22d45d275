import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from clae_fast import _impl, cli, train
from clae_fast.config import hints
from clae_fast.config.presets import PRESETS
from clae_fast.data import RECIPES
from clae_fast.methods import METHODS
from clae_fast.training import checkpoint, metrics
from clae_fast.training.trainer import Trainer

# two epochs of four steps on 32 digits of 8x8
TINY = [
    *("--device", "cpu", "--limit", "32", "--image-size", "8", "--batch-size", "8"),
    *("--epochs", "2", "--checkpoint-every", "3", "--log-every", "2"),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fails(capsys, argv, code=2):
    """Runs a command line that must fail with one line on stderr, and returns that line."""
    assert train.main([str(arg) for arg in argv]) == code
    # the progress bar shares stderr
    lines = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if "img/s" not in line]
    (line,) = filter(None, lines)
    return line


def assert_same_run(a, b):
    states = [checkpoint.load(run / "checkpoints" / "last.pt") for run in (a, b)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    assert (a / "results.json").read_bytes() == (b / "results.json").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run without interruption, and what it printed."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        assert train.main([*TINY, "--out", str(run)]) == 0
    return run, out.getvalue().splitlines(), err.getvalue()


class TestRun:
    def test_says_what_runs_then_the_accuracies(self, finished):
        run, out, _ = finished
        assert out[0] == f"ops: {_impl.describe(torch.device('cpu'))}"
        assert out[1:3] == [
            "device: cpu",
            "dataset: digits, 32 training and 32 test images, views of 8x8",
        ]
        assert re.fullmatch(r"encoder: resnet-narrow, [\d,]+ parameters", out[3])
        assert out[4] == "method: simclr, attack pair; steps: fp32"
        assert out[5] == "data: on cpu, 0.0246 MB"
        assert re.fullmatch(r"knn accuracy: \d+\.\d %", out[6])
        assert re.fullmatch(r"linear accuracy: \d+\.\d %", out[7])
        assert [line.partition(":")[0] for line in out[8:10]] == ["alignment", "uniformity"]
        assert out[10:] == [f"run folder: {run}"]

    def test_progress_has_rate_losses_and_time_left(self, finished):
        last = finished[2].split("\r")[-1]
        assert re.search(r"64/64 \[\d\d:\d\d<\d\d:\d\d, .*img/s, loss=[\d.]+, adv_loss=", last)

    def test_results_are_those_printed(self, finished):
        run, out, _ = finished
        results = json.loads((run / "results.json").read_text())
        assert out[6] == f"knn accuracy: {results['knn']:.1f} %"
        assert out[7] == f"linear accuracy: {results['linear']:.1f} %"
        assert results["step"] == 8

    def test_settings_are_recorded(self, finished):
        settings = json.loads((finished[0] / "config.json").read_text())
        assert (settings["eps_space"], settings["limit"], settings["epochs"]) == ("pixel", 32, 2)

    def test_default_folder_names_the_run(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(Trainer, "fit", lambda *_, **__: None)
        results = {"knn": 1.0, "linear": 2.0, "step": 1, "checkpoint": "last.pt"}
        monkeypatch.setattr(train, "evaluate", lambda *_, **__: results)
        assert train.main(["--method", "uel", "--attack", "self"]) == 0
        (run,) = (tmp_path / "runs").iterdir()
        assert re.fullmatch(r"\d{8}-\d{6}-uel-self-digits", run.name)
        assert capsys.readouterr().out.endswith(f"run folder: runs/{run.name}\n")

    def test_print_config_runs_nothing(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        argv = ["--preset", "clae-uel-cifar10", "--print-config", "--milestones", "5", "9", "11"]
        assert train.main([*argv, "--download", "--color-jitter", "0", "0", "0", "0"]) == 0
        settings = json.loads(capsys.readouterr().out)
        assert (settings["method"], settings["milestones"]) == ("uel", [5, 9, 11])
        assert (settings["download"], settings["color_jitter"]) == (True, [0.0, 0.0, 0.0, 0.0])
        assert list(tmp_path.iterdir()) == []


class TestOutput:
    def test_quiet_prints_results_alone(self, finished, tmp_path, capsys):
        run = tmp_path / "run"
        assert train.main([*TINY, "--quiet", "--out", str(run)]) == 0
        out, err = capsys.readouterr()
        assert out.splitlines() == [*finished[1][6:-1], f"run folder: {run}"]
        assert err == ""

    @pytest.mark.parametrize("quiet", [[], ["--quiet"]])
    def test_json_is_all_of_stdout(self, finished, tmp_path, capsys, quiet):
        run = tmp_path / "run"
        assert train.main([*TINY, "--json", *quiet, "--out", str(run)]) == 0
        out, err = capsys.readouterr()
        results = json.loads((finished[0] / "results.json").read_text())
        assert json.loads(out) == {"run": str(run), **results}
        assert err.startswith("" if quiet else finished[1][0])
        assert bool(err) != bool(quiet)

    def test_weights_and_biases(self, finished, tmp_path, monkeypatch):
        logged, ended = [], []

        class Run:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                ended.append(error[0])

            def log(self, values, step):
                logged.append({"step": step} | values)

        def init(**settings):
            assert settings["name"] == "run"
            assert settings["config"]["limit"] == 32
            return Run()

        wandb = ModuleType("wandb")
        wandb.__spec__ = ModuleSpec("wandb", None)
        wandb.init = init
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        run = tmp_path / "run"
        assert train.main([*TINY, "--wandb", "--out", str(run)]) == 0
        assert ended == [None]
        lines = (run / "metrics.jsonl").read_text().splitlines()
        assert all(point.pop("images_per_second") > 0 for point in logged)
        assert logged == [json.loads(line) for line in lines]

    def test_without_weights_and_biases(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        line = fails(capsys, [*TINY, "--wandb", "--out", tmp_path / "run"])
        assert line == "error: --wandb needs a package that is not installed: pip install wandb"
        assert list(tmp_path.iterdir()) == []


class TestDryRun:
    def plan(self, capsys, *flags):
        assert train.main(["--dry-run", "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    def test_writes_nothing_and_says_what_would_be(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert train.main(["--dry-run", "--adv-every", "2"]) == 0
        out = capsys.readouterr().out
        for fact in (
            r"adv_every +2 +\(flags\)",
            r"training images +1,437\n",
            r"steps an epoch +11\n",
            r"units a step +7\.5, 1\.25 times .*: 9 in one of 2, 6 in the others\n",
            r"activations kept for backward passes +\d",
            r"training images, decoded +1\.1 MB\n",
        ):
            assert re.search(fact, out), fact
        assert list(tmp_path.iterdir()) == []

    def test_where_settings_come_from(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        file = tmp_path / "run.yaml"
        file.write_text("preset: clae-uel-cifar10\nlr: 0.5\ntemperature: 0.2")
        plan = self.plan(
            capsys, "--config", "run.yaml", "--lr", "0.25", "--download", "--recipe", "byol"
        )
        found = {
            name: plan["sources"][name]
            for name in ("lr", "temperature", "arch", "crop_min_scale", "download")
        }
        assert found == {
            "lr": "flags",
            "temperature": "run.yaml",
            "arch": "preset clae-uel-cifar10",
            "crop_min_scale": "recipe byol",
            "download": "flags",
        }
        assert "epochs" in plan["sources"]
        assert "optimizer" in plan["sources"]
        assert "adv_weight" not in plan["sources"]
        # and nothing is fetched
        assert plan["steps_per_epoch"] is None
        assert list(tmp_path.iterdir()) == [file]

    def test_it_is_the_run(self, finished, capsys):
        plan = self.plan(capsys, *TINY)
        assert plan["config"] == json.loads((finished[0] / "config.json").read_text())
        assert f"{plan['encoder']:,} parameters" in finished[1][3]
        assert plan["steps_per_epoch"] == 4
        memory = plan["memory"]
        assert memory.pop("total") == sum(memory.values())

    def test_own_settings_of_a_method(self, capsys):
        plan = self.plan(capsys, "--method", "adco", "--options", "symmetric=true")
        assert plan["units"]["mean"] == 11
        assert plan["sources"] == {
            "method": "flags",
            "options": "flags",
            "temperature": "method adco",
        }

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--dataset cifar10 --data-dir EMPTY", "or add --download"),
            ("--batch-size 2000", "batch_size must be at most the 1437 images, got 2000"),
            ("--resume EMPTY", "--resume goes on with the run's own settings: drop --dry-run"),
        ],
    )
    def test_says_what_the_run_would_say(self, tmp_path, capsys, flags, message):
        flags = flags.replace("EMPTY", str(tmp_path)).split()
        assert message in fails(capsys, ["--dry-run", *flags])

    def test_several_processes(self, monkeypatch, capsys):
        monkeypatch.setenv("RANK", "0")
        line = fails(capsys, ["--dry-run"])
        assert line == "error: --dry-run describes one process: start it without torchrun"


# the process kills itself at the n-th write of a checkpoint, in its middle or after it
KILLED = """
import os, signal, sys
import torch
from clae_fast import train
from clae_fast.training import checkpoint

torch.set_num_threads(1)
moment, count = sys.argv[1], int(sys.argv[2])
writes = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Half:
    def __init__(self, file):
        self.file = file
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.file.close()
    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        die()

original_open, original_replace = open, os.replace

def checkpoint_open(path, mode):
    global writes
    writes += path.name == "last.pt.tmp"
    file = original_open(path, mode)
    return Half(file) if writes == count and moment == "inside" else file

def replace(source, target):
    original_replace(source, target)
    if writes == count and moment == "after":
        die()

checkpoint.open, os.replace = checkpoint_open, replace
sys.exit(train.main(sys.argv[3:]))
"""


class TestInterruption:
    @pytest.mark.parametrize(("moment", "count"), [("inside", 1), ("after", 3), ("inside", 4)])
    def test_kill_9_loses_nothing(self, finished, tmp_path, capsys, moment, count):
        run = tmp_path / "run"
        command = [sys.executable, "-c", KILLED, moment, str(count), *TINY, "--out", str(run)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        killed = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (run / "results.json").exists()
        assert train.main(["--resume", str(run)]) == 0
        assert "knn accuracy" in capsys.readouterr().out
        assert_same_run(finished[0], run)
        assert os.listdir(run / "checkpoints") == ["last.pt"]

    def test_control_c_is_one_line_and_resumable(self, finished, tmp_path, monkeypatch, capsys):
        original, run = Trainer._train_step, tmp_path / "run"

        def train_step(self, views):
            if self.global_step == 5:
                raise KeyboardInterrupt
            return original(self, views)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_train_step", train_step)
            line = fails(capsys, [*TINY, "--out", run], code=130)
        assert line == f"interrupted; step 4 is saved; continue with --resume {run}"
        assert train.main(["--resume", str(run)]) == 0
        assert_same_run(finished[0], run)

    def test_a_finished_run_is_only_evaluated_again(self, finished, capsys):
        run, out, _ = finished
        before = checkpoint.load(run / "checkpoints" / "last.pt")
        assert train.main(["--resume", str(run)]) == 0
        assert capsys.readouterr().out.splitlines() == out
        torch.testing.assert_close(
            checkpoint.load(run / "checkpoints" / "last.pt"), before, rtol=0, atol=0
        )


class TestFailure:
    def test_divergence_leaves_a_good_checkpoint(self, tmp_path, capsys):
        run = tmp_path / "run"
        line = fails(
            capsys,
            [*TINY, "--optimizer", "sgd", "--lr", "1e38", "--warmup-epochs", "0", "--out", run],
            code=1,
        )
        assert re.match(r"error: loss is (nan|inf) at step 2, training diverged", line)
        weights = checkpoint.load(run / "checkpoints" / "last.pt")["method"]
        assert all(weight.isfinite().all() for weight in weights.values())

    def test_a_full_disk_keeps_the_run(self, finished, tmp_path, monkeypatch, capsys):
        run, original, calls = tmp_path / "run", os.fsync, []

        def fsync(descriptor):
            name = os.readlink(f"/proc/self/fd/{descriptor}")
            calls.extend([name] if name.endswith("last.pt.tmp") else [])
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            line = fails(capsys, [*TINY, "--out", run], code=1)
        last = run / "checkpoints" / "last.pt"
        assert line == (
            f"error: cannot write checkpoint {last}: No space left on device; "
            "the one before it is intact"
        )
        assert checkpoint.load(last)["step"] == 3
        assert train.main(["--resume", str(run)]) == 0
        assert_same_run(finished[0], run)

    def test_a_full_disk_names_the_file(self, tmp_path, monkeypatch, capsys):
        class FullFile(io.FileIO):
            def write(self, _):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(metrics, "open", FullFile, raising=False)
        line = fails(capsys, [*TINY, "--out", tmp_path / "run"], code=1)
        assert line == f"error: {tmp_path}/run/metrics.jsonl: No space left on device"

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_truncated_image_names_file_and_row(self, tmp_path, capsys, workers):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32)).save(buffer, "JPEG")
        whole = {"bytes": buffer.getvalue(), "path": None}
        broken = {"bytes": buffer.getvalue()[:400], "path": None}
        for name, images in (("train", [whole, broken]), ("test", [whole, whole])):
            table = pa.table({"img": images, "label": [0, 1]})
            parquet.write_table(table, tmp_path / f"{name}.parquet")
        argv = [*TINY, "--dataset", "parquet", "--data-dir", tmp_path, "--batch-size", "2"]
        argv += ["--arch", "resnet-narrow", "--workers", workers, "--out", tmp_path / "run"]
        line = fails(capsys, argv)
        assert line.startswith(f"error: {tmp_path}/train.parquet, row 1: damaged image (")


class TestBadInput:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ("--temprature 0.5", "unknown flag --temprature, the nearest is --temperature"),
            ("--temp=0.5", "unknown flag --temp, the nearest is --temperature"),
            ("--attack pair 0.5", "unexpected argument '0.5'"),
            ("--lr fast", "argument --lr: invalid float value: 'fast'"),
            ("--temperature 0", "temperature must be positive, got 0.0"),
            ("--attack fgsm", "argument --attack: invalid choice: 'fgsm'"),
            ("--preset clae", "preset must be one of clae-simclr-cifar10"),
            ("--arch resnet19", "arch must be resnet18"),
            ("--arch timm/inception_v3", "image_size 16 does not fit arch timm/inception_v3"),
            ("--device tpu", "device must be cpu, cuda, cuda:N or auto, got 'tpu'"),
            ("--dataset parquet", "data_dir is required"),
            ("--dataset parquet --data-dir EMPTY", "holds no train.parquet"),
            ("--dataset cifar10 --data-dir EMPTY", "or add --download"),
            ("--limit 100", "batch_size must be at most the 100 images, got 128"),
            ("--out EMPTY", "exists: choose another --out"),
            ("--resume EMPTY", "is no run folder"),
            ("--resume EMPTY --out x", "--resume goes on with the run's own settings: drop --out"),
            ("--resume EMPTY --preset x --config y --print-config", "--config, --print-config"),
            ("--config EMPTY", "empty: Is a directory"),
            ("--config EMPTY/x.yaml", "x.yaml: No such file or directory"),
            ("--recipe simclar", "got 'simclar': the nearest is 'simclr'"),
        ],
    )
    def test_one_line_names_the_argument(self, argv, message, tmp_path, monkeypatch, capsys):
        empty = tmp_path / "empty"
        empty.mkdir()
        monkeypatch.chdir(tmp_path)
        line = fails(capsys, argv.replace("EMPTY", str(empty)).split())
        assert line.startswith("error: ")
        assert message in line
        assert list(tmp_path.iterdir()) == [empty], "a refused run leaves a folder behind"
        assert list(empty.iterdir()) == []

    def test_the_process_says_so_too(self, tmp_path):
        command = [sys.executable, "-m", "clae_fast.train", "--temperature", "0"]
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (found.returncode, found.stdout) == (2, "")
        assert found.stderr == "error: temperature must be positive, got 0.0\n"

    def test_an_implementation_that_is_not_there(self, tmp_path, monkeypatch, capsys):
        def describe(_):
            raise RuntimeError("impl='cuda' needs CUDA C++ kernels")

        monkeypatch.setattr(_impl, "describe", describe)
        line = fails(capsys, [*TINY, "--out", tmp_path / "run"])
        assert line == "error: impl='cuda' needs CUDA C++ kernels"


class TestHelp:
    @pytest.fixture
    def text(self, capsys):
        with pytest.raises(SystemExit) as stopped:
            train.main(["--help"])
        assert stopped.value.code == 0
        return capsys.readouterr().out

    def test_documents_every_setting_in_a_group(self, text):
        titles = re.findall(r"^(\w+):$", text, re.M)
        groups = ["data", "views", "objective", "adversary", "encoder", "optimization", "engine"]
        assert [title for title in titles if title in (*groups, "run")] == [*groups, "run"]
        for name in hints():
            assert re.search(rf"^  {cli.flag(name)}\b", text, re.M), name

    def test_has_defaults_and_choices(self, text):
        words = " ".join(text.split())
        assert "--eps X radius of the attack [0.06]" in words
        assert "--attack {none,pair,self} pair attacks one view" in words
        assert "--color-jitter X X X X strengths of brightness, contrast, saturation, hue" in words

    def test_begins_with_examples_that_are_commands(self, text):
        assert len(text.partition("\n\n")[0].splitlines()) == 1
        for command in train._EXAMPLES:
            assert command in text.partition("\n  --out RUN")[0]
            train._parser().parse(command.split()[3:])

    def test_lists_what_there_is_to_choose_from(self, text):
        for name in (*PRESETS, *RECIPES, *METHODS):
            assert re.search(rf"\b{name}\b", text), name
        assert "bank_size=512" in text

    def test_fits_a_terminal(self, text):
        assert max(map(len, text.splitlines())) <= 100


def test_flags_are_paths_where_they_should_be():
    flags = train._parser().parse_args(["--out", "a", "--resume", "b"])
    assert (flags.out, flags.resume) == (Path("a"), Path("b"))
