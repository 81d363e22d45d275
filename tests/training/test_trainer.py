import errno
import json
import math
import os

import pytest
import torch
from torch import nn

from clae_fast import data
from clae_fast.config import Config
from clae_fast.config.layers import resolve
from clae_fast.distributed.device import pick_device
from clae_fast.errors import NonFiniteError, RunFolderError
from clae_fast.training import checkpoint
from clae_fast.training.build import build_attack, build_method, hold_out
from clae_fast.training.optimizer import lr_factor
from clae_fast.training.run_folder import RunFolder
from clae_fast.training.trainer import Trainer

# two epochs of four steps on 32 images of 8x8
TINY = {"limit": 32, "image_size": 8, "batch_size": 8, "epochs": 2, "log_every": 3}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(**settings):
    return resolve({"device": "cpu", **TINY, **settings})


def fit(path, config):
    trainer = Trainer(config)
    folder = RunFolder.create(path, config)
    trainer.fit(folder)
    return folder


def metrics(folder):
    return [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(a, b):
    """Weights, optimizer, schedule, generators and metrics, to the last bit."""
    states = [checkpoint.load(folder.checkpoint) for folder in (a, b)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert (a.path / "metrics.jsonl").read_bytes() == (b.path / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("runs") / "run", tiny())


class TestFit:
    def test_run_folder_is_complete(self, folder):
        names = {path.name.partition(".tfevents")[0] for path in folder.path.iterdir()}
        assert names == {
            "config.json",
            "metrics.jsonl",
            "events.out",
            "checkpoints",
        }
        assert RunFolder.open(folder.path).config == folder.config
        assert [path.name for path in folder.checkpoint.parent.iterdir()] == ["last.pt"]

    def test_weights_and_views_are_channels_last(self):
        seen = []
        trainer = Trainer(tiny())
        convolution = trainer.method.adv_encoder.backbone[1].conv1
        convolution.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        trainer._train_step(next(iter(trainer.views)))
        (x_adv,) = seen
        for tensor in (x_adv, convolution.weight):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
            assert not tensor.is_contiguous()

    def test_log_points_and_learning_rates(self, folder):
        lines = metrics(folder)
        assert [line["step"] for line in lines] == [3, 4, 6, 8]  # every third, and epoch ends
        assert [line["epoch"] for line in lines] == [0.75, 1, 1.5, 2]
        assert all(math.isfinite(line["loss"]) and line["adv_loss"] > 0 for line in lines)
        factor = lr_factor(folder.config.optimization, 4)
        expected = [folder.config.optimization.lr * factor(line["step"] - 1) for line in lines]
        assert [line["lr"] for line in lines] == expected

    def test_tensorboard_has_the_same_numbers(self, folder):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder.path)).Reload()
        for name in ("loss", "adv_loss", "lr"):
            points = [(event.step, event.value) for event in events.Scalars(name)]
            assert points == [
                (line["step"], pytest.approx(line[name], rel=1e-6)) for line in metrics(folder)
            ]
        assert all(event.value > 0 for event in events.Scalars("images_per_second"))

    def test_a_second_run_is_identical(self, folder, tmp_path):
        assert_same_run(folder, fit(tmp_path / "again", tiny()))

    def test_weights_moved_and_both_branches_saw_data(self, folder):
        config = folder.config
        torch.manual_seed(config.run.seed)
        before = build_method(config).state_dict()
        after = checkpoint.load(folder.checkpoint)["method"]
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert {name for name, _ in build_method(config).named_parameters()} <= moved
        for branch in ("encoder", "adv_encoder"):
            assert any(n.startswith(branch + ".") and n.endswith("running_mean") for n in moved)


@pytest.mark.parametrize("method", ["simclr", "plain", "uel"])
@pytest.mark.parametrize("attack", ["none", "self"])
def test_methods_and_attacks_train(tmp_path, method, attack):
    config = tiny(method=method, attack=attack, epochs=1, limit=16)
    (line,) = metrics(fit(tmp_path / "run", config))
    assert math.isfinite(line["loss"])
    assert ("adv_loss" in line) == (attack != "none")


class StopError(Exception):
    """Stands for anything that ends a process."""


def stop_before(monkeypatch, step):
    original = Trainer._train_step

    def train_step(self, views):
        if self.global_step == step:
            raise StopError
        return original(self, views)

    monkeypatch.setattr(Trainer, "_train_step", train_step)


class TestResume:
    @pytest.mark.parametrize("stopped", [0, 2, 3, 4, 7])
    def test_a_resumed_run_equals_an_uninterrupted_one(self, tmp_path, monkeypatch, stopped):
        config = tiny(checkpoint_every=3, workers=stopped % 2, optimizer="sgd", lr=0.1)
        whole = fit(tmp_path / "whole", config)
        with monkeypatch.context() as patch:
            stop_before(patch, stopped)
            with pytest.raises(StopError):
                fit(tmp_path / "stopped", config)
        # what came after the checkpoint is dropped
        with open(tmp_path / "stopped" / "metrics.jsonl", "a") as file:
            file.write('{"step": 99, "lo')
        folder = RunFolder.open(tmp_path / "stopped")
        trainer = Trainer(folder.config)
        torch.manual_seed(12345)
        trainer.restore(folder)
        assert trainer.global_step == {0: 0, 2: 0, 3: 3, 4: 4, 7: 6}[stopped]
        trainer.fit(folder)
        assert_same_run(whole, folder)

    def test_random_layers_resume_too(self, tmp_path, monkeypatch):
        def build(config, device):
            method = build_method(config, device)
            method.encoder.head.insert(0, nn.Dropout(0.5))
            return method

        monkeypatch.setattr("clae_fast.training.build.build_method", build)
        config = tiny(attack="none", checkpoint_every=1)
        whole = fit(tmp_path / "whole", config)
        with monkeypatch.context() as patch:
            stop_before(patch, 5)
            with pytest.raises(StopError):
                fit(tmp_path / "stopped", config)
        folder = RunFolder.open(tmp_path / "stopped")
        trainer = Trainer(config)
        trainer.restore(folder)
        trainer.fit(folder)
        assert_same_run(whole, folder)

    def test_a_finished_run_stays_as_it_is(self, tmp_path):
        folder = fit(tmp_path / "run", tiny(epochs=1))
        before = folder.checkpoint.read_bytes(), (folder.path / "metrics.jsonl").read_bytes()
        trainer = Trainer(folder.config)
        trainer.restore(folder)
        trainer.fit(folder)
        after = folder.checkpoint.read_bytes(), (folder.path / "metrics.jsonl").read_bytes()
        assert before == after


class TestDivergence:
    def test_a_non_finite_loss_stops_at_the_next_log_point(self, tmp_path):
        config = tiny(optimizer="sgd", lr=1e38, warmup_epochs=0, log_every=2)
        with pytest.raises(NonFiniteError, match=r"loss is (nan|inf) at step 2, training diverged"):
            fit(tmp_path / "run", config)
        state = checkpoint.load(RunFolder.open(tmp_path / "run").checkpoint)
        assert state["step"] == 0
        assert all(value.isfinite().all() for value in state["method"].values())

    def test_non_finite_weights_are_not_checkpointed(self, tmp_path, monkeypatch):
        original = Trainer._train_step

        def train_step(self, views):
            result = original(self, views)
            if self.global_step == 7:
                next(self.method.parameters()).data.fill_(math.nan)
            return result

        monkeypatch.setattr(Trainer, "_train_step", train_step)
        with pytest.raises(NonFiniteError, match="a weight is not finite at step 8"):
            fit(tmp_path / "run", tiny())
        assert checkpoint.load(RunFolder.open(tmp_path / "run").checkpoint)["step"] == 4


class TestAttack:
    def test_pixels_are_clamped(self):
        attack = build_attack(Config.from_dict({"eps": 0.1, "step_size": 0.2}))
        assert (attack.eps, attack.step_size, attack.lo, attack.hi) == (0.1, 0.2, 0.0, 1.0)

    def test_normalized_units_become_pixels_without_a_clamp(self):
        config = resolve({}, "clae-plain-cifar10")
        attack = build_attack(config)
        assert attack.eps == attack.step_size == tuple(0.03 * std for std in config.views.std)
        assert (attack.lo, attack.hi) == (None, None)
        longer = build_attack(resolve({"step_size": 0.06}, "clae-plain-cifar10"))
        assert longer.step_size == tuple(0.06 * std for std in config.views.std)

    def test_the_encoder_normalizes_first(self):
        config = tiny(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
        x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        encoder = build_method(config).encoder.eval()
        normalize, backbone = encoder.backbone
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.views.mean, config.views.std))
        torch.testing.assert_close(normalize(x), (x - mean) / std)
        torch.testing.assert_close(encoder.features(x), backbone((x - mean) / std))


class TestDevice:
    def test_auto_finds_what_there_is(self):
        expected = "cuda" if torch.cuda.is_available() else "cpu"
        assert pick_device("auto").type == expected
        assert pick_device("cpu") == torch.device("cpu")

    @pytest.mark.parametrize("name", ["tpu", "meta", "cuda:x", ""])
    def test_unknown_devices_are_refused(self, name):
        with pytest.raises(ValueError, match=f"device must be cpu, cuda.*got {name!r}"):
            pick_device(name)

    def test_a_gpu_that_is_not_there_is_refused(self):
        with pytest.raises(ValueError, match="device is 'cuda:99', but torch sees"):
            pick_device("cuda:99")


class TestRunFolder:
    def test_an_existing_folder_is_never_taken(self, tmp_path):
        with pytest.raises(RunFolderError, match="exists: choose another --out"):
            RunFolder.create(tmp_path, tiny())
        assert list(tmp_path.iterdir()) == []

    def test_what_is_no_run_is_named(self, tmp_path):
        with pytest.raises(RunFolderError, match=r"is no run folder: it has no config\.json"):
            RunFolder.open(tmp_path)
        for content in ("{", "[]", '{"lr": "fast"}', '{"rate": 1}'):
            (tmp_path / "config.json").write_text(content)
            with pytest.raises(RunFolderError, match=r"config\.json: "):
                RunFolder.open(tmp_path)


def kept(folder):
    return sorted(path.name for path in folder.checkpoint.parent.iterdir())


class TestKeptCheckpoints:
    def test_every_kth_epoch_stays(self, tmp_path):
        folder = fit(tmp_path / "run", tiny(epochs=5, limit=16, keep_every=2, checkpoint_every=1))
        assert kept(folder) == ["epoch-0002.pt", "epoch-0004.pt", "last.pt"]
        assert checkpoint.load(folder.kept(4))["step"] == 8
        assert checkpoint.load(folder.checkpoint)["step"] == 10

    def test_the_best_in_validation_stays(self, tmp_path, monkeypatch):
        accuracies = iter([50.0, 70.0, 60.0, 70.0])
        monkeypatch.setattr("clae_fast.training.watch.knn_accuracy", lambda *_: next(accuracies))
        config = tiny(epochs=8, limit=16, val_size=8, val_every=2)
        folder = fit(tmp_path / "run", config)
        assert kept(folder) == ["best.pt", "last.pt"]
        state = checkpoint.load(folder.best)
        # the earliest of equals
        assert state["best"] == {"step": 4, "val_knn": 70.0}
        assert state["step"] == 4
        found = {line["step"]: line["val_knn"] for line in metrics(folder) if "val_knn" in line}
        assert found == {2: 50.0, 4: 70.0, 6: 60.0, 8: 70.0}

    def test_without_validation_training_images_are_watched(self, tmp_path):
        folders = [
            fit(tmp_path / str(every), tiny(epochs=4, limit=16, val_every=every))
            for every in (2, 8)
        ]
        found = [[line["step"] for line in metrics(f) if "train_knn" in line] for f in folders]
        assert found == [[4, 8], []]
        # it chooses and moves nothing
        assert kept(folders[0]) == ["last.pt"]
        states = [checkpoint.load(folder.checkpoint) for folder in folders]
        for state in states:
            del state["metrics_size"]
        torch.testing.assert_close(*states, rtol=0, atol=0)

    def test_a_full_disk_keeps_the_old_ones(self, tmp_path, monkeypatch):
        original = checkpoint.write_atomically

        def write(path, data):
            if path.name == "epoch-0002.pt":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(path, data)

        monkeypatch.setattr(checkpoint, "write_atomically", write)
        with pytest.raises(checkpoint.CheckpointError, match=r"epoch-0002\.pt: No space left"):
            fit(tmp_path / "run", tiny(limit=16, keep_every=1))
        folder = RunFolder.open(tmp_path / "run")
        assert kept(folder) == ["epoch-0001.pt", "last.pt"]
        assert checkpoint.load(folder.checkpoint)["step"] == 2


class TestHeldOut:
    def test_held_images_are_trained_on_nowhere(self):
        trainer = Trainer(tiny(val_size=10))
        assert (len(trainer.held), len(trainer.train), len(trainer.labeled)) == (10, 22, 22)
        held = set(trainer.held.rows.tolist())
        for split in (trainer.train, trainer.labeled):
            assert not held & set(split.rows.tolist())
        assert len(trainer.splits.train) == 32
        assert len(trainer.test) == 32
        again = Trainer(tiny(val_size=10, lr=1.0))
        assert held == set(again.held.rows.tolist())

    def test_they_are_taken_out_of_unlabeled_training_images_too(self):
        splits = data.load("digits", limit=32)
        few = splits._replace(labeled=splits.train.select(slice(0, 20)))
        parts, held = hold_out(tiny(val_size=5).run, few)
        assert [len(part) for part in (parts.train, parts.labeled, held)] == [27, 15, 5]
        assert not set(held.rows.tolist()) & set(parts.train.rows.tolist())

    def test_none_by_default(self):
        assert Trainer(tiny()).held is None

    def test_too_many_are_named(self):
        with pytest.raises(ValueError, match="val_size must be below the 32 labeled images, got"):
            Trainer(tiny(val_size=32))


class TestForeignCheckpoints:
    def test_one_of_version_0_1_is_taken_up(self, folder, tmp_path):
        old = fit(tmp_path / "run", tiny())
        state = checkpoint.load(old.checkpoint)
        del state["best"]
        checkpoint.save(old.checkpoint, state)
        settings = json.loads((old.path / "config.json").read_text())
        for name in ("interpolation", "blur_prob", "solarize_prob", "on_corrupt"):
            del settings[name]
        for name in ("val_size", "val_every", "keep_every"):
            del settings[name]
        (old.path / "config.json").write_text(json.dumps(settings))
        opened = RunFolder.open(old.path)
        assert opened.config == folder.config
        trainer = Trainer(opened.config)
        trainer.restore(opened)
        assert trainer.global_step == 8

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"step": ...}, "it lacks 'step'"),
            ({"method": {}}, r"Error\(s\) in loading state_dict for SimCLR"),
            ({"optimizer": {"state": {}, "param_groups": []}}, "the optimizer's parameters differ"),
        ],
    )
    def test_what_does_not_fit_is_one_line(self, tmp_path, change, message):
        folder = fit(tmp_path / "run", tiny(epochs=1))
        state = checkpoint.load(folder.checkpoint) | change
        checkpoint.save(folder.checkpoint, {k: v for k, v in state.items() if v is not ...})
        with pytest.raises(
            checkpoint.CheckpointError, match=rf"last\.pt is not one of this run: .*{message}"
        ) as caught:
            Trainer(folder.config).restore(folder)
        assert "\n" not in str(caught.value)

    def test_lost_metrics_are_not_made_up(self, tmp_path):
        folder = fit(tmp_path / "run", tiny(epochs=1, schedule="constant"))
        (folder.path / "metrics.jsonl").unlink()
        folder.change(folder.config.resumed({"epochs": 2}))
        trainer = Trainer(folder.config)
        trainer.restore(folder)
        trainer.fit(folder)
        assert [line["step"] for line in metrics(folder)] == [6, 8]


def test_a_folder_that_cannot_be_written_is_not_left_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("clae_fast.training.run_folder.write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        RunFolder.create(tmp_path / "run", tiny())
    assert list(tmp_path.iterdir()) == []


def test_a_batch_larger_than_the_data_is_named():
    with pytest.raises(ValueError, match="batch_size must be at most the 8 images, got 9"):
        Trainer(tiny(limit=8, batch_size=9))
