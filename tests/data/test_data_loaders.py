"""Loader processes, and images that cannot be read."""

import dataclasses
import io
import os
import pickle
import signal
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from clae_fast import data
from clae_fast.data import RECIPES, CorruptImages
from clae_fast.data.split import Arrays
from clae_fast.errors import DataError


@pytest.fixture(autouse=True)
def three_cores(monkeypatch):
    """As many loader processes as are asked for, on any machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})


def load_views(split, workers, resident="yes", epochs=2, batch_size=3):
    source = data.view_source(
        split,
        data.BatchSchedule(len(split), batch_size, epochs=epochs, seed=0),
        RECIPES["byol"],
        image_size=8,
        device=torch.device("cpu"),
        dtype=torch.float32,
        workers=workers,
        resident=resident,
    )
    return [batch.views for batch in source]


stream_views = partial(load_views, resident="no")


def load_images(split, workers, batch_size=3):
    transform = data.eval_transform(8)
    return list(data.image_loader(split, transform, batch_size=batch_size, workers=workers))


@pytest.fixture(scope="module")
def photographs():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 20, 24, 3), dtype=np.uint8)
    return data.Split.whole(Arrays(pixels), range(8))


class TestLoaders:
    @pytest.mark.parametrize("workers", [0, 1, 2])
    def test_every_image_is_loaded_once_in_order(self, photographs, workers):
        images, labels = (
            torch.cat(x) for x in zip(*load_images(photographs, workers), strict=True)
        )
        transform = data.eval_transform(8)
        assert torch.equal(images, torch.stack([transform(photographs[i]) for i in range(8)]))
        assert labels.tolist() == list(range(8))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_the_global_generator_is_left_alone(self, photographs, workers):
        state = torch.get_rng_state()
        load_views(photographs, workers)
        load_views(photographs, workers, "no")
        load_images(photographs, workers)
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_worker_has_one_thread_and_leaves_interrupts_to_its_parent(self):
        split = data.Split.whole(Reports(), range(2))
        ((reports, _),) = data.image_loader(split, lambda x: x, batch_size=2, workers=1)
        assert reports.tolist() == [[1, 1]] * 2

    def test_splits_can_be_sent_to_any_process(self, photographs):
        again = pickle.loads(pickle.dumps(photographs))
        assert np.array_equal(np.asarray(again[5]), np.asarray(photographs[5]))


class Reports:
    """Images that tell of the process that opens them: its threads, and if it ignores Ctrl-C."""

    def __len__(self):
        return 2

    def open(self, row):
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        return torch.tensor([torch.get_num_threads(), int(ignored)])


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg():
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


# images 2 to 6 of ten, and what is said of them
DAMAGE = {
    2: (jpeg()[:2000], "damaged image (image file is truncated"),
    3: (b"", "damaged image (of no known format)"),
    4: (b"no image at all", "damaged image (of no known format)"),
    5: (None, "No such file or directory"),
    6: (png(7)[:30] + b"0000" + png(7)[34:], "damaged image ("),
}


@pytest.fixture
def folder(tmp_path):
    """Ten images of two classes, their rows as brightness, of which five cannot be read."""
    for row in range(10):
        for part in ("train", "test"):
            file = tmp_path / part / str(row // 5) / f"{row}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(10 * row))
    return tmp_path


def load(folder, on_corrupt):
    """The training images, five of which go bad after they were found."""
    train = data.load("folder", data_dir=folder, on_corrupt=on_corrupt).train
    for row, (content, _) in DAMAGE.items():
        file = folder / "train" / str(row // 5) / f"{row}.png"
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
    return train


def assert_named_once(stderr, folder):
    # a progress bar is there where decoding takes long
    lines = [line for line in stderr.splitlines() if not line.startswith("decoding: ")]
    lines = sorted(line for line in lines if line.strip())
    assert len(lines) == len(DAMAGE)
    for line, (row, (_, reason)) in zip(lines, DAMAGE.items(), strict=True):
        file = folder / "train" / str(row // 5) / f"{row}.png"
        assert line.startswith(f"skipped: {file}: {reason}")


@pytest.mark.parametrize("workers", [0, 2])
class TestCorruptImages:
    def test_the_first_one_fails(self, folder, workers):
        train = load(folder, "fail")
        for loader in (load_views, stream_views, load_images):
            with pytest.raises(DataError, match=r"train/\d/\d\.png: "):
                loader(train, workers)

    @pytest.mark.parametrize("resident", ["yes", "no"])
    def test_training_takes_the_next_readable_one(self, folder, workers, resident, capsys):
        train = load(folder, "skip")
        views = load_views(train, workers, resident)
        assert_named_once(capsys.readouterr().err, folder)
        assert len(train.corrupt) == 5
        # what stands in is a function of the index alone: 7 for each of 2 to 6
        stored = np.repeat(np.array([0, 10, 70, 70, 70, 70, 70, 70, 80, 90], np.uint8), 9 * 9 * 3)
        whole = data.Split.whole(Arrays(stored.reshape(10, 9, 9, 3)), train.labels)
        for batch, expected in zip(views, load_views(whole, 0), strict=True):
            assert torch.equal(batch[0], expected[0])
            assert torch.equal(batch[1], expected[1])

    def test_evaluation_leaves_them_out(self, folder, workers, capsys):
        train = load(folder, "skip")
        for _ in range(2):
            batches = load_images(train, workers)
            images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
            assert (images[:, 0, 0, 0] * 255).round().tolist() == [0, 10, 70, 80, 90]
            assert labels.tolist() == [0, 0, 1, 1, 1]
        assert_named_once(capsys.readouterr().err, folder)

    def test_training_and_evaluation_count_together(self, folder, workers, capsys):
        train = load(folder, "skip")
        load_views(train, workers)
        load_images(train, workers)
        load_views(train.select([2, 3, 8, 9]), workers, "no")
        assert_named_once(capsys.readouterr().err, folder)
        assert len(train.corrupt) == 5

    def test_all_of_them_is_an_error(self, folder, workers):
        train = load(folder, "skip").select([2, 3, 4])
        for loader in (load_views, stream_views, load_images):
            with pytest.raises(DataError, match="none of the 3 images can be read"):
                loader(train, workers)


class TestShards:
    def test_rows_are_named(self, tmp_path, capsys):
        import pyarrow as pa
        from pyarrow import parquet

        for part in ("train", "test"):
            records = [{"bytes": content, "path": None} for content in (png(0), b"", png(1), None)]
            table = pa.table({"img": records, "label": [0, 1, 1, 0]})
            parquet.write_table(table, tmp_path / f"{part}.parquet", row_group_size=2)
        train, _, test = data.load("parquet", data_dir=tmp_path, on_corrupt="skip")
        for split in (train, test, train):
            assert len(torch.cat([labels for _, labels in load_images(split, 0)])) == 2
        assert capsys.readouterr().err.splitlines() == [
            f"skipped: {tmp_path}/{part}.parquet, row {row}"
            for part in ("train", "test")
            for row in ("1: damaged image (of no known format)", "3: img holds no bytes")
        ]
        assert len(train.corrupt) == len(test.corrupt) == 4


def test_on_corrupt_is_fail_or_skip():
    with pytest.raises(ValueError, match="on_corrupt must be fail or skip, got 'ignore'"):
        CorruptImages("ignore")


def test_parts_share_what_was_found():
    train, labeled, test = data.load("digits", on_corrupt="skip")
    assert train.corrupt is labeled.corrupt is test.corrupt
    rest, held = data.hold_out(train, 10, seed=0)
    assert rest.corrupt is held.corrupt is train.corrupt
    assert dataclasses.replace(train).corrupt is train.corrupt
