"""The layers that settings come from, and the files they are read from."""

import dataclasses
import json

import pytest

from clae_fast.config import Config
from clae_fast.config.layers import read, resolve
from clae_fast.config.presets import PRESETS
from clae_fast.data import RECIPES


@pytest.fixture
def file(tmp_path):
    """Writes a settings file and returns its path."""

    def write(text):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


class TestLayers:
    def test_defaults_are_the_digits_run(self):
        config = resolve({})
        assert config == Config.from_dict({})
        assert (config.data.dataset, config.objective.method, config.adversary.attack) == (
            "digits",
            "simclr",
            "pair",
        )
        assert not config.views.flip
        assert config.views.crop_min_scale >= 0.4
        assert config.views.image_size == 16

    def test_other_data_sets_get_defaults_for_photographs(self):
        config = resolve({"dataset": "parquet", "data_dir": "somewhere", "lr": 0.5})
        found = (
            config.encoder.arch,
            config.views.image_size,
            config.views.flip,
            config.optimization.lr,
        )
        assert found == ("resnet18", 32, True, 0.5)
        assert any(config.views.color_jitter)

    def test_each_layer_wins_over_those_before(self, file):
        # grey_prob is 0 by default, 0.2 for photographs
        path = file("temperature: 0.3\ngrey_prob: 0.4")
        preset, recipe = "simclr-cifar10", "byol"
        config = resolve({"grey_prob": 0.5, "image_size": 24}, preset, recipe=recipe, file=path)
        assert (config.encoder.proj_dim, config.optimization.batch_size) == (64, 256)  # preset
        assert (config.views.solarize_prob, config.views.color_jitter[2]) == (
            (0.0, 0.2),
            0.2,
        )  # recipe
        assert config.objective.temperature == 0.3  # file
        assert (config.views.grey_prob, config.views.image_size) == (0.5, 24)  # caller

    def test_a_file_may_name_preset_recipe_and_data_set(self, file):
        path = file("preset: clae-plain-cifar10\nrecipe: moco_v2\nlr: 1e-4")
        config = resolve({}, file=path)
        assert config == resolve({"lr": 1e-4}, "clae-plain-cifar10", recipe="moco_v2")
        other = resolve({}, "uel-cifar10", recipe="plain", file=path)
        assert other == resolve({"lr": 1e-4}, "uel-cifar10", recipe="plain")
        assert resolve({}, file=file("dataset: cifar100")) == resolve({"dataset": "cifar100"})

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_a_recipe_sets_the_augmentation_alone(self, recipe):
        base, changed = resolve({}).to_dict(), resolve({}, recipe=recipe).to_dict()
        expected = dataclasses.asdict(RECIPES[recipe])
        assert changed == base | expected

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (
                {"preset": "x"},
                "preset must be one of clae-simclr-cifar10, .*, got 'x': the nearest",
            ),
            ({"preset": "clae-simclr-cifar"}, "the nearest is 'clae-simclr-cifar10'"),
            ({"recipe": "moco"}, "recipe must be one of .*, got 'moco': the nearest is 'moco_v2'"),
        ],
    )
    def test_unknown_names_list_the_known_ones(self, names, message):
        with pytest.raises(ValueError, match=message):
            resolve({}, **names)


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_a_written_configuration_reads_as_it_was(file, preset):
    config = resolve({"data_dir": "d", "milestones": (1, 3), "factors": (0.1, 1e-7)}, preset)
    path = file(json.dumps(config.to_dict(), indent=2))
    assert resolve({}, file=path) == config


class TestFile:
    def test_comments_numbers_and_lists(self, file):
        settings = read(
            file(
                "# a run\nlr: 3e-4  # small\nweight_decay: 1E-06\neps: 8\nmean: [0, 0.5, 1]\n"
                "milestones:\n  - 5\n  - 9\nflip: true\nlimit: null\nattack: none\ndata_dir: '5'\n"
                "resident: no\n"
            )
        )
        assert settings == {
            "lr": 3e-4,
            "weight_decay": 1e-6,
            "eps": 8.0,
            "mean": (0.0, 0.5, 1.0),
            "milestones": (5, 9),
            "flip": True,
            "limit": None,
            "attack": "none",
            "data_dir": "5",
            "resident": "no",
        }
        assert isinstance(settings["eps"], float)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", " holds no settings"),
            ("# nothing\n---\n", " holds no settings"),
            ("- lr\n- 5", ", line 1: wanted `name: value`, a line a setting"),
            ("\nlr 0.5", ", line 2: wanted `name: value`, a line a setting"),
            ("lr: 1\ntemprature: 1", ", line 2: unknown setting 'temprature', the nearest is "
             "'temperature'"),
            ("batch-size: 4", ", line 1: unknown setting 'batch-size', the nearest is "
             "'batch_size'"),
            ("5: 4", ", line 1: unknown setting '5', the nearest is "),
            ("lr: 1\n\nlr: 2", ", line 3: lr is given twice"),
            ("seed: 1\nlr: fast", ", line 2: lr must be a number, got 'fast'"),
            ("lr: true", ", line 1: lr must be a number, got True"),
            ("epochs: 1.5", ", line 1: epochs must be a whole number, got 1.5"),
            ("epochs:", ", line 1: epochs must be a whole number, got None"),
            ("limit: many", ", line 1: limit must be a whole number, got 'many'"),
            ("flip: 1", ", line 1: flip must be true or false, got 1"),
            ("attack: off", ", line 1: attack must be text, got False"),
            ("data_dir: 5", ", line 1: data_dir must be text, got 5"),
            ("mean: [0.5, 0.5]", ", line 1: mean must be a list of 3 numbers, got [0.5, 0.5]"),
            ("mean: 0.5", ", line 1: mean must be a list of 3 numbers, got 0.5"),
            ("milestones: [1, 2.5]", ", line 1: milestones must be a list of whole numbers, got"),
            ("preset: 5", ", line 1: preset must be text, got 5"),
            ("lr: [1", ", line 1: expected ',' or ']', but got '<stream end>'"),
            ("lr: 1\n\tseed: 2", ", line 2: "),
            ("lr: 1\n---\nlr: 2", ", line 2: but found another document"),
            ("lr: !!python/name:os.system", ", line 1: could not determine a constructor"),
            ("lr: &a 1\nseed: *b", ", line 2: found undefined alias 'b'"),
            ("? [1, 2]\n: 3", ", line 1: unknown setting '[1, 2]'"),
            ("lr: \x00", ": unacceptable character #x0000"),
            (b"lr: \xff", ": not UTF-8 text"),
        ],
    )  # fmt: skip
    def test_one_line_names_file_line_and_key(self, file, text, message):
        path = file(text)
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared in full
            read(path)
        assert str(caught.value).startswith(f"{path}{message}")
        assert "\n" not in str(caught.value)

    def test_a_file_that_cannot_be_opened_is_named(self, tmp_path):
        for path, message in (
            (tmp_path / "none.yaml", "No such file or directory"),
            (tmp_path, "Is a directory"),
        ):
            with pytest.raises(ValueError, match=f"{path}: {message}"):
                read(path)

    def test_nothing_in_a_file_is_executed(self, file, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="could not determine a constructor"):
            read(file("lr: !!python/object/apply:os.mkdir [executed]"))
        assert not (tmp_path / "executed").exists()
