"""What a run got its numbers from, and that a change of it is said."""

import importlib.metadata
import json
import shutil
import sys

import pytest
import torch
from PIL import Image

import clae_fast
from clae_fast import _native, _version, data, evaluate, train
from clae_fast.config.layers import resolve
from clae_fast.errors import RunFolderError
from clae_fast.training import checkpoint, provenance
from clae_fast.training.run_folder import RunFolder

CPU = torch.device("cpu")
TINY = [
    *("--device", "cpu", "--limit", "16", "--image-size", "8", "--batch-size", "8"),
    *("--epochs", "2", "--attack", "none", "--hidden-dim", "8", "--proj-dim", "8"),
    *("--schedule", "constant"),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def splits():
    return data.load("digits", limit=16)


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run", resolve({}))


def versions(folder):
    return json.loads((folder.path / "versions.json").read_text())


class TestDescription:
    def test_names_code_versions_processor_and_data(self, splits):
        found = provenance.describe(CPU, splits)
        assert found["clae_fast"] == clae_fast.__version__
        assert found["torch"] == importlib.metadata.version("torch")
        assert found["python"] == sys.version.split()[0]
        assert found["ops"].endswith("1 thread")
        assert found["threads"] == 1
        assert {"torchvision", "numpy", "pillow", "triton", "commit", "native"} < set(found)
        assert {"cpu_capability", "machine", "cpus", "gpu", "device"} < set(found)
        assert json.loads(json.dumps(found)) == found

    def test_the_source_counts_wherever_it_is_installed(self, splits, tmp_path, monkeypatch):
        installed = provenance._PACKAGE
        copies = [tmp_path / name / "clae_fast" for name in ("a", "b")]
        digests = []
        for copy in copies:
            shutil.copytree(installed, copy, ignore=shutil.ignore_patterns("__pycache__"))
            monkeypatch.setattr(provenance, "_PACKAGE", copy)
            digests.append(provenance.describe(CPU, splits)["source"])
        assert digests[0] == digests[1]
        with open(copies[1] / "step.py", "a") as file:
            file.write("# changed\n")
        changed = provenance.describe(CPU, splits)
        assert changed["source"] != digests[0]
        other = tmp_path / "_C.fake.so"
        other.write_bytes(b"other code")
        monkeypatch.setattr(_native, "files", lambda: [other])
        assert provenance.describe(CPU, splits)["native"] != changed["native"]

    def test_labeled_images_are_told_apart_where_they_are_others(self, splits):
        assert set(provenance.fingerprints(splits)) == {"train", "test"}
        other = splits._replace(labeled=splits.train.select(slice(8)))
        found = provenance.fingerprints(other)
        assert set(found) == {"train", "labeled", "test"}
        assert found["labeled"] != found["train"]


class TestRecord:
    def test_nothing_changed_nothing_said(self, run, splits):
        now = provenance.describe(CPU, splits)
        assert provenance.record(run, now, global_step=0) == []
        assert versions(run) == now
        assert provenance.record(run, now, global_step=5) == []
        assert versions(run) == now

    def test_a_change_is_said_once_and_kept(self, run, splits):
        now = provenance.describe(CPU, splits)
        provenance.record(run, now, global_step=0)
        later = now | {"torch": "9.9", "source": "0" * 16, "machine": "another"}
        said = provenance.record(run, later, global_step=5)
        assert said == [
            f"source changed since this run last went on: it was {now['source']}, now it is "
            "0000000000000000",
            f"torch changed since this run last went on: it was {now['torch']}, now it is 9.9",
        ]
        assert provenance.record(run, later, global_step=7) == []
        (line,) = provenance.record(run, later | {"torch": now["torch"]}, global_step=8)
        assert line.startswith("torch changed")
        resumed = [
            {"step": 5, "source": "0" * 16, "torch": "9.9", "machine": "another"},
            {"step": 8, "torch": now["torch"]},
        ]
        assert versions(run) == now | {"resumed": resumed}

    def test_other_data_is_refused_unless_allowed(self, run, splits):
        now = provenance.describe(CPU, splits)
        provenance.record(run, now, global_step=0)
        other = now | {"data": now["data"] | {"train": "f" * 16}}
        with pytest.raises(ValueError, match=r"train part changed.*--allow-changed"):
            provenance.record(run, other, global_step=5)
        assert versions(run) == now
        (line,) = provenance.record(run, other, global_step=5, allow_changed_data=True)
        assert line.startswith("the data set's train part changed since this run last went on")
        assert provenance.record(run, other, global_step=6) == []

    def test_what_version_0_1_did_not_record_is_no_change(self, run, splits):
        now = provenance.describe(CPU, splits)
        old = {name: now[name] for name in ("clae_fast", "commit", "torch", "python", "threads")}
        run.write_json("versions.json", old)
        assert provenance.record(run, now, global_step=5) == []
        (line,) = provenance.record(run, now | {"native": "x"}, global_step=6)
        assert line.startswith("native changed")

    @pytest.mark.parametrize("content", ["", "{", "[]"])
    def test_a_damaged_record_is_named(self, run, splits, content):
        (run.path / "versions.json").write_text(content)
        with pytest.raises(RunFolderError, match=r"versions\.json: "):
            provenance.record(run, provenance.describe(CPU, splits), global_step=5)


@pytest.fixture
def folder(tmp_path):
    """A data set in folders, and the flags to train on it."""
    for split in ("train", "test"):
        for label in range(2):
            (tmp_path / "data" / split / str(label)).mkdir(parents=True)
            for i in range(8):
                image = Image.new("RGB", (12, 12), (30 * i, 100 * label, 7))
                image.save(tmp_path / "data" / split / str(label) / f"{i}.png")
    flags = [*TINY, "--dataset", "folder", "--data-dir", str(tmp_path / "data"), "--workers", "0"]
    return tmp_path, [*flags, "--arch", "resnet-narrow"]


def test_changed_data_is_noticed(folder, capsys):
    path, flags = folder
    assert train.main([*flags, "--out", str(path / "run")]) == 0
    again = ["--resume", str(path / "run"), "--epochs", "3"]
    # elsewhere is not other data
    shutil.move(path / "data", path / "moved")
    capsys.readouterr()
    assert train.main([*again, "--data-dir", str(path / "moved")]) == 0
    assert "warning" not in capsys.readouterr().err
    (path / "moved" / "train" / "1" / "7.png").rename(path / "moved" / "train" / "0" / "7a.png")
    again[-1] = "4"
    assert train.main(again) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the data set's train part changed since this run last went on")
    assert evaluate.main([str(path / "run")]) == 0
    assert "warning: the data set's train part changed" in capsys.readouterr().err
    assert train.main([*again, "--allow-changed-data"]) == 0
    assert "warning: the data set's train part changed" in capsys.readouterr().err
    assert checkpoint.load(RunFolder.open(path / "run").checkpoint)["step"] == 8


def test_changed_code_is_noticed(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert train.main([*TINY, "--out", str(run)]) == 0
    capsys.readouterr()
    version = clae_fast.__version__
    monkeypatch.setattr(_version, "__version__", "0.0.1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert train.main(["--resume", str(run)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    ending = "changed since this run last went on: it was"
    assert said[0] == f"warning: clae_fast {ending} {version}, now it is 0.0.1"
    assert said[1].startswith(f"warning: ops {ending} ")
    assert said[2] == f"warning: threads {ending} 1, now it is 3"
