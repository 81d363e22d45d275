"""The views of a run: the same pixels wherever the images are, and where they are put."""

import contextlib
import dataclasses
import os
import re
from collections import namedtuple
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import clae_fast
from clae_fast import data
from clae_fast.data import RECIPES, encoded, memory, resident, views
from clae_fast.data.pixels import pack, sides, to_bytes, unpack
from clae_fast.data.split import Arrays
from clae_fast.data.streamed import _copied_ahead

CPU = torch.device("cpu")
# three batches in each of two epochs, one image left over
COUNT, BATCH = 7, 2
SIZE = 8


@pytest.fixture(autouse=True)
def three_cores(monkeypatch):
    """As many loader processes as are asked for, on any machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})


@pytest.fixture(scope="module")
def dense():
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 20, 24, 3), dtype=np.uint8)
    return data.Split.whole(Arrays(pixels), range(COUNT))


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """Image files whose sizes differ, as in a folder of photographs."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for row in range(COUNT):
        for part in ("train", "test"):
            file = folder / part / str(row % 2) / f"{row}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (10 + row, 19 - 2 * row, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file)
    return data.load("folder", data_dir=folder).train


@pytest.fixture(params=["dense", "ragged"])
def split(request):
    return request.getfixturevalue(request.param)


# of images of one brightness, crops of the same
CROPS = dataclasses.replace(
    RECIPES["simclr"], color_jitter=(0.0,) * 4, grey_prob=0.0, blur_prob=(0.0, 0.0)
)


def source(split, *, recipe=RECIPES["byol"], batch_size=BATCH, **settings):
    part = {"epochs": 2, "seed": 5}
    part |= {
        name: settings.pop(name)
        for name in ("epochs", "seed", "start", "rank", "world")
        if name in settings
    }
    settings = {
        "image_size": SIZE,
        "device": CPU,
        "dtype": torch.float32,
        "workers": 0,
        "resident": "yes",
        **settings,
    }
    schedule = data.BatchSchedule(len(split), batch_size, **part)
    return data.view_source(split, schedule, recipe, **settings)


def assert_same(batches, expected):
    batches, expected = list(batches), list(expected)
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        for view, same in zip(batch.views, other.views, strict=True):
            assert torch.equal(view, same)
        assert (batch.labels is None) == (other.labels is None)
        if batch.labels is not None:
            assert torch.equal(batch.labels, other.labels)


def joined(*ranks):
    """The batches whose parts the ranks have."""
    for parts in zip(*ranks, strict=True):
        views, labels = zip(*parts, strict=True)
        whole = tuple(map(torch.cat, zip(*views, strict=True)))
        yield data.Batch(whole, None if labels[0] is None else torch.cat(labels))


def images_of(view):
    """Which images the crops are of, where each has a brightness of its own: its number / 255."""
    return (255 * view.mean(dim=(1, 2, 3))).round().long()


@pytest.fixture(scope="module", params=["dense", "ragged"])
def flat(request, tmp_path_factory):
    """Images of one brightness each, of classes in another order."""
    folder = tmp_path_factory.mktemp("flat")
    labels = [9 - row for row in range(COUNT)]
    for row in range(COUNT):
        sides = (20, 24) if request.param == "dense" else (10 + row, 19 - row)
        Image.fromarray(np.full((*sides, 3), row, np.uint8)).save(folder / f"{row}.png")
    files = encoded.Files.below(folder, [str(folder / f"{row}.png") for row in range(COUNT)])
    return data.Split.whole(files, labels)


class TestPixels:
    def test_are_those_of_augment(self, split):
        schedule = data.BatchSchedule(COUNT, BATCH, epochs=2, seed=5)
        settings = dataclasses.asdict(RECIPES["byol"])
        interpolation = settings.pop("interpolation")
        batches = list(source(split))
        assert len(batches) == len(schedule) == 6
        for (epoch, rows), ((x_p, x_q), labels) in zip(schedule, batches, strict=True):
            assert labels is None
            for i, row in enumerate(rows.tolist()):
                image = torch.from_numpy(np.array(split[row])).permute(2, 0, 1)[None]
                height, width = image.shape[2:]
                params = clae_fast.augment_params(
                    torch.tensor([row]),
                    seed=5,
                    epoch=epoch,
                    height=height,
                    width=width,
                    **settings,
                )
                p, q = clae_fast.augment(image, params, size=SIZE, interpolation=interpolation)
                assert torch.equal(x_p[i], p[0])
                assert torch.equal(x_q[i], q[0])

    @pytest.mark.parametrize("resident", ["yes", "no"])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_workers_and_residence_change_none(self, split, resident, workers):
        assert_same(source(split, resident=resident, workers=workers), source(split))

    @pytest.mark.parametrize("resident", ["yes", "no"])
    @pytest.mark.parametrize("start", [1, 3, 4, 6])
    def test_starting_late_changes_none(self, split, resident, start):
        rest = source(split, resident=resident, start=start)
        assert len(rest) == 6 - start
        assert_same(rest, list(source(split))[start:])

    @pytest.mark.parametrize("resident", ["yes", "no"])
    def test_ranks_change_none(self, split, resident):
        ranks = [source(split, resident=resident, rank=rank, world=2) for rank in (0, 1)]
        assert_same(joined(*ranks), source(split))

    def test_how_many_are_drawn_at_a_time_changes_none(self, split, monkeypatch):
        expected = list(source(split))
        for drawn in (1, BATCH, 2 * BATCH):
            monkeypatch.setattr(resident, "_DRAWN", drawn)
            assert_same(source(split), expected)

    def test_chunks_of_decoding_change_none(self, split, monkeypatch):
        expected = list(source(split))
        monkeypatch.setattr(resident, "_CHUNK", 3)
        assert_same(source(split), expected)
        assert_same(source(split, workers=2), expected)

    def test_seeds_and_epochs_change_them(self, dense):
        whole = source(dense, batch_size=COUNT)
        (p, q), (later, _) = (batch.views for batch in whole)
        other = next(iter(source(dense, batch_size=COUNT, seed=6))).views[0]
        for view in (q, later, other):
            assert not torch.equal(p, view)

    def test_a_second_pass_is_the_first(self, split):
        once = source(split)
        assert_same(once, list(once))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("resident", ["yes", "no"])
    def test_format(self, split, dtype, resident):
        for view in next(iter(source(split, dtype=dtype, resident=resident))).views:
            assert (view.shape, view.dtype) == ((BATCH, 3, SIZE, SIZE), dtype)
            assert view.is_contiguous(memory_format=torch.channels_last)
            assert 0 <= view.min() < view.max() <= 1

    @pytest.mark.parametrize("resident", ["yes", "no"])
    def test_the_global_generator_is_left_alone(self, dense, resident):
        state = torch.get_rng_state()
        list(source(dense, resident=resident))
        assert torch.equal(torch.get_rng_state(), state)


class TestSmallCrops:
    SMALL: ClassVar = {"small_crops": 4, "small_crop_size": 5}

    @pytest.mark.parametrize("resident", ["yes", "no"])
    def test_follow_the_large_views_and_leave_them(self, split, resident):
        batches = list(source(split, resident=resident, **self.SMALL))
        for batch, (large, _) in zip(batches, source(split), strict=True):
            assert [view.shape[1:] for view in batch.views] == [(3, SIZE, SIZE)] * 2 + [
                (3, 5, 5)
            ] * 4
            assert len({tuple(view.flatten().tolist()) for view in batch.views[2:]}) == 4
            for view, same in zip(batch.views, large, strict=False):
                assert torch.equal(view, same)
            for view in batch.views:
                assert view.is_contiguous(memory_format=torch.channels_last)

    def test_an_odd_one_is_dropped(self, dense):
        for small_crops, count in ((0, 2), (1, 2), (2, 4), (3, 4)):
            found = source(dense, small_crops=small_crops, small_crop_size=5)
            assert len(next(iter(found)).views) == count

    def test_take_their_part_of_the_image(self):
        """Of images that grow brighter from left to right, at most 3/4 of the width wide."""
        ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 256, 3))
        split = data.Split.whole(Arrays(np.stack([ramp] * 60)), np.zeros(60))
        recipe = dataclasses.replace(
            RECIPES["plain"], color_jitter=(0.0,) * 4, grey_prob=0.0, flip=False
        )
        scale = {"small_crop_size": 16, "small_crop_scale": (0.05, 0.14)}
        settings = {"image_size": 16, "batch_size": 60, "epochs": 1, "recipe": recipe}
        (batch,) = source(split, **settings, small_crops=6, **scale)
        views = torch.cat(batch.views[2:])
        # 13/16 of the width lie between the centers of pixels whose neighbors are in the crop
        width = (views[:, 0, 0, 14] - views[:, 0, 0, 1]) * 255 / 13 * 16
        low, high = (
            (part * 256**2 * ratio) ** 0.5 for part, ratio in ((0.05, 3 / 4), (0.14, 4 / 3))
        )
        assert low - 2 < width.min() < low + 8
        assert high - 8 < width.max() < high + 2

    @pytest.mark.parametrize("workers", [0, 2])
    def test_are_the_same_wherever_images_are(self, split, workers):
        resident = source(split, **self.SMALL, labels=True)
        assert_same(
            source(split, resident="no", workers=workers, **self.SMALL, labels=True), resident
        )

    @pytest.mark.parametrize("resident", ["yes", "no"])
    def test_of_ranks(self, split, resident):
        settings = {"resident": resident, **self.SMALL, "labels": True}
        ranks = [source(split, **settings, rank=rank, world=2) for rank in (0, 1)]
        assert_same(joined(*ranks), source(split, **settings))

    def test_refuses_a_negative_number(self, dense):
        with pytest.raises(ValueError, match="small_crops must be 0 or more, got -1"):
            source(dense, small_crops=-1)


class TestLabels:
    @pytest.mark.parametrize("resident", ["yes", "no"])
    def test_follow_images(self, flat, resident):
        found = list(source(flat, recipe=CROPS, resident=resident, labels=True, small_crops=2))
        for batch in found:
            assert batch.labels.dtype == torch.int64
            for view in batch.views:
                assert torch.equal(9 - images_of(view), batch.labels)
        assert len(torch.cat([batch.labels for batch in found[:3]]).unique()) == 6

    @pytest.mark.parametrize("resident", ["yes", "no"])
    def test_follow_the_image_that_stands_in(self, flat, resident):
        names = flat.images.names.copy()
        names[[2, 3, 6]] = b"no 2", b"no 3", b"no 6"
        split = dataclasses.replace(
            flat,
            images=dataclasses.replace(flat.images, names=names),
            corrupt=data.CorruptImages("skip"),
        )
        seen = set()
        for batch in source(split, recipe=CROPS, resident=resident, labels=True):
            assert torch.equal(9 - images_of(batch.views[0]), batch.labels)
            seen |= set(batch.labels.tolist())
        assert seen <= {9, 8, 5, 4}
        assert len(split.corrupt) == 3

    def test_are_there_where_asked_for(self, dense):
        assert next(iter(source(dense))).labels is None

    def test_refuses_images_without(self, dense):
        labels = dense.labels.clone()
        labels[[1, 4]] = -1
        message = "labels of all training images are needed, but 2 of the 7 have none"
        split = dataclasses.replace(dense, labels=labels)
        with pytest.raises(ValueError, match=message):
            source(split, labels=True)
        assert len(source(split)) == 6


class TestBytes:
    def test_digits_are_rounded(self):
        train = data.load("digits", limit=9).train
        pixels, sizes = pack([to_bytes(train[i]) for i in range(9)])
        images = unpack(pixels, sizes)
        assert images.shape == (9, 3, 16, 16)
        assert sides(images) == (16, 16)
        exact = torch.stack([train[i] for i in range(9)])
        assert (images / 255 - exact).abs().max() <= 0.5 / 255 + 1e-6

    def test_sizes_that_differ_make_ragged_images(self, ragged):
        images = unpack(*pack([to_bytes(ragged[i]) for i in range(COUNT)]))
        assert isinstance(images, clae_fast.RaggedImages)
        for i in range(COUNT):
            assert np.array_equal(images.image(i).permute(1, 2, 0), np.asarray(ragged[i]))
        height, width = sides(images, torch.tensor([4, 1]))
        assert list(zip(width.tolist(), height.tolist(), strict=True)) == [
            ragged[4].size,
            ragged[1].size,
        ]


class TestEstimate:
    def test_is_the_size_where_all_headers_are_read(self, split):
        exact = sum(3 * height * width for height, width in map(split.size, range(COUNT)))
        assert memory.decoded_bytes(split) == exact
        assert sum(to_bytes(split[i]).size for i in range(COUNT)) == exact

    def test_reads_a_sample_of_headers_and_decodes_none(self, monkeypatch):
        asked = []
        Stored = namedtuple("Stored", "size")
        images = Stored(lambda row: asked.append(row) or (10, 20 + row % 2))
        rows = torch.arange(100_000)
        split = data.Split(images, rows, rows)
        assert memory.decoded_bytes(split) == 3 * 10 * 20.5 * 100_000
        assert len(set(asked)) == len(asked) == 256
        assert min(asked) == 0
        assert max(asked) == 99_999

    def test_floats_become_bytes(self):
        train = data.load("digits").train
        assert memory.decoded_bytes(train) == 1437 * 16 * 16 * 3

    def test_passes_over_what_cannot_be_read(self, ragged, tmp_path):
        names = ragged.images.names.copy()
        names[:3] = b"nowhere.png"
        split = dataclasses.replace(ragged, images=dataclasses.replace(ragged.images, names=names))
        assert memory.decoded_bytes(split) > 0
        split = split.select([0, 1, 2])
        assert memory.decoded_bytes(split) == 0


class TestPlace:
    def where(self, split, monkeypatch, free, resident="auto", **settings):
        monkeypatch.setattr(views, "free_bytes", lambda device: free)
        return source(split, resident=resident, **settings).where

    def test_auto_takes_a_quarter_of_the_main_memory(self, split, monkeypatch):
        need = memory.decoded_bytes(split)
        assert self.where(split, monkeypatch, 4 * need).startswith("on cpu, ")
        assert self.where(split, monkeypatch, 4 * need - 1) == "streamed, no workers"
        assert self.where(split, monkeypatch, 4 * need, world=2) == "streamed, no workers"
        assert self.where(split, monkeypatch, 8 * need, world=2).startswith("on cpu, ")

    @pytest.mark.parametrize(
        ("gpu", "main", "auto"),
        [(3, 2, True), (2, 2, False), (3, 1, False), (1, 1, False)],
    )
    def test_auto_takes_a_third_of_a_gpu(self, dense, monkeypatch, gpu, main, auto):
        need = memory.decoded_bytes(dense)
        free = {"cuda": gpu * need, "cpu": main * need}
        monkeypatch.setattr(views, "free_bytes", lambda device: free[device.type])
        device = torch.device("cuda", 1)
        found = data.resident_bytes(dense, "auto", device=device)
        assert found == (need if auto else None)
        assert data.resident_bytes(dense, "yes", device=device) == need
        assert data.resident_bytes(dense, "no", device=device) is None
        free["cuda"] = need - 1
        with pytest.raises(ValueError, match=r"0\.0101 MB and cuda:1 has 0\.0101 MB free"):
            data.resident_bytes(dense, "yes", device=device)

    def test_yes_takes_what_there_is(self, dense, monkeypatch):
        need = memory.decoded_bytes(dense)
        assert self.where(dense, monkeypatch, need, "yes") == "on cpu, 0.0101 MB"
        message = (
            "resident is 'yes', but decoded the training images take about 0.0101 MB and main "
            "memory has 0.0101 MB free: leave it at 'auto'"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            self.where(dense, monkeypatch, need - 1, "yes")

    @pytest.mark.parametrize(
        ("workers", "where"), [(0, "no workers"), (1, "1 worker"), (9, "3 workers")]
    )
    def test_no_streams_with_a_worker_a_core(self, split, monkeypatch, workers, where):
        found = self.where(split, monkeypatch, 10**12, "no", workers=workers)
        assert found == f"streamed, {where}"

    def test_what_is_unknown_is_named(self, dense):
        with pytest.raises(ValueError, match="resident must be one of auto, yes, no, got 'maybe'"):
            source(dense, resident="maybe")

    @pytest.mark.parametrize(
        ("size", "text"),
        [(10_080, "0.0101 MB"), (153_600_000, "154 MB"), (26_400_000_000, "26.4 GB")],
    )
    def test_sizes_are_readable(self, size, text):
        assert memory.readable(size) == text


class TestFree:
    def test_is_less_than_the_machine_has(self):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        assert 0 < memory.free_bytes(CPU) < total

    def test_a_gpu_is_asked(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 9))
        assert memory.free_bytes(torch.device("cuda", 3)) == 5

    @pytest.mark.parametrize("version", [1, 2])
    def test_control_groups_count(self, tmp_path, monkeypatch, version):
        name, controllers = ("memory", "memory") if version == 1 else ("", "")
        limit, use, cache = memory._CGROUPS[controllers][1:]
        monkeypatch.setitem(memory._CGROUPS, controllers, (str(tmp_path), limit, use, cache))
        for folder, most in ((tmp_path / "job" / "step", "max"), (tmp_path / "job", "1000")):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / limit).write_text(most)
            (folder / use).write_text("700\n")
            (folder / "memory.stat").write_text(f"anon 400\n{cache} 250\n")
        groups = tmp_path / "cgroup"
        groups.write_text(f"5:cpu:/\n4:{name}:/job/step\n")
        monkeypatch.setattr(memory, "_GROUPS_OF_PROCESS", groups)
        assert memory.free_bytes(CPU) == 1000 - 700 + 250


class TestCopiedAhead:
    def test_each_batch_is_copied_before_the_last_is_used(self, monkeypatch):
        """On the CPU, with a stream that does nothing."""
        said = []

        class Stream:
            def __init__(self, device):
                pass

            def record_event(self):
                return "copied"

            def wait_event(self, event):
                said.append(event)

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device))
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda tensor, stream: said.append("held")
        )
        dense = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
        ragged = unpack(*pack([np.zeros((2, size, 3), np.uint8) for size in (2, 3)]))
        batches = [
            (dense, torch.zeros(2, 1, 16), None),
            (ragged, torch.zeros(2, 2, 16), torch.zeros(2)),
        ]

        def decoded():
            for number, batch in enumerate(batches):
                said.append(number)
                yield batch

        found = []
        for batch in _copied_ahead(decoded(), CPU):
            said.append("used")
            found.append(batch)
        assert said == [0, 1, "copied", "held", "held", "used", "copied", *["held"] * 5, "used"]
        assert torch.equal(found[0][0], dense)
        assert isinstance(found[1][0], clae_fast.RaggedImages)
        assert torch.equal(found[1][0].pixels, ragged.pixels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestGpu:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_residence_changes_no_pixel(self, split, workers):
        settings = {"device": torch.device("cuda"), "epochs": 8, "labels": True, "small_crops": 2}
        resident = list(source(split, **settings))
        assert_same(source(split, **settings, resident="no", workers=workers), resident)
        settings["device"] = CPU
        for batch, other in zip(resident, source(split, **settings), strict=True):
            assert torch.equal(batch.labels.cpu(), other.labels)
            for view, expected in zip(batch.views, other.views, strict=True):
                assert view.device.type == "cuda"
                assert view.is_contiguous(memory_format=torch.channels_last)
                assert (view.cpu() - expected).abs().max() <= 1 / 255
