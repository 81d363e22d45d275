"""Features of a folder of images, from the command line."""

import numpy as np
import pytest
import torch
from PIL import Image

from clae_fast import embed
from clae_fast.config.layers import resolve
from clae_fast.training import checkpoint, encoders
from clae_fast.training.build import build_method
from clae_fast.training.run_folder import RunFolder

NAMES = ["a.png", "b/c.JPEG", "b/d/e.png", "b é.bmp"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = resolve({"image_size": 8, "device": "cpu"})
    folder = RunFolder.create(tmp_path_factory.mktemp("runs") / "run", config)
    state = {"step": 7, "method": build_method(config).state_dict()}
    checkpoint.save(folder.checkpoint, state)
    checkpoint.save(folder.kept(1), state | {"step": 3})
    return folder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    generator = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (9, 10 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def fails(capsys, *argv, code=2):
    assert embed.main([str(arg) for arg in argv]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if "img/s" not in line]
    (line,) = filter(None, lines)
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("flags", [[], ["--batch-size", "2", "--workers", "1"]])
def test_features_and_names(run, photos, tmp_path, capsys, flags):
    out = tmp_path / "features.npz"
    out.write_text("older")
    assert embed.main([str(run.path), str(photos), "-o", str(out), *flags]) == 0
    assert capsys.readouterr().out == f"features: 4 x 64, step 7\nfile: {out}\n"
    found = np.load(out)
    assert found["names"].tolist() == sorted(NAMES)
    assert found["step"] == 7
    encoder = encoders.load_encoder(run.path)
    for name, features in zip(found["names"], found["features"], strict=True):
        x = encoder.transform(Image.open(photos / name))
        torch.testing.assert_close(torch.from_numpy(features), encoder(x[None])[0])
    assert found["features"].dtype == np.float32


def test_which_checkpoint(run, photos, tmp_path, capsys):
    out = tmp_path / "features.npz"
    argv = [str(run.path), str(photos), "-o", str(out), "--checkpoint"]
    assert embed.main([*argv, "epoch-0001"]) == 0
    assert np.load(out)["step"] == 3
    assert "keeps no best checkpoint" in fails(capsys, *argv, "best")


def test_images_that_cannot_be_read(run, photos, tmp_path, capsys):
    (photos / "b" / "c.JPEG").write_bytes(b"no image")
    out = tmp_path / "features.npz"
    out.write_text("older")
    argv = [str(run.path), str(photos), "-o", str(out)]
    assert "c.JPEG: damaged image" in fails(capsys, *argv)
    # and the file is what it was
    assert out.read_text() == "older"
    assert embed.main([*argv, "--on-corrupt", "skip"]) == 0
    assert "skipped: " in capsys.readouterr().err
    found = np.load(out)
    assert found["names"].tolist() == [name for name in sorted(NAMES) if name != "b/c.JPEG"]
    assert len(found["features"]) == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("RUN EMPTY -o OUT", "empty holds no image (.jpg, "),
        ("RUN NOWHERE -o OUT", "nowhere: No such file or directory"),
        ("EMPTY PHOTOS -o OUT", "is no run folder: it has no config.json"),
        ("RUN PHOTOS", "the following arguments are required: -o/--out"),
        ("RUN PHOTOS -o EMPTY", "--out must be a file in a folder that is there, got "),
        ("RUN PHOTOS -o NOWHERE/x.npz", "--out must be a file in a folder that is there, got "),
        ("RUN PHOTOS -o OUT --batch-size 0", "--batch-size must be positive, got 0"),
        ("RUN PHOTOS -o OUT --device tpu", "device must be cpu, cuda, cuda:N or auto"),
        ("RUN PHOTOS -o OUT --workers -1", "workers must be 0 or more, got -1"),
    ],
)
def test_one_line_names_what_is_wrong(run, photos, tmp_path, capsys, argv, message):
    empty = tmp_path / "empty"
    empty.mkdir()
    places = {"RUN": run.path, "EMPTY": empty, "PHOTOS": photos, "OUT": tmp_path / "x.npz"}
    for name, place in (places | {"NOWHERE": tmp_path / "nowhere"}).items():
        argv = argv.replace(name, str(place))
    assert message in fails(capsys, *argv.split())
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "photos"}
