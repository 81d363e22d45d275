import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from clae_fast import data, evaluate
from clae_fast.config.layers import resolve
from clae_fast.evaluation import extract_features, mean_and_interval
from clae_fast.training import checkpoint
from clae_fast.training.run_folder import RunFolder
from clae_fast.training.trainer import Trainer


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


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Two seeds with the attack, one without."""
    root = tmp_path_factory.mktemp("runs")
    for name, settings in (
        ("pair-0", {}), ("pair-1", {"seed": 1}), ("none-0", {"attack": "none"})
    ):  # fmt: skip
        config = resolve(TINY | settings)
        Trainer(config).fit(RunFolder.create(root / name, config))
    return [str(root / name) for name in ("pair-0", "pair-1", "none-0")]


class TestRun:
    def test_writes_what_it_prints(self, folder, capsys):
        assert evaluate.main([str(folder.path)]) == 0
        results = json.loads((folder.path / "results.json").read_text())
        assert capsys.readouterr().out.splitlines() == [
            f"knn accuracy: {results['knn']:.1f} %",
            f"linear accuracy: {results['linear']:.1f} %",
            f"alignment: {results['alignment']:.3f}",
            f"uniformity: {results['uniformity']:.3f}",
        ]
        assert results["step"] == 4
        assert results["protocol"] == "clean"
        assert all(0 <= results[name] <= 100 for name in ("knn", "linear"))
        assert 0 < results["alignment"] < 4
        assert -8 < results["uniformity"] < 0

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
            "clae_fast.training.results.extract_features",
            lambda encoder, split, *rest: (
                seen.append(split) or extract_features(encoder, split, *rest)
            ),
        )
        evaluate.evaluate(validated)
        assert [len(split) for split in seen] == [16, 32]

    def test_a_missing_argument_is_one_line(self, capsys):
        assert evaluate.main([]) == 2
        assert "RUN" in capsys.readouterr().err

    def test_a_protocol_that_there_is_not_is_one_line(self, folder, capsys):
        assert evaluate.main([str(folder.path), "--protocol", "official"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: argument --protocol: invalid choice: 'official'")


class TestResults:
    """What becomes of a results.json that is there."""

    @pytest.fixture
    def run(self, validated, tmp_path):
        shutil.copytree(validated.path, tmp_path / "run")
        return RunFolder.open(tmp_path / "run")

    def test_of_the_same_checkpoint_are_added_to(self, run):
        digits = data.load("digits", limit=40)
        plain = evaluate.evaluate(run)
        both = evaluate.evaluate(run, transfer=("digits", digits))
        assert both == plain | {"transfer": {"digits": both["transfer"]["digits"]}}
        assert set(both["transfer"]["digits"]) == {
            "protocol", "knn", "linear", "alignment", "uniformity"
        }  # fmt: skip
        more = evaluate.evaluate(run, transfer=("other", digits))
        assert set(more["transfer"]) == {"digits", "other"}
        assert evaluate.evaluate(run) == more
        assert json.loads((run.path / "results.json").read_text()) == more

    def test_of_another_checkpoint_are_replaced(self, run):
        evaluate.evaluate(run, run.best, transfer=("digits", data.load("digits", limit=40)))
        last = evaluate.evaluate(run, run.checkpoint)
        assert last["checkpoint"] == "last.pt"
        assert "transfer" not in last

    def test_of_another_step_are_replaced(self, run):
        results = evaluate.evaluate(run)
        run.write_json("results.json", results | {"step": 1, "transfer": {}})
        assert evaluate.evaluate(run) == results

    @pytest.mark.parametrize("content", ["", "[]", '{"step": 4'])
    def test_damaged_ones_are_replaced(self, run, content):
        results = evaluate.evaluate(run)
        (run.path / "results.json").write_text(content)
        assert evaluate.evaluate(run) == results

    def test_a_transfer_alone_comes_with_the_runs_own(self, run):
        found = evaluate.evaluate(run, transfer=("digits", data.load("digits", limit=40)))
        assert {"knn", "linear", "corrupt", "transfer"} <= found.keys()


class TestExtras:
    def test_each_flag_adds_what_it_measures(self, folder, monkeypatch, capsys):
        radii = {"8/255": 10.0, "4/255": 20.0}
        measured = {
            "finetune_accuracies": {"0.01": 30.0, "0.1": 60.0},
            "robust_accuracies": {"fgsm": radii, "pgd20": radii},
            "autoattack_accuracies": radii,
            "require_autoattack": None,
            "susceptibility": {"cosine_attacked": 0.5, "cosine_random": 0.9},
            "released_protocol": {"knn": 50.0, "test_images": 32},
        }
        for name, value in measured.items():
            name = f"clae_fast.training.results.{name}"
            monkeypatch.setattr(name, lambda *_, value=value, **__: value)
        robust = {"fgsm": radii, "pgd20": radii}
        expected = evaluate.evaluate(folder)
        for flags, new in (
            (["--finetune"], {"finetune": measured["finetune_accuracies"]}),
            (["--robust"], {"robust": robust}),
            (["--autoattack"], {"robust": robust | {"autoattack": radii}}),
            (["--susceptibility"], {"susceptibility": measured["susceptibility"]}),
            (["--protocol", "released"], {"released": measured["released_protocol"]}),
            (["--robust", "--finetune"], {}),
        ):
            assert evaluate.main([str(folder.path), *flags]) == 0
            expected |= new
            assert json.loads((folder.path / "results.json").read_text()) == expected
        said = capsys.readouterr().out
        assert "finetune 0.01 accuracy: 30.0 %" in said
        assert "robust autoattack 8/255 accuracy: 10.0 %" in said
        assert "susceptibility cosine_attacked: 0.500" in said
        assert "released knn accuracy: 50.0 %" in said

    def test_of_another_data_set_belong_to_it(self, validated, tmp_path):
        shutil.copytree(validated.path, tmp_path / "run")
        run = RunFolder.open(tmp_path / "run")
        given = {"transfer": ("digits", data.load("digits", limit=40))}
        found = evaluate.evaluate(run, **given, extras=["robust", "susceptibility"])
        assert not {"robust", "susceptibility"} & found.keys()
        there = found["transfer"]["digits"]
        assert there["robust"]["pgd20"]["8/255"] <= there["linear"]
        assert there["susceptibility"]["cosine_attacked"] < 1


class TestTransfer:
    def test_to_a_folder(self, folder, tmp_path, capsys):
        for name in ("train", "test"):
            for label in "ab":
                (tmp_path / "leaves" / name / label).mkdir(parents=True)
                for i in range(3):
                    image = Image.new("RGB", (12, 12), (30 * i, 200 * (label == "b"), 7))
                    image.save(tmp_path / "leaves" / name / label / f"{i}.png")
        flags = ["--dataset", "folder", "--data-dir", str(tmp_path / "leaves")]
        assert evaluate.main([str(folder.path), *flags]) == 0
        results = json.loads((folder.path / "results.json").read_text())
        linear = results["transfer"]["folder/leaves"]["linear"]
        assert f"transfer folder/leaves linear accuracy: {linear:.1f} %" in capsys.readouterr().out

    def test_its_flags_are_its_own(self, folder, monkeypatch):
        asked = []
        load = data.load

        def spy(name, **options):
            asked.append((name, options))
            return load("digits", limit=40)

        monkeypatch.setattr(data, "load", spy)
        flags = ["--dataset", "cifar10", "--data-dir", "there", "--download"]
        assert evaluate.main([str(folder.path), *flags, "--on-corrupt", "skip"]) == 0
        other = {"data_dir": "there", "download": True, "on_corrupt": "skip"}
        assert asked[0] == ("cifar10", other)
        assert all(options["data_dir"] is None for _, options in asked[1:])

    def test_bad_data_is_one_line(self, folder, tmp_path, capsys):
        assert evaluate.main([str(folder.path), "--dataset", "digit"]) == 2
        assert evaluate.main([str(folder.path), "--dataset", "folder"]) == 2
        flags = ["--dataset", "folder", "--data-dir", str(tmp_path)]
        assert evaluate.main([str(folder.path), *flags]) == 2
        name, missing, empty = capsys.readouterr().err.splitlines()
        assert name.startswith("error: dataset must be one of digits, ")
        assert missing == "error: data_dir is required for the folder data set"
        assert str(tmp_path) in empty


class TestSeveralRuns:
    def test_are_one_table(self, paths, capsys):
        assert evaluate.main(paths) == 0
        *said, _, title, _, knn, linear, alignment, _ = capsys.readouterr().out.splitlines()
        assert said == [f"{path}: evaluated" for path in paths]
        assert title == "| | attack pair, n = 2 | attack none, n = 1 |"
        assert knn.startswith("| knn accuracy, % | ")
        assert linear.startswith("| linear accuracy, % | ")
        results = [json.loads((Path(path) / "results.json").read_text()) for path in paths]
        mean = sum(found["alignment"] for found in results[:2]) / 2
        alone = results[2]["alignment"]
        assert re.fullmatch(rf"\| alignment \| {mean:.3f} ± [\d.]+ \| {alone:.3f} \|", alignment)

    def test_are_one_json_object(self, paths, capsys):
        assert evaluate.main([*paths, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        for path, run in zip(paths, found["runs"], strict=True):
            assert run == {"run": path} | json.loads((Path(path) / "results.json").read_text())
        pair, none = found["groups"]
        assert pair["settings"] == {"attack": "pair"}
        assert pair["runs"] == paths[:2]
        mean, half = mean_and_interval([run["knn"] for run in found["runs"][:2]])
        assert pair["metrics"]["knn"] == {"mean": mean, "ci95": half}
        assert none["metrics"]["knn"] == {"mean": found["runs"][2]["knn"], "ci95": None}

    def test_one_is_the_same_object(self, paths, capsys):
        assert evaluate.main([paths[0], "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [run["run"] for run in found["runs"]] == paths[:1]
        assert found["groups"][0]["settings"] == {}

    def test_a_bad_one_is_found_before_any_is_evaluated(self, paths, tmp_path, capsys):
        assert evaluate.main([paths[0], str(tmp_path)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err == f"error: {tmp_path} is no run folder: it has no config.json\n"

    def test_the_same_seed_twice_is_no_second_sample(self, paths, tmp_path, capsys):
        shutil.copytree(paths[0], tmp_path / "again")
        assert evaluate.main([paths[0], str(tmp_path / "again")]) == 0
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (
            f"warning: {paths[0]} and {tmp_path / 'again'} have the same seed: "
            "they are not two samples"
        )


def test_report_has_a_line_each():
    results = {
        "protocol": "clean",
        "knn": 97.14,
        "linear": 98.26,
        "alignment": 0.25,
        "transfer": {"stl10": {"knn": 50.0}},
        "step": 8,
        "checkpoint": "last.pt",
    }
    lines = (
        "knn accuracy: 97.1 %\nlinear accuracy: 98.3 %\nalignment: 0.250\n"
        "transfer stl10 knn accuracy: 50.0 %"
    )
    assert evaluate.report(results) == lines
    best = evaluate.report(results | {"checkpoint": "best.pt"})
    assert best == f"checkpoint: best.pt, step 8\n{lines}"
