import io
import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torchvision import datasets
from torchvision.transforms import v2

from clae_fast import data
from clae_fast.data import DataError
from clae_fast.data.split import Arrays


def jpeg(value, size=(12, 10)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_parquet(file, images, labels, column="img"):
    records = [{"bytes": image, "path": None} for image in images]
    parquet.write_table(pa.table({column: records, "label": labels}), file)


@pytest.fixture
def folder(tmp_path):
    """Three training images in two shards, and one test image."""
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [jpeg(0), jpeg(100)], [4, 5])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [jpeg(200)], [6])
    write_parquet(tmp_path / "test.parquet", [jpeg(50)], [7], column="image")
    return tmp_path


def split_of(labels):
    """Images of one pixel, which is their row."""
    pixels = torch.arange(len(labels)).float().reshape(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    return data.Split.whole(Arrays(pixels), labels)


class TestSplit:
    def test_select_keeps_images_and_labels_together(self):
        split = split_of([5, 6, 7, 8])
        for indices in (slice(1, 3), [1, 2], torch.tensor([False, True, True, False])):
            part = split.select(indices)
            assert part.labels.tolist() == [6, 7]
            assert [part[i][0].item() for i in range(len(part))] == [1, 2]
            assert part.select([1])[0][0].item() == 2

    @pytest.mark.parametrize("size", [1, 5, 10, 33, 59])
    def test_hold_out_takes_its_share_of_each_class(self, size):
        labels = torch.tensor([0] * 30 + [1] * 20 + [2] * 10)[torch.randperm(60)]
        rest, held = data.hold_out(split_of(labels.tolist()), size, seed=0)
        assert (len(rest), len(held)) == (60 - size, size)
        assert sorted([*rest.rows.tolist(), *held.rows.tolist()]) == list(range(60))
        assert held.rows.tolist() == sorted(held.rows.tolist())
        shares = torch.bincount(held.labels, minlength=3) - torch.tensor([30, 20, 10]) * size / 60
        assert shares.abs().max() < 1

    def test_hold_out_depends_on_the_seed_alone(self):
        split = split_of([0] * 20)
        first, again, other = (data.hold_out(split, 5, seed=s)[1].rows for s in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    @pytest.mark.parametrize("size", [-1, 0, 4, 5])
    def test_hold_out_leaves_no_part_empty(self, size):
        with pytest.raises(ValueError, match=f"size must be from 1 to 3, got {size}"):
            data.hold_out(split_of([0, 1, 2, 3]), size, seed=0)

    def test_fingerprint_is_that_of_images_and_labels(self):
        split = split_of([0, 1, 2, 3])
        assert split.fingerprint() == split_of([0, 1, 2, 3]).fingerprint()
        others = [split_of([0, 1, 2, 4]), split.select([0, 1, 2]), split.select([1, 0, 2, 3])]
        others.append(data.Split.whole(Arrays(split.images.pixels + 1), [0, 1, 2, 3]))
        others.append(data.Split.whole(Arrays(split.images.pixels.numpy() + 1), [0, 1, 2, 3]))
        assert len({split.fingerprint()} | {other.fingerprint() for other in others}) == 5

    def test_fingerprint_of_encoded_images(self, folder):
        load = lambda: data.load("parquet", data_dir=folder).train.fingerprint()  # noqa: E731
        first = load()
        assert load() == first
        write_parquet(folder / "train-00001-of-00002.parquet", [jpeg(200) + b"0"], [6])
        assert load() != first


class TestDigits:
    def test_images_are_sixteenths_upscaled_in_three_channels(self):
        train, _, test = data.load("digits")
        assert (len(train), len(test)) == (1437, 360)
        image = train[0]
        assert image.shape == (3, 16, 16)
        assert torch.equal(image[0], image[1])
        assert (train.images.pixels.min(), train.images.pixels.max()) == (0, 1)

    def test_the_split_is_fixed_stratified_and_disjoint(self):
        train, _, test = data.load("digits")
        again, _, _ = data.load("digits")
        assert train.fingerprint() == again.fingerprint()
        shares = torch.bincount(test.labels) / torch.bincount(
            torch.cat([train.labels, test.labels])
        )
        assert ((shares - 0.2).abs() < 0.01).all()
        both = torch.stack(
            [split[i] for split in (train, test) for i in range(len(split))]
        ).flatten(1)
        assert len(both.unique(dim=0)) == 1797

    def test_limit_takes_the_head_of_both_splits(self):
        train, _, _ = data.load("digits")
        head, _, test = data.load("digits", limit=10)
        assert (len(head), len(test)) == (10, 10)
        assert all(torch.equal(head[i], train[i]) for i in range(10))


class TestParquet:
    def test_shards_are_read_in_order(self, folder):
        train, _, test = data.load("parquet", data_dir=folder)
        assert train.labels.tolist() == [4, 5, 6]
        assert test.labels.tolist() == [7]
        assert [np.asarray(train[i])[0, 0, 0] for i in range(3)] == [0, 100, 200]
        assert (train[0].size, train[0].mode) == ((12, 10), "RGB")

    def test_one_whole_file_goes_before_shards(self, folder):
        write_parquet(folder / "train.parquet", [jpeg(9)], [1])
        train, _, _ = data.load("parquet", data_dir=str(folder))
        assert train.labels.tolist() == [1]

    @pytest.mark.parametrize("limit", [1, 2, 3, 99])
    def test_limit(self, folder, limit):
        train, _, test = data.load("parquet", data_dir=folder, limit=limit)
        assert train.labels.tolist() == [4, 5, 6][:limit]
        assert len(test) == 1

    def test_grey_and_transparent_images_become_rgb(self, folder):
        images = []
        for mode in ("L", "RGBA", "P"):
            buffer = io.BytesIO()
            Image.new(mode, (4, 4)).save(buffer, "PNG")
            images.append(buffer.getvalue())
        write_parquet(folder / "train.parquet", images, [0, 1, 2])
        train, _, _ = data.load("parquet", data_dir=folder)
        assert [train[i].mode for i in range(3)] == ["RGB"] * 3

    def test_a_truncated_image_names_file_and_row(self, folder):
        whole = jpeg(3, size=(64, 64))
        broken = [jpeg(0), whole[: len(whole) // 2], b"", b"no image"]
        write_parquet(folder / "train.parquet", broken, [0, 1, 2, 3])
        train, _, _ = data.load("parquet", data_dir=folder)
        assert train[0].mode == "RGB"
        for row in (1, 2, 3):
            with pytest.raises(DataError, match=rf"train\.parquet, row {row}: damaged image"):
                train[row]

    def test_a_row_without_bytes_is_named(self, folder):
        write_parquet(folder / "train.parquet", [jpeg(0), None], [0, 1])
        with pytest.raises(DataError, match=r"train\.parquet, row 1: img holds no bytes"):
            data.load("parquet", data_dir=folder)

    @pytest.mark.parametrize("label", [None, -1, 0.5])
    def test_a_bad_label_is_named(self, folder, label):
        write_parquet(folder / "train.parquet", [jpeg(0)], [label])
        with pytest.raises(DataError, match=r"row 0: label must be a class number, got"):
            data.load("parquet", data_dir=folder)

    @pytest.mark.parametrize("columns", [{"img": [1]}, {"picture": [1], "label": [1]}])
    def test_missing_columns_are_named_with_what_is_there(self, folder, columns):
        parquet.write_table(pa.table(columns), folder / "train.parquet")
        with pytest.raises(DataError, match=rf"train\.parquet: needs .* has {', '.join(columns)}"):
            data.load("parquet", data_dir=folder)

    def test_a_file_that_is_no_parquet_is_named(self, folder):
        (folder / "train.parquet").write_bytes(b"PAR1 but not really")
        with pytest.raises(DataError, match=r"train\.parquet: not a readable parquet file"):
            data.load("parquet", data_dir=folder)

    def test_folders_without_data(self, folder):
        with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
            data.load("parquet", data_dir=folder / "nowhere")
        (folder / "test.parquet").unlink()
        with pytest.raises(DataError, match=r"holds no test\.parquet and no test\*\.parquet"):
            data.load("parquet", data_dir=folder)
        write_parquet(folder / "test.parquet", [], [])
        with pytest.raises(DataError, match=r"test\.parquet: no rows"):
            data.load("parquet", data_dir=folder)


class TestCifar:
    @pytest.fixture
    def root(self, tmp_path, monkeypatch):
        """CIFAR-10's files with two images each; torchvision's checksums are switched off."""
        folder = tmp_path / datasets.CIFAR10.base_folder
        folder.mkdir()
        names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
        for value, name in enumerate(names):
            batch = {"data": np.full((2, 3072), value, np.uint8), "labels": [value, value]}
            (folder / name).write_bytes(pickle.dumps(batch))
        meta = {"label_names": [str(i) for i in range(10)]}
        (folder / "batches.meta").write_bytes(pickle.dumps(meta))
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        return tmp_path

    def test_both_splits_are_read(self, root):
        train, _, test = data.load("cifar10", data_dir=root, limit=3)
        assert train.labels.tolist() == [0, 0, 1]
        assert test.labels.tolist() == [5, 5]
        assert train[2].size == (32, 32)
        assert np.asarray(test[0]).max() == 5

    def test_missing_files_say_what_to_do(self, tmp_path):
        with pytest.raises(DataError, match=r"cifar100 is not in .* or add --download"):
            data.load("cifar100", data_dir=tmp_path)

    def test_no_network(self, tmp_path, monkeypatch):
        def refuse(*_, **__):
            raise OSError("Name or service not known")

        monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
        with pytest.raises(DataError, match=r"cannot fetch cifar10 into .*: Name or service"):
            data.load("cifar10", data_dir=tmp_path, download=True)


def test_unknown_names_and_missing_folder_argument():
    with pytest.raises(ValueError, match=r"dataset must be one of digits, .* got 'mnist'"):
        data.load("mnist")
    with pytest.raises(ValueError, match="data_dir is required"):
        data.load("parquet")


SIMCLR = {
    "crop_min_scale": 0.2,
    "flip": True,
    "color_jitter": (0.4, 0.4, 0.4, 0.1),
    "color_jitter_prob": 0.8,
    "grey_prob": 0.2,
}
CROP_ONLY = SIMCLR | {"flip": False, "color_jitter": (0.0, 0.0, 0.0, 0.0), "grey_prob": 0.0}


@pytest.fixture
def photographs(folder):
    """Eight images of different content in a split that decodes them."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(8):
        buffer = io.BytesIO()
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        images.append(buffer.getvalue())
    write_parquet(folder / "train.parquet", images, list(range(8)))
    return data.load("parquet", data_dir=folder)[0]


class TestAugmentation:
    def test_parameters_reach_torchvision(self):
        crop, flip, jitter, grey, *_ = data.augmentation(32, **SIMCLR).transforms
        assert (tuple(crop.size), tuple(crop.scale)) == ((32, 32), (0.2, 1.0))
        assert (flip.p, jitter.p, grey.p) == (0.5, 0.8, 0.2)
        (color,) = jitter.transforms
        assert tuple(color.brightness) == pytest.approx((0.6, 1.4))
        assert tuple(color.hue) == pytest.approx((-0.1, 0.1))

    def test_what_is_switched_off_is_left_out(self):
        kinds = [type(t) for t in data.augmentation(16, **CROP_ONLY).transforms]
        assert kinds == [v2.RandomResizedCrop, v2.ToImage, v2.ToDtype, v2.ToPureTensor]

    def test_views_are_plain_float_pixels(self, photographs):
        views = data.TwoViews(photographs, data.augmentation(16, **SIMCLR), seed=0)
        for view in views[0, 3]:
            assert type(view) is torch.Tensor
            assert (view.shape, view.dtype) == ((3, 16, 16), torch.float32)
            assert 0 <= view.min() < view.max() <= 1

    def test_a_view_depends_on_seed_epoch_index_and_view_alone(self, photographs):
        transform = data.augmentation(16, **SIMCLR)
        views = data.TwoViews(photographs, transform, seed=5)
        p, q = views[2, 3]
        torch.manual_seed(123)
        _ = views[0, 1]
        again = data.TwoViews(photographs, transform, seed=5)[2, 3]
        assert torch.equal(p, again[0])
        assert torch.equal(q, again[1])
        others = [q, views[3, 3][0], views[2, 4][0]]
        others.append(data.TwoViews(photographs, transform, seed=6)[2, 3][0])
        assert not any(torch.equal(p, other) for other in others)

    def test_the_global_generator_is_left_alone(self, photographs):
        views = data.TwoViews(photographs, data.augmentation(16, **SIMCLR), seed=0)
        state = torch.get_rng_state()
        _ = views[0, 0]
        assert torch.equal(torch.get_rng_state(), state)

    def test_evaluation_sees_the_middle(self):
        image = torch.zeros(3, 8, 16)
        image[:, :, 4:12] = 1
        assert torch.equal(data.eval_transform(8)(image), torch.ones(3, 8, 8))


class TestBatchSchedule:
    def test_an_epoch_is_a_permutation_that_changes(self):
        batches = list(data.BatchSchedule(10, 5, epochs=2, seed=0))
        epochs = [[key for batch in batches[i : i + 2] for key in batch] for i in (0, 2)]
        for epoch, keys in enumerate(epochs):
            assert {e for e, _ in keys} == {epoch}
            assert sorted(i for _, i in keys) == list(range(10))
        assert [i for _, i in epochs[0]] != [i for _, i in epochs[1]]

    @pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 5, 8, 9])
    def test_starting_late_skips_and_changes_nothing(self, start):
        settings = {"epochs": 3, "seed": 1}
        whole = data.BatchSchedule(10, 3, **settings)
        rest = data.BatchSchedule(10, 3, **settings, start=start)
        assert whole.steps_per_epoch == 3
        assert list(rest) == list(whole)[start:]
        assert len(rest) == 9 - start

    def test_a_batch_larger_than_the_set_is_refused(self):
        with pytest.raises(ValueError, match="batch_size must be at most the 10 images, got 11"):
            data.BatchSchedule(10, 11, epochs=1, seed=0)


class TestLoaders:
    def test_workers_do_not_change_the_views(self, photographs):
        views = data.TwoViews(photographs, data.augmentation(8, **SIMCLR), seed=0)
        runs = []
        for workers in (0, 2):
            batches = data.BatchSchedule(8, 3, epochs=2, seed=0)
            loader = data.view_loader(views, batches, workers=workers, pin_memory=False)
            runs.append(list(loader))
        assert len(runs[0]) == 4
        for (p, q), (p2, q2) in zip(*runs, strict=True):
            assert p.shape == (3, 3, 8, 8)
            assert torch.equal(p, p2)
            assert torch.equal(q, q2)

    def test_every_image_is_loaded_once_in_order(self, photographs):
        transform = data.eval_transform(8)
        loader = data.image_loader(photographs, transform, batch_size=3, workers=0)
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        expected = torch.stack([transform(photographs[i]) for i in range(8)])
        assert torch.equal(images, expected)
        assert labels.tolist() == list(range(8))
