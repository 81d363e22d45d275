import io
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageOps
from pyarrow import parquet
from torchvision import datasets

from clae_fast import data
from clae_fast.data.split import Arrays
from clae_fast.errors import DataError


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
        write_parquet(folder / "train.parquet", [jpeg(9)] * 2, [1, 2])
        train, _, _ = data.load("parquet", data_dir=str(folder))
        assert train.labels.tolist() == [1, 2]

    @pytest.mark.parametrize("limit", [2, 3, 99])
    def test_limit(self, folder, limit):
        train, _, test = data.load("parquet", data_dir=folder, limit=limit)
        assert train.labels.tolist() == [4, 5, 6][:limit]
        assert len(test) == 1

    def test_large_sets_are_read_a_row_group_at_a_time(self, folder, monkeypatch):
        images = [jpeg(10 * i) for i in range(7)]
        records = [{"bytes": image, "path": None} for image in images]
        table = pa.table({"img": records, "label": [0, 1] * 3 + [0]})
        parquet.write_table(table, folder / "train.parquet", row_group_size=3)
        small = data.load("parquet", data_dir=folder).train
        monkeypatch.setattr("clae_fast.data.shards._IN_MEMORY", 0)
        large = data.load("parquet", data_dir=folder).train
        assert (len(small.images.records), large.images.records) == (3, None)
        for split in (small, large, pickle.loads(pickle.dumps(large))):
            assert [np.asarray(split[i])[0, 0, 0] for i in range(7)] == list(range(0, 70, 10))
        assert large.fingerprint() == small.fingerprint()
        monkeypatch.setattr("clae_fast.data.shards._LARGE_GROUP", 0)
        assert data.load("parquet", data_dir=folder).train.images.records is not None

    def test_a_truncated_image_names_file_and_row(self, folder):
        whole = jpeg(3, size=(64, 64))
        broken = [jpeg(0), whole[: len(whole) // 2], b"", b"no image"]
        write_parquet(folder / "train.parquet", broken, [0, 1, 2, 3])
        train, _, _ = data.load("parquet", data_dir=folder)
        assert train[0].mode == "RGB"
        for row in (1, 2, 3):
            with pytest.raises(DataError, match=rf"train\.parquet, row {row}: damaged image"):
                train[row]

    def test_sizes_are_those_of_headers(self, folder):
        train, _, _ = data.load("parquet", data_dir=folder)
        assert train.size(0) == (10, 12)
        # the pixels are missing
        write_parquet(folder / "train.parquet", [jpeg(3, size=(64, 48))[:700], b"no image"], [0, 1])
        train, _, _ = data.load("parquet", data_dir=folder)
        assert train.size(0) == (48, 64)
        with pytest.raises(DataError, match=r"train\.parquet, row 1: damaged image"):
            train.size(1)

    def test_an_image_too_large_for_crops_is_named(self, folder):
        write_parquet(folder / "train.parquet", [jpeg(0, size=(32_769, 1)), jpeg(0)], [0, 1])
        train, _, _ = data.load("parquet", data_dir=folder)
        with pytest.raises(DataError, match=r"row 0: sides must be at most 32768 pixels, got"):
            train[0]

    def test_a_row_without_bytes_is_named(self, folder):
        write_parquet(folder / "train.parquet", [jpeg(0), None], [0, 1])
        train, _, _ = data.load("parquet", data_dir=folder)
        with pytest.raises(DataError, match=r"train\.parquet, row 1: img holds no bytes"):
            train[1]

    @pytest.mark.parametrize("label", [None, -1, 0.5])
    def test_a_bad_label_is_named(self, folder, label):
        write_parquet(folder / "train.parquet", [jpeg(0)], [label])
        with pytest.raises(DataError, match=r"row 0: label must be a class number, got"):
            data.load("parquet", data_dir=folder)

    def test_images_that_are_no_records_are_refused(self, folder):
        parquet.write_table(pa.table({"img": [b"1"], "label": [0]}), folder / "train.parquet")
        with pytest.raises(DataError, match=r"img must hold records with bytes, holds binary"):
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


PIXELS = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)


def write_png(file, pixels=PIXELS):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def refuse(*_, **__):
    raise OSError("Name or service not known")


class TestCifar:
    @pytest.fixture
    def root(self, tmp_path, monkeypatch):
        """CIFAR-10's files with two images each; torchvision's checksums are switched off."""
        folder = tmp_path / datasets.CIFAR10.base_folder
        folder.mkdir()
        names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
        for value, name in enumerate(names):
            batch = {"data": np.full((2, 3072), value, np.uint8), "labels": [9 - value, value]}
            (folder / name).write_bytes(pickle.dumps(batch))
        meta = {"label_names": [f"class {i}" for i in range(10)]}
        (folder / "batches.meta").write_bytes(pickle.dumps(meta))
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        return tmp_path

    def test_both_splits_are_read(self, root):
        train, labeled, test = data.load("cifar10", data_dir=root, limit=3)
        assert labeled is train
        assert train.labels.tolist() == [9, 0, 8]
        assert test.labels.tolist() == [4, 5]
        assert train.classes[9] == "class 9"
        assert train[2].size == (32, 32)
        assert np.asarray(test[0]).max() == 5

    def test_damaged_files_are_noticed(self, root, monkeypatch):
        monkeypatch.undo()
        with pytest.raises(DataError, match=r"cifar10 is not in .*, or damaged"):
            data.load("cifar10", data_dir=root)

    def test_missing_files_say_what_to_do(self, tmp_path):
        with pytest.raises(DataError, match=r"cifar100 is not in .*: unpack https:.* --download"):
            data.load("cifar100", data_dir=tmp_path)

    def test_no_network(self, tmp_path, monkeypatch):
        monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
        with pytest.raises(DataError, match=r"cannot fetch cifar10 into .* \(Name or .* https://"):
            data.load("cifar10", data_dir=tmp_path, download=True)


class TestStl10:
    @pytest.fixture
    def root(self, tmp_path, monkeypatch):
        """STL-10's files: 4 labeled, 6 other and 2 test images, whose pixels count up."""
        folder = tmp_path / datasets.STL10.base_folder
        folder.mkdir()
        first = 0
        for name, count in (("train", 4), ("unlabeled", 6), ("test", 2)):
            images = np.zeros((count, 3, 96, 96), np.uint8)
            images[:] = np.arange(first, first + count).reshape(-1, 1, 1, 1)
            # columns come first in these files
            images[:, 0, 5, 0] = 200
            images.tofile(folder / f"{name}_X.bin")
            first += count
        np.array([1, 10, 2, 1], np.uint8).tofile(folder / "train_y.bin")
        np.array([3, 10], np.uint8).tofile(folder / "test_y.bin")
        (folder / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
        monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda *_: True)
        return tmp_path

    def test_training_has_the_images_without_labels_too(self, root):
        train, labeled, test = data.load("stl10", data_dir=root)
        assert train.labels.tolist() == [0, 9, 1, 0] + [-1] * 6
        assert labeled.labels.tolist() == [0, 9, 1, 0]
        assert test.labels.tolist() == [2, 9]
        assert [np.asarray(train[i])[9, 9, 0] for i in range(10)] == list(range(10))
        assert [np.asarray(labeled[i])[9, 9, 0] for i in range(4)] == list(range(4))
        assert [np.asarray(test[i])[9, 9, 0] for i in range(2)] == [10, 11]
        assert train[0].getpixel((5, 0)) == (200, 0, 0)
        assert labeled.classes[9] == "class 9"

    def test_missing_files_say_what_to_do(self, tmp_path):
        with pytest.raises(DataError, match=r"stl10 is not in .*: unpack http.* --download"):
            data.load("stl10", data_dir=tmp_path)

    def test_no_network(self, tmp_path, monkeypatch):
        monkeypatch.setattr("torchvision.datasets.stl10.download_and_extract_archive", refuse)
        with pytest.raises(DataError, match=r"cannot fetch stl10 into .* \(Name or .* http"):
            data.load("stl10", data_dir=tmp_path, download=True)


class TestTinyImagenet:
    @pytest.fixture
    def root(self, tmp_path):
        """The released layout, with two classes."""
        folder = tmp_path / "tiny-imagenet-200"
        for wnid in ("n01", "n02"):
            for i in range(2):
                write_png(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
            (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for i in range(3):
            write_png(folder / "val" / "images" / f"val_{i}.JPEG")
        (folder / "wnids.txt").write_text("n02\nn01\n")
        (folder / "words.txt").write_text("n01\tgoldfish, Carassius\nn02\tbullfrog\nn03\tother\n")
        boxes = "\t0\t0\t62\t62\n"
        (folder / "val" / "val_annotations.txt").write_text(
            f"val_0.JPEG\tn02{boxes}val_1.JPEG\tn01{boxes}val_2.JPEG\tn02{boxes}"
        )
        return tmp_path

    @pytest.mark.parametrize("inside", ["", "tiny-imagenet-200"])
    def test_val_is_the_test_set(self, root, inside):
        train, labeled, test = data.load("tiny_imagenet", data_dir=root / inside)
        assert labeled is train
        assert train.labels.tolist() == [0, 0, 1, 1]
        assert test.labels.tolist() == [1, 0, 1]
        assert train.classes == test.classes == ("goldfish, Carassius", "bullfrog")
        assert train[3].size == test[2].size == (6, 8)

    def test_damage_is_named(self, root):
        annotations = root / "tiny-imagenet-200" / "val" / "val_annotations.txt"
        annotations.write_text("val_0.JPEG\tn09\t0\n")
        with pytest.raises(DataError, match=r"annotations\.txt, line 1: 'n09' is not in wnids"):
            data.load("tiny_imagenet", data_dir=root)
        annotations.write_text("")
        with pytest.raises(DataError, match=r"val_annotations\.txt is empty"):
            data.load("tiny_imagenet", data_dir=root)
        annotations.unlink()
        with pytest.raises(DataError, match=r"val_annotations\.txt: No such file"):
            data.load("tiny_imagenet", data_dir=root)

    def test_missing_files_say_what_to_do(self, tmp_path):
        with pytest.raises(DataError, match=r"tiny_imagenet is not in .*: unpack http.*--download"):
            data.load("tiny_imagenet", data_dir=tmp_path)

    def test_it_is_fetched_once_and_moved_when_whole(self, root, tmp_path, monkeypatch):
        archive = shutil.make_archive(str(tmp_path / "archive"), "zip", root, "tiny-imagenet-200")
        fetched, target = [], tmp_path / "new" / "data"

        def download(url, root, *, filename, md5):
            fetched.append((url, md5))
            shutil.copy(archive, os.path.join(root, filename))

        utils = "torchvision.datasets.utils."
        monkeypatch.setattr(
            utils + "download_url", lambda *a, **k: download(a[0], a[1], filename=a[2], md5=a[3])
        )
        for _ in range(2):
            train = data.load("tiny_imagenet", data_dir=target, download=True).train
            assert len(train) == 4
        assert fetched == [
            (
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                "90528d7ca1a48142e341f4ef8d21d0de",
            )
        ]
        assert sorted(os.listdir(target)) == ["tiny-imagenet-200", "tiny-imagenet-200.zip"]

    def test_no_network(self, tmp_path, monkeypatch):
        monkeypatch.setattr("torchvision.datasets.utils.download_url", refuse)
        with pytest.raises(
            DataError, match=r"cannot fetch tiny_imagenet into .* \(Name or .* http"
        ):
            data.load("tiny_imagenet", data_dir=tmp_path, download=True)
        assert os.listdir(tmp_path) == []


class TestFolder:
    @pytest.fixture
    def root(self, tmp_path):
        for part, classes in (("train", ("cat", "dog")), ("val", ("dog",))):
            for name in classes:
                write_png(tmp_path / part / name / "b.png")
                write_png(tmp_path / part / name / "deeper" / "a.JPG")
        (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
        (tmp_path / "train" / ".cache").mkdir()
        return tmp_path

    @pytest.mark.parametrize("name", ["val", "test"])
    def test_folders_are_classes(self, root, name):
        (root / "val").rename(root / name)
        train, labeled, test = data.load("folder", data_dir=root)
        assert labeled is train
        assert train.labels.tolist() == [0, 0, 1, 1]
        assert test.labels.tolist() == [1, 1]
        assert train.classes == test.classes == ("cat", "dog")
        assert np.array_equal(np.asarray(train[0]), PIXELS)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_photos_are_upright(self, root, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = root / "train" / "cat" / "b.png"
        Image.fromarray(PIXELS).save(file, exif=exif)
        train, *_ = data.load("folder", data_dir=root)
        upright = np.asarray(ImageOps.exif_transpose(Image.open(file)))
        assert np.array_equal(np.asarray(train[0]), upright)
        assert train.size(0) == upright.shape[:2]

    def test_only_regular_files_are_read(self, root):
        file = root / "train" / "cat" / "b.png"
        file.unlink()
        os.mkfifo(file)
        train, *_ = data.load("folder", data_dir=root)
        with pytest.raises(DataError, match=r"cat/b\.png: not a regular file"):
            train[0]

    def test_only_formats_of_images_are_decoded(self, root):
        # PIL would start Ghostscript for it
        (root / "train" / "cat" / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n")
        train, *_ = data.load("folder", data_dir=root)
        with pytest.raises(DataError, match=r"cat/b\.png: damaged image"):
            train[0]

    def test_test_goes_before_val(self, root):
        write_png(root / "test" / "cat" / "a.png")
        assert data.load("folder", data_dir=root).test.labels.tolist() == [0]

    def test_a_test_set_without_labels_is_passed_over(self, root):
        write_png(root / "test" / "a.png")
        assert data.load("folder", data_dir=root).test.labels.tolist() == [1, 1]

    def test_limit_takes_every_class(self, root):
        assert data.load("folder", data_dir=root, limit=2).train.labels.tolist() == [0, 1]

    def test_names_may_be_any_bytes(self, root):
        odd = os.fsencode(root / "train" / "cat") + b"/\xff \xc3\xa9.png"
        os.rename(root / "train" / "cat" / "b.png", odd)
        train = data.load("folder", data_dir=root).train
        assert [train[i].size for i in range(4)] == [(6, 8)] * 4
        assert len(train.fingerprint()) == 64

    def test_no_image_is_read_at_start(self, root):
        for file in root.rglob("*.png"):
            file.write_bytes(b"")
        assert len(data.load("folder", data_dir=root).train) == 4

    def test_fingerprint_is_that_of_names_sizes_and_labels(self, root, tmp_path):
        def fingerprint(where=root):
            return data.load("folder", data_dir=where).train.fingerprint()

        first = fingerprint()
        moved = shutil.copytree(root, tmp_path / "elsewhere")
        assert fingerprint(moved) == first
        (root / "train" / "cat" / "b.png").write_bytes(b"")
        changed = fingerprint()
        (root / "train" / "cat" / "b.png").rename(root / "train" / "cat" / "c.png")
        renamed = fingerprint()
        (root / "train" / "cat" / "c.png").unlink()
        assert len({first, changed, renamed, fingerprint()}) == 4

    def test_a_file_that_went_missing_is_part_of_the_fingerprint(self, root):
        train = data.load("folder", data_dir=root).train
        before = train.fingerprint()
        (root / "train" / "cat" / "b.png").unlink()
        assert train.fingerprint() != before

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            ("rm -r train val; rmdir .", "there is no folder ROOT$"),
            ("rm -r train val", "ROOT has no folder train: it is empty"),
            ("rm -r train", "ROOT has no folder train: it has val$"),
            ("rm -r val", "ROOT has no folder test or val, beside train"),
            ("rm -r train/*", "ROOT/train has no folders: each class needs one"),
            ("rm -r train/dog/*", r"ROOT/train/dog holds no image \(.jpg, .jpeg"),
            ("rm -r val/dog/*", r"ROOT/val holds no image \(.jpg, .jpeg"),
            ("rm -r val/*", r"ROOT has no folder test or val, .* with a folder for each class"),
            ("mv val/dog val/bird", "ROOT/val/bird: ROOT/train has no such class"),
            ("rm -r train/cat", "folder: all labeled images are of one class"),
        ],
    )
    def test_bad_layouts_are_named(self, root, damage, message):
        where = root / "set"
        where.mkdir()
        for part in ("train", "val"):
            (root / part).rename(where / part)
        subprocess.run(damage.replace("rmdir .", "rmdir ../set"), shell=True, cwd=where, check=True)
        with pytest.raises(DataError, match=message.replace("ROOT", str(where))):
            data.load("folder", data_dir=where)

    def test_a_folder_that_cannot_be_listed(self, root, monkeypatch):
        # as os.walk does where it has no permission; root has it everywhere
        for file in (root / "train" / "dog").rglob("*.*"):
            file.unlink()
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(DataError, match="train/dog: Permission denied"):
            data.load("folder", data_dir=root)


class TestImagenet100:
    LISTED = (Path(data.__file__).parent / "imagenet100.txt").read_text().split()

    def write(self, root, train, val):
        for part, wnids in (("train", train), ("val", val)):
            for wnid in wnids:
                (root / part / wnid).mkdir(parents=True)
                (root / part / wnid / "a.JPEG").write_bytes(b"")

    def test_the_list_is_that_of_tian_et_al(self):
        assert len(set(self.LISTED)) == 100
        assert sorted(self.LISTED) == self.LISTED
        # its first and last in the published order
        assert {"n02869837", "n01749939", "n01855672", "n02090622"} <= set(self.LISTED)

    def test_a_hundred_folders_are_taken_as_they_are(self, tmp_path):
        names = [f"n{i:03}" for i in range(100)]
        self.write(tmp_path, names, names)
        train, labeled, test = data.load("imagenet100", data_dir=tmp_path)
        assert labeled is train
        assert train.labels.tolist() == test.labels.tolist() == list(range(100))
        assert train.classes == tuple(names)

    def test_the_listed_ones_are_taken_of_imagenet(self, tmp_path):
        names = [*self.LISTED, "n00000001", "n99999999"]
        self.write(tmp_path, names, names)
        train, _, test = data.load("imagenet100", data_dir=tmp_path)
        assert train.classes == test.classes == tuple(self.LISTED)
        assert train.labels.tolist() == test.labels.tolist() == list(range(100))

    def test_a_list_in_the_folder_goes_first(self, tmp_path):
        self.write(tmp_path, ["n1", "n2", "n3"], ["n1", "n2", "n3"])
        (tmp_path / "imagenet100.txt").write_text("n3\nn1\n")
        assert data.load("imagenet100", data_dir=tmp_path).test.classes == ("n1", "n3")

    def test_missing_classes_are_named(self, tmp_path):
        self.write(tmp_path, [*self.LISTED[1:], "n1", "n2"], self.LISTED)
        with pytest.raises(DataError, match=f"lacks 1 of the 100 in .*, such as {self.LISTED[0]}"):
            data.load("imagenet100", data_dir=tmp_path)


class TestHub:
    @pytest.fixture
    def root(self, tmp_path, monkeypatch):
        """A data set of the hub's layout in a folder."""
        datasets = pytest.importorskip("datasets")
        images = [Image.fromarray(PIXELS), Image.fromarray(PIXELS[:, :, 0]), None]
        features = datasets.Features(
            picture=datasets.Image(),
            kind=datasets.ClassLabel(names=["cat", "dog"]),
            name=datasets.Value("string"),
        )
        for part, labels in (
            ("train", [0, 1, 1]),
            ("test", [-1, -1, -1]),
            ("validation", [1, 0, 0]),
        ):
            table = {"picture": images, "kind": labels, "name": ["a", "b", "c"]}
            records = datasets.Dataset.from_dict(table, features=features)
            (tmp_path / "set").mkdir(exist_ok=True)
            records.to_parquet(tmp_path / "set" / f"{part}-00000-of-00001.parquet")
        return tmp_path

    def load(self, root):
        return data.load(f"hf/{root}/set", data_dir=root / "cache")

    def test_columns_are_found_by_their_kind(self, root):
        train, labeled, test = self.load(root)
        assert labeled is train
        assert train.labels.tolist() == [0, 1, 1]
        # the test split has no labels
        assert test.labels.tolist() == [1, 0, 0]
        assert train.classes == ("cat", "dog")
        assert np.array_equal(np.asarray(train[0]), PIXELS)
        assert train[1].mode == "RGB"
        with pytest.raises(DataError, match=r"hf/.*set, row 2: picture is empty"):
            train[2]
        assert np.asarray(pickle.loads(pickle.dumps(train))[0]).shape == (8, 6, 3)

    def test_training_images_need_no_labels(self, root):
        file = root / "set" / "train-00000-of-00001.parquet"
        table = parquet.read_table(file)
        table = table.set_column(1, table.field(1), [pa.array([1, -1, 0])])
        parquet.write_table(table, file)
        train, labeled, _ = self.load(root)
        assert train.labels.tolist() == [1, -1, 0]
        assert labeled.labels.tolist() == [1, 0]

    def test_fingerprint(self, root):
        train, _, test = self.load(root)
        assert train.fingerprint() == self.load(root).train.fingerprint() != test.fingerprint()
        assert train.select([0]).fingerprint() != train.select([1]).fingerprint()

    def test_splits_that_are_missing(self, root):
        (root / "set" / "validation-00000-of-00001.parquet").unlink()
        with pytest.raises(DataError, match="has no split test or validation with labels, but tra"):
            self.load(root)
        (root / "set" / "train-00000-of-00001.parquet").unlink()
        with pytest.raises(DataError, match="has no split train, but test"):
            self.load(root)

    def test_columns_that_are_missing(self, root):
        write_parquet(root / "set" / "train-00000-of-00001.parquet", [jpeg(0)], [0])
        for part in ("test", "validation"):
            (root / "set" / f"{part}-00000-of-00001.parquet").unlink()
        with pytest.raises(DataError, match="needs a column of images and one of class labels"):
            self.load(root)

    def test_what_cannot_be_loaded_is_one_line(self, tmp_path):
        pytest.importorskip("datasets")
        with pytest.raises(DataError, match=r"cannot load hf//no/where \(.*hf/FOLDER") as error:
            data.load("hf//no/where")
        assert "\n" not in str(error.value)

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(DataError, match=r"hf/x needs the package datasets: pip install 'clae"):
            data.load("hf/x")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", "dataset must be one of digits, .* got 'mnist'"),
        ("hf/", "dataset must be one of digits, .* got 'hf/'"),
        ("parquet", "data_dir is required for the parquet data set"),
        ("folder", "data_dir is required for the folder data set"),
        ("imagenet100", "data_dir is required for the imagenet100 data set"),
    ],
)
def test_unknown_names_and_missing_folder_argument(name, message):
    with pytest.raises(ValueError, match=message):
        data.load(name)


def encoded(mode):
    """A ramp of brightness in one of PIL's modes, as a PNG or where that lacks it a TIFF."""
    gray = np.linspace(0, 255, 16, dtype=np.uint8).reshape(4, 4)
    if mode.startswith("I"):
        image = Image.fromarray(gray.astype(np.uint16) * 257)
    elif mode.startswith("P"):
        image = Image.fromarray(gray).convert("P")
        if mode == "P+transparency":
            image.info["transparency"] = bytes(range(256))
    else:
        image = Image.fromarray(gray).convert("RGB").convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "P+transparency", "RGB", "RGBA", "CMYK", "I;16"]
)
def test_every_kind_of_pixel_becomes_rgb(tmp_path, mode):
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", [encoded(mode)] * 2, [0, 1])
    image = data.load("parquet", data_dir=tmp_path).train[0]
    assert image.mode == "RGB"
    ramp = np.asarray(image).reshape(16, 3)
    assert (ramp[:, :1] == ramp).all()
    if mode != "1":
        assert np.abs(ramp[:, 0] - np.linspace(0, 255, 16)).max() < 2
