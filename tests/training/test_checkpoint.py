import contextlib
import errno
import os
import pickle
import random
import resource

import pytest
import torch

from clae_fast.training import checkpoint


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.pt"


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_round_trip_keeps_values_and_shared_tensors(path):
    weight = torch.randn(3, 4)
    checkpoint.save(path, {"a": weight, "b": weight, "step": 7, "none": None})
    state = checkpoint.load(path)
    assert torch.equal(state["a"], weight)
    assert state["a"].data_ptr() == state["b"].data_ptr()
    assert (state["step"], state["none"]) == (7, None)
    assert os.listdir(path.parent) == ["last.pt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_previous_checkpoint(path, monkeypatch, call):
    checkpoint.save(path, {"step": 1})
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.save(path, {"step": 2})
    assert str(caught.value) == (
        f"cannot write checkpoint {path}: No space left on device; the one before it is intact"
    )
    assert checkpoint.load(path) == {"step": 1}
    assert os.listdir(path.parent) == ["last.pt"]


def test_a_write_that_stops_half_way_keeps_the_previous_checkpoint(path):
    checkpoint.save(path, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))
    try:
        with pytest.raises(checkpoint.CheckpointError, match="File too large"):
            checkpoint.save(path, {"step": 2, "weight": torch.zeros(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.load(path) == {"step": 1}
    assert os.listdir(path.parent) == ["last.pt"]


def test_what_a_killed_write_left_behind_is_overwritten(path):
    path.with_name("last.pt.tmp").write_bytes(b"half a checkp")
    checkpoint.save(path, {"step": 1})
    assert os.listdir(path.parent) == ["last.pt"]


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_pickled_code_is_not_executed(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    torch.save({"method": Payload()}, path)
    with pytest.raises(checkpoint.CheckpointError, match="cannot read checkpoint"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(checkpoint.CheckpointError, match="cannot read checkpoint"):
        checkpoint.load(path)
    assert not os.path.exists("executed")


def test_damaged_and_missing_files_are_named(path):
    with pytest.raises(checkpoint.CheckpointError, match=r"last\.pt: .*No such file"):
        checkpoint.load(path)
    checkpoint.save(path, {"weight": torch.zeros(1000)})
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (b"", whole[:middle], b"not a checkpoint", flipped):
        path.write_bytes(content)
        with pytest.raises(checkpoint.CheckpointError, match=r"cannot read checkpoint .*last\.pt"):
            checkpoint.load(path)
    torch.save(torch.zeros(1), path)
    with pytest.raises(checkpoint.CheckpointError, match="it holds no dictionary"):
        checkpoint.load(path)


@pytest.mark.parametrize("seed", range(5))
def test_no_damage_goes_unnoticed(path, seed):
    expected = {"weight": torch.randn(300), "step": 7}
    checkpoint.save(path, expected)
    content = bytearray(path.read_bytes())
    generator = random.Random(seed)
    for _ in range(40):
        at = generator.randrange(len(content))
        was, content[at] = content[at], content[at] ^ 1 << generator.randrange(8)
        path.write_bytes(content)
        # in between the parts of the file it does no harm
        with contextlib.suppress(checkpoint.CheckpointError):
            torch.testing.assert_close(checkpoint.load(path), expected, rtol=0, atol=0)
        content[at] = was


def test_an_interrupted_write_leaves_nothing_behind(path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    checkpoint.save(path, {"step": 1})
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path) == {"step": 1}
    assert os.listdir(path.parent) == ["last.pt"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("step"), "it lacks 'step'"),
        (OSError(errno.ENOENT, "No such file"), "No such file"),
        (RuntimeError("sizes differ:\n\tweight\n\tbias"), "sizes differ: weight bias"),
        (RuntimeError("It is damaged. " + "Read this advice " * 20), "It is damaged"),
        (RuntimeError("x" * 200), "x" * 150 + " ..."),
    ],
)
def test_reasons_are_short(error, said):
    assert checkpoint.reason(error) == said
