"""What `augment` is told to do: its random numbers, and the laws of what is drawn from them."""

import dataclasses
import inspect
from collections import Counter
from itertools import permutations

import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

import clae_fast
from clae_fast.data import RECIPES
from clae_fast.ops._philox import philox4x32

FIELDS = {
    name: value
    for name, value in dataclasses.asdict(RECIPES["byol"]).items()
    if name != "interpolation"
}
TOP, LEFT, HEIGHT, WIDTH, FLIP = range(5)
ORDER, FACTORS = slice(5, 9), slice(9, 13)
GREY, SIGMA, SOLARIZE = 13, 14, 15
N = 20_000
# seeds are fixed: a law that holds stays above it, a wrong one falls far below
LEAST_P = 1e-3


def draw(ids=N, *, seed=0, epoch=0, height=32, width=32, **settings):
    ids = torch.arange(ids) if isinstance(ids, int) else torch.tensor(ids)
    return clae_fast.augment_params(
        ids, seed=seed, epoch=epoch, height=height, width=width, **{**FIELDS, **settings}
    )


@pytest.fixture(scope="module")
def drawn():
    return draw(seed=5, epoch=7)


# of the generator's authors, in Random123's known answers
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, words):
    counter = tuple(torch.tensor([word]) for word in counter)
    assert philox4x32(counter, key).tolist() == [list(words)]


def test_counters_broadcast():
    first, third = torch.arange(3).view(-1, 1), torch.arange(5)
    words = philox4x32((first, 9, third, 0), (1, 2))
    one = philox4x32((torch.tensor(2), 9, torch.tensor(4), 0), (1, 2))
    assert words.shape == (3, 5, 4)
    assert words[2, 4].tolist() == one.tolist()


def test_arguments_are_the_fields_of_a_recipe():
    arguments = set(inspect.signature(clae_fast.augment_params).parameters)
    others = {"ids", "seed", "epoch", "height", "width", "crop_max_scale", "first_view"}
    assert arguments - others == set(FIELDS)


def test_a_row_is_a_function_of_the_sample():
    whole = draw(50)
    ids = [49, 3, 17, 3]
    assert torch.equal(draw(ids), whole[:, ids])
    assert torch.equal(draw([17]), whole[:, 17:18])
    assert draw(0).shape == (2, 0, 16)


def test_every_word_of_the_key_and_the_counter_counts():
    rows = [
        draw([1])[0],
        draw([1])[1],
        draw([2])[0],
        draw([1 + 2**32])[0],
        draw([-1])[0],
        draw([1], epoch=1)[0],
        draw([1], seed=1)[0],
        draw([1], seed=2**32)[0],
        draw([1], seed=2**64 - 1)[0],
    ]
    assert len({tuple(row[0].tolist()) for row in rows}) == len(rows)


def test_further_views():
    pairs = [draw(50, first_view=view) for view in (0, 2, 1, 2**16 - 2)]
    assert torch.equal(pairs[0], draw(50))
    # by its number and not by its place, but for what the two of a pair have of their own
    shared = [*range(13), GREY]
    assert torch.equal(pairs[2][0][:, shared], pairs[0][1][:, shared])
    assert torch.equal(pairs[2][1][:, shared], pairs[1][0][:, shared])
    boxes = torch.cat(pairs)[:, :, :4].double().flatten(1)
    assert len(boxes.unique(dim=0)) == 6
    for view, chosen in enumerate(draw(N, first_view=2)[..., SIGMA] != 0):
        assert stats.binomtest(int(chosen.sum()), N, (1.0, 0.1)[view]).pvalue > LEAST_P


def test_epoch_as_a_tensor():
    assert torch.equal(draw(9, epoch=torch.tensor(7)), draw(9, epoch=7))


def test_compiles():
    compiled = torch.compile(clae_fast.augment_params, backend="aot_eager", fullgraph=True)
    ids = torch.arange(7)
    for height in (32, ids + 30):
        options = {"seed": 3, "epoch": torch.tensor(2), "height": height, "width": 48, **FIELDS}
        assert torch.equal(compiled(ids, **options), clae_fast.augment_params(ids, **options))


def test_sizes_of_each_sample():
    sizes = torch.tensor([[32, 32], [1, 1], [500, 375], [10, 100], [100, 10], [32768, 32768]] * 20)
    params = draw(len(sizes), height=sizes[:, 0], width=sizes[:, 1])
    for i, (height, width) in enumerate(sizes.tolist()):
        assert torch.equal(params[:, i : i + 1], draw([i], height=height, width=width))
    assert torch.equal(draw(9, height=torch.full((9,), 32)), draw(9))
    assert draw(0, height=sizes[:0, 0], width=sizes[:0, 1]).shape == (2, 0, 16)


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(32, 32, (0.08, 1)), (96, 64, (0.2, 1)), (40, 200, (0.9, 1)), (90, 120, (0.05, 0.14))],
)
def test_crops_are_torchvisions(height, width, scale):
    settings = dict(zip(("crop_min_scale", "crop_max_scale"), scale, strict=True))
    params = draw(3000, height=height, width=width, **settings)[0]
    crop = v2.RandomResizedCrop(32, scale=scale)
    image = torch.empty(3, height, width)
    theirs = torch.tensor([list(crop.make_params([image]).values()) for _ in range(3000)])
    ours = params[:, :4]
    assert (ours >= 0).all()
    assert (ours[:, TOP] + ours[:, HEIGHT] <= height).all()
    assert (ours[:, LEFT] + ours[:, WIDTH] <= width).all()

    def features(box):
        top, left, rows, columns = box.double().unbind(1)
        return top, left, rows, columns, rows * columns, rows / columns

    for mine, other in zip(features(ours), features(theirs), strict=True):
        assert stats.ks_2samp(mine, other).pvalue > LEAST_P


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10)), (1, 1, (0, 0, 1, 1))],
)
def test_the_center_where_no_try_fits(height, width, box):
    params = draw(100, height=height, width=width, crop_min_scale=1.0)
    assert (params[..., :4] == torch.tensor(box)).all()


def test_positions_are_uniform(drawn):
    for offset, side in ((TOP, HEIGHT), (LEFT, WIDTH)):
        spare = 32 - drawn[0, :, side]
        at = drawn[0, spare == 7, offset]
        counts = torch.bincount(at.long(), minlength=8)
        assert len(counts) == 8
        assert stats.chisquare(counts).pvalue > LEAST_P


@pytest.mark.parametrize(
    ("column", "probability"),
    [(FLIP, (0.5, 0.5)), (GREY, (0.2, 0.2)), (SIGMA, (1.0, 0.1)), (SOLARIZE, (0.0, 0.2))],
)
def test_probabilities(drawn, column, probability):
    for view in (0, 1):
        chosen = int((drawn[view, :, column] != 0).sum())
        assert stats.binomtest(chosen, N, probability[view]).pvalue > LEAST_P
    if column != SIGMA:
        assert set(drawn[..., column].unique().tolist()) <= {0.0, 1.0}


def test_jitter(drawn):
    factors = drawn[0, :, FACTORS].double()
    none = torch.tensor([1.0, 1.0, 1.0, 0.0])
    jittered = (factors != none).any(1)
    assert stats.binomtest(int(jittered.sum()), N, 0.8).pvalue > LEAST_P
    assert (factors[~jittered] == none).all()
    for values, strength, center in zip(
        factors[jittered].unbind(1), (0.4, 0.4, 0.2, 0.1), none, strict=True
    ):
        law = stats.uniform(float(center) - strength, 2 * strength)
        assert stats.kstest(values, law.cdf).pvalue > LEAST_P
    # a factor says nothing of another, nor the first view's of the second's
    both = torch.cat((factors, drawn[1, :, FACTORS].double()), dim=1)[jittered]
    both = both[(both[:, 4:] != none).any(1)]
    assert (torch.corrcoef(both.T) - torch.eye(8)).abs().max() < 5 / len(both) ** 0.5


def test_orders_are_uniform(drawn):
    counts = Counter(tuple(order) for order in drawn[0, :, ORDER].int().tolist())
    assert set(counts) == set(permutations(range(4)))
    assert stats.chisquare(list(counts.values())).pvalue > LEAST_P


def test_blur(drawn):
    sigma = drawn[0, :, SIGMA].double()
    assert stats.kstest(sigma, stats.uniform(0.1, 1.9).cdf).pvalue > LEAST_P


def test_strong_jitter_stops_at_0():
    brightness = draw(2000, color_jitter=(1.5, 0, 0, 0), color_jitter_prob=1.0)[0, :, 9].double()
    assert stats.kstest(brightness, stats.uniform(0.0, 2.5).cdf).pvalue > LEAST_P


def test_nothing_where_nothing_is_asked_for():
    nothing = {"blur_prob": (0, 0), "solarize_prob": (0, 0), "grey_prob": 0, "color_jitter_prob": 0}
    params = draw(500, crop_min_scale=1.0, flip=False, **nothing)
    assert (params[..., FLIP] == 0).all()
    assert (params[..., FACTORS] == torch.tensor([1.0, 1.0, 1.0, 0.0])).all()
    assert (params[..., 13:] == 0).all()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed must be from 0 to 18446744073709551615, got -1"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got float"),
        ({"epoch": 2**32}, ValueError, "epoch must be from 0"),
        ({"epoch": torch.zeros(1)}, ValueError, "epoch must be a number or an int64 tensor"),
        ({"height": 0}, ValueError, "height must be from 1"),
        ({"width": True}, TypeError, "width must be an integer, got bool"),
        ({"height": torch.ones(3)}, ValueError, "height must be a number or an int64 tensor"),
        (
            {"width": torch.ones(2).long()},
            ValueError,
            r"width must .* int64 tensor \[3\] on cpu",
        ),
        ({"flip": 1}, TypeError, "flip must be True or False, got int"),
        ({"crop_min_scale": 1.5}, ValueError, "crop_min_scale must be from 0 to 1.0"),
        ({"crop_max_scale": 1.5}, ValueError, "crop_max_scale must be from 0 to 1.0"),
        ({"crop_max_scale": 0.05}, ValueError, "crop_min_scale must be from 0 to 0.05"),
        ({"first_view": -2}, ValueError, "first_view must be from 0 to 65534, got -2"),
        ({"first_view": 2.0}, TypeError, "first_view must be an integer, got float"),
        ({"color_jitter": 0.4}, TypeError, "color_jitter must be a list or tuple, got float"),
        ({"color_jitter": (0.4,) * 3}, ValueError, "color_jitter must be 4 numbers"),
        ({"color_jitter": (0, 0, 0, 0.6)}, ValueError, "color_jitter must be from 0 to 0.5"),
        ({"grey_prob": "x"}, TypeError, "grey_prob must be made of numbers, got str"),
        ({"blur_prob": (0.5, float("nan"))}, ValueError, "blur_prob must be from 0 to 1.0"),
    ],
)
def test_refuses(settings, error, message):
    with pytest.raises(error, match=message):
        draw(3, **settings)


@pytest.mark.parametrize(
    ("ids", "error"),
    [([1], TypeError), (torch.zeros(3), TypeError), (torch.zeros(1, 1).long(), ValueError)],
)
def test_refuses_ids(ids, error):
    with pytest.raises(error, match="ids must"):
        clae_fast.augment_params(ids, seed=0, epoch=0, height=8, width=8, **FIELDS)
