"""The small data sets: what they hold, how they became binary, how they are split."""

import itertools
import time
import types
import urllib.error

import numpy as np
import pytest
import torch

from companion import data

FLOATS = [torch.float32, torch.float64]


@pytest.fixture(scope="module")
def grey():
    """The digits as scikit-learn has them."""
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


def test_digits_are_split_within_each_digit_and_every_fifth_is_for_testing(grey):
    split = data.digits(binarize=None, dtype=torch.float64)
    is_test = np.zeros(1797, bool)
    for digit in range(10):
        is_test[np.flatnonzero(grey[1] == digit)[4::5]] = True
    for part, labels, rows in (
        (split.train, split.train_labels, ~is_test),
        (split.test, split.test_labels, is_test),
    ):
        assert torch.equal(part * 16, torch.from_numpy(grey[0][rows]))
        assert torch.equal(labels, torch.from_numpy(grey[1][rows]))
    assert split.train.shape == (1442, 64)
    assert split.test.shape == (355, 64)
    assert split.train_labels.dtype == torch.int64


@pytest.mark.parametrize("fraction", [0.1, 0.25, 1 / 3, 0.5, 0.9])
def test_any_test_fraction_keeps_every_image_and_the_proportions(fraction, grey):
    split = data.digits(binarize=None, test_fraction=fraction, dtype=torch.float64)
    both = torch.cat([split.train, split.test]) * 16
    assert sorted(both.tolist()) == sorted(grey[0].tolist())
    shares = split.test_labels.bincount() / torch.from_numpy(grey[1]).bincount()
    assert (shares - fraction).abs().max() <= 1 / 174  # one image of the rarest digit


def test_threshold_turns_on_the_pixels_of_at_least_half_the_scale(grey):
    binary, full = data.digits(), data.digits(binarize=None)
    for on, value in zip(binary[:2], full[:2], strict=True):
        assert torch.equal(on, (value >= 0.5).to(on))
    pixels = torch.cat(binary[:2])
    assert pixels.mean().item() == pytest.approx((grey[0] >= 8).mean(), abs=1e-6)
    assert pixels.mean().item() == pytest.approx(0.323, abs=5e-4)  # "a third of them"


def test_thirteen_test_images_equal_a_training_image():
    train, test, *_ = data.digits()
    known = set(map(tuple, train.tolist()))
    assert sum(tuple(image) in known for image in test.tolist()) == 13


def test_sampled_pixels_follow_their_grey_values(rng):
    # Under independent Bernoulli(p/16) pixels, sum (x - p) over sqrt(sum p(1-p)) is normal; pixels
    # of value 0 and 16 are certain. The control draws with p / 17.
    truth = data.digits(binarize=None, dtype=torch.float64).train
    drawn = data.digits(binarize="sample", generator=rng(0), dtype=torch.float64).train

    def z_scores(x):
        scores = []
        for value in range(1, 16):
            cell = truth == value / 16
            p, n = value / 16, cell.sum()
            scores.append(((x[cell].sum() - n * p) / (n * p * (1 - p)).sqrt()).item())
        return torch.tensor(scores)

    assert drawn.unique().tolist() == [0, 1]
    assert torch.equal(drawn[truth == 0], torch.zeros_like(drawn[truth == 0]))
    assert torch.equal(drawn[truth == 1], torch.ones_like(drawn[truth == 1]))
    limit = 5.0  # 15 comparisons: false alarm below 1e-5
    assert z_scores(drawn).abs().max() < limit
    wrong = (torch.rand(truth.shape, generator=rng(1), dtype=torch.float64) < truth * 16 / 17).to(
        truth
    )
    assert z_scores(wrong).abs().max() > limit


def test_sampling_is_fixed_by_the_generator_and_leaves_the_global_one_alone(rng):
    before = torch.get_rng_state()
    one, two, other = (data.digits(binarize="sample", generator=rng(s)).train for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_call_gives_tensors_of_its_own():
    first = data.digits()
    first.train.zero_()
    assert data.digits().train.sum() > 0
    table = data.movies()
    table.likes.zero_()
    assert data.movies().likes.sum() > 0


# ---------------------------------------------------------------- bars and stripes


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_bars_and_stripes_are_all_such_patterns_once(side):
    found = data.bars_and_stripes(side, dtype=torch.int64)
    expected = set()
    for lines in itertools.product([0, 1], repeat=side):
        expected.add(tuple(np.repeat(lines, side).tolist()))
        expected.add(tuple(np.tile(lines, side).tolist()))
    assert found.shape == (2 ** (side + 1) - 2, side**2)
    assert set(map(tuple, found.tolist())) == expected
    assert len(expected) == len(found)


def test_stripes_come_first_and_are_horizontal():
    images = data.bars_and_stripes(3).reshape(-1, 3, 3)
    assert (images[:8] == images[:8, :, :1]).all()
    assert (images[8:] == images[8:, :1, :]).all()
    assert not (images[8:] == images[8:, :, :1]).flatten(1).all(1).any()


def test_ten_thousand_patterns_need_no_loop():
    start = time.process_time()
    assert data.bars_and_stripes(12).shape == (8190, 144)
    assert time.process_time() - start < 5


# ---------------------------------------------------------------- films


def test_the_movie_table_has_two_tastes():
    titles, likes, new_user = data.movies()
    assert likes.shape == (6, 6)
    assert new_user.shape == (6,)
    fans = {title: likes[:, i].int().tolist() for i, title in enumerate(titles)}
    assert fans == {
        "Harry Potter": [1, 1, 1, 0, 0, 0],
        "Avatar": [1, 0, 1, 0, 0, 0],
        "Lord of the Rings 3": [1, 1, 1, 1, 1, 1],
        "Gladiator": [0, 0, 0, 1, 1, 1],
        "Titanic": [0, 0, 0, 1, 0, 1],
        "Glitter": [0, 0, 0, 0, 0, 0],
    }
    assert [title for title, liked in zip(titles, new_user, strict=True) if liked] == [
        "Gladiator",
        "Titanic",
    ]


# ---------------------------------------------------------------- dtype and device


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "load",
    [
        lambda **options: data.digits(**options)[:2],
        lambda **options: data.digits(binarize=None, **options)[:2],
        lambda **options: [data.bars_and_stripes(3, **options)],
        lambda **options: data.movies(**options)[1:],
    ],
    ids=["digits", "grey digits", "bars and stripes", "movies"],
)
def test_data_come_in_the_dtype_and_on_the_device_asked_for(load, dtype, device):
    with torch.device("meta"):  # not where the process's default happens to be
        tensors = load(dtype=dtype, device=device)
    assert {x.dtype for x in tensors} == {dtype}
    assert {x.device.type for x in tensors} == {device.type}
    assert all(torch.isfinite(x).all() and x.min() >= 0 and x.max() <= 1 for x in tensors)
    assert {x.dtype for x in load()} == {torch.get_default_dtype()}


def test_labels_go_to_the_device_with_the_images(device):
    assert {x.device.type for x in data.digits(device=device)} == {device.type}


# ---------------------------------------------------------------- MNIST, without the network


@pytest.fixture
def fake_mnist(monkeypatch, tmp_path):
    """OpenML's answer, with four images that are not blank, and the questions it was asked."""
    pixels = np.zeros((70_000, 784), np.uint8)
    pixels[[0, 59_999, 60_000, 69_999], :4] = [0, 127, 128, 255]
    labels = np.array(["3"] * 60_000 + ["7"] * 10_000, dtype=object)
    questions = []

    def fetch_openml(name, **options):
        questions.append((name, options))
        return types.SimpleNamespace(data=pixels, target=labels)

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch_openml)
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    return questions


def test_mnist_has_the_usual_split(fake_mnist, tmp_path):
    split = data.mnist(data_home=tmp_path / "here")
    assert [tuple(x.shape) for x in split] == [(60_000, 784), (10_000, 784), (60_000,), (10_000,)]
    for image in (split.train[0], split.train[-1], split.test[0], split.test[-1]):
        assert image[:5].tolist() == [0, 0, 1, 1, 0]
    assert split.train_labels.unique().tolist() == [3]
    assert split.test_labels.unique().tolist() == [7]
    ((name, options),) = fake_mnist
    assert (name, options["version"]) == ("mnist_784", 1)
    assert options["data_home"] == str(tmp_path / "here")


def test_mnist_can_be_grey_or_sampled(fake_mnist, rng):
    grey = data.mnist(binarize=None, dtype=torch.float64).test
    assert grey[0, :5].tolist() == [0, 127 / 255, 128 / 255, 1, 0]
    drawn = [data.mnist(binarize="sample", generator=rng(s)).train[0, :4] for s in range(3)]
    assert {(x[0].item(), x[3].item()) for x in drawn} == {(0.0, 1.0)}


def test_mnist_offline_says_what_to_do(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("sklearn.datasets._openml.urlopen", refuse)
    monkeypatch.setattr("sklearn.datasets._openml.time.sleep", lambda _: None)
    with (
        pytest.warns(UserWarning, match="network error"),  # scikit-learn's, one each attempt
        pytest.raises(ConnectionError, match=r"could not be downloaded .*while online") as caught,
    ):
        data.mnist(data_home=tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value.__cause__, urllib.error.URLError)


def test_a_damaged_mnist_is_refused(monkeypatch, tmp_path):
    answer = types.SimpleNamespace(data=np.zeros((5, 784)), target=np.zeros(5))
    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda *_, **__: answer)
    with pytest.raises(ValueError, match="expected 70000 images"):
        data.mnist(data_home=tmp_path)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("load", [data.digits, data.mnist])
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"binarize": "half"}, ValueError, "binarize must be 'threshold', 'sample' or None"),
        ({"binarize": True}, ValueError, "binarize must be"),
        ({"dtype": torch.int64}, TypeError, "dtype must be a floating dtype"),
        ({"generator": 0}, TypeError, r"generator must be a torch\.Generator"),
    ],
)
def test_bad_image_options_get_a_sentence(load, options, error, match):
    with pytest.raises(error, match=match):
        load(**options)


@pytest.mark.parametrize("fraction", [0, 1, -0.2, float("nan"), "a fifth", 0.001, 1 / 184])
def test_a_bad_test_fraction_gets_a_sentence(fraction):
    with pytest.raises((ValueError, TypeError), match="test_fraction must be"):
        data.digits(test_fraction=fraction)


@pytest.mark.parametrize("side", [0, -1, 2.0, True])
def test_a_bad_side_gets_a_sentence(side):
    with pytest.raises((ValueError, TypeError), match="side must be"):
        data.bars_and_stripes(side)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
def test_a_generator_on_another_device_is_refused(rng):
    with pytest.raises(ValueError, match="the generator is on cuda"):
        data.digits(binarize="sample", generator=rng(0, "cuda"))
