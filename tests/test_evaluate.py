import json

import pytest
import torch

from clae_fast import checkpoint, data, evaluate
from clae_fast.probes import extract_features
from clae_fast.run_folder import RunFolder
from clae_fast.settings import resolve
from clae_fast.trainer import Trainer


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TINY = {"limit": 32, "image_size": 8, "batch_size": 8, "epochs": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = resolve(TINY)
    run = RunFolder.create(tmp_path_factory.mktemp("runs") / "run", config)
    Trainer(config).fit(run)
    return run


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    config = resolve(TINY | {"val_size": 16, "epochs": 2, "keep_every": 2})
    run = RunFolder.create(tmp_path_factory.mktemp("runs") / "run", config)
    Trainer(config).fit(run)
    return run


class TestRun:
    def test_writes_what_it_prints(self, folder, capsys):
        assert evaluate.main([str(folder.path)]) == 0
        results = json.loads((folder.path / "results.json").read_text())
        assert capsys.readouterr().out == (
            f"knn accuracy: {results['knn']:.1f} %\nlinear accuracy: {results['linear']:.1f} %\n"
        )
        assert results["step"] == 4
        assert all(0 <= results[name] <= 100 for name in ("knn", "linear"))

    def test_features_are_those_of_the_main_branch_in_eval_mode(self, folder):
        trainer = Trainer(folder.config)
        trainer.restore(folder)
        trainer.method.train()
        encoder = trainer.method.encoder
        device = torch.device("cpu")
        features, labels = extract_features(encoder, trainer.test, folder.config, device)
        assert torch.equal(labels, trainer.test.labels)
        assert not encoder.training
        transform = data.eval_transform(8)
        images = torch.stack([transform(trainer.test[i]) for i in range(32)])
        with torch.no_grad():
            torch.testing.assert_close(features, encoder.features(images))
            twin = trainer.method.adv_encoder.eval().features(images)
        assert not torch.allclose(features, twin)

    def test_a_second_evaluation_agrees(self, folder):
        assert evaluate.evaluate(folder) == evaluate.evaluate(folder)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (None, "is no run folder: it has no config.json"),
            ("config.json", "config.json: "),
            ("checkpoints/last.pt", "cannot read checkpoint"),
        ],
    )
    def test_bad_runs_are_one_line(self, folder, tmp_path, capsys, damage, message):
        if damage is not None:
            (tmp_path / "config.json").write_text((folder.path / "config.json").read_text())
            (tmp_path / "checkpoints").mkdir()
            (tmp_path / damage).write_text("damaged")
        assert evaluate.main([str(tmp_path)]) == (1 if damage == "checkpoints/last.pt" else 2)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line

    def test_which_checkpoint(self, validated, capsys):
        def step(*flags):
            assert evaluate.main([str(validated.path), *flags]) == 0
            results = json.loads((validated.path / "results.json").read_text())
            return results["checkpoint"], results["step"]

        best = checkpoint.load(validated.best)["step"]
        assert step() == ("best.pt", best)
        assert step("--checkpoint", "best") == ("best.pt", best)
        assert capsys.readouterr().out.startswith(f"checkpoint: best.pt, step {best}\n")
        assert step("--checkpoint", "last") == ("last.pt", 4)
        assert step("--checkpoint", "epoch-0002") == ("epoch-0002.pt", 4)
        assert step("--checkpoint", str(validated.kept(2))) == ("epoch-0002.pt", 4)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("best", "keeps no best checkpoint: only --val-size makes one"),
            ("nope", "'nope' is neither a file nor a checkpoint of "),
        ],
    )
    def test_a_checkpoint_that_there_is_not(self, folder, capsys, name, message):
        assert evaluate.main([str(folder.path), "--checkpoint", name]) == 2
        assert message in capsys.readouterr().err

    def test_a_checkpoint_of_another_run_is_one_line(self, folder, validated, tmp_path, capsys):
        foreign = tmp_path / "foreign.pt"
        checkpoint.save(foreign, {"step": 1, "method": {"weight": torch.zeros(1)}})
        assert evaluate.main([str(folder.path), "--checkpoint", str(foreign)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: checkpoint {foreign} is not one of this run: Error(s) in")

    def test_images_held_out_do_not_vote(self, validated, monkeypatch):
        seen = []
        monkeypatch.setattr(
            evaluate,
            "extract_features",
            lambda encoder, split, *rest: (
                seen.append(split) or extract_features(encoder, split, *rest)
            ),
        )
        evaluate.evaluate(validated)
        assert [len(split) for split in seen] == [16, 32]

    def test_a_missing_argument_is_one_line(self, capsys):
        assert evaluate.main([]) == 2
        assert "RUN" in capsys.readouterr().err


def test_report_has_a_line_each():
    lines = "knn accuracy: 97.1 %\nlinear accuracy: 98.3 %"
    results = {"knn": 97.14, "linear": 98.26, "step": 8, "checkpoint": "last.pt"}
    assert evaluate.report(results) == lines
    best = evaluate.report(results | {"checkpoint": "best.pt"})
    assert best == f"checkpoint: best.pt, step 8\n{lines}"
