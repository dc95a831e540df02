"""Small data sets: handwritten digits, bars and stripes, the six films, and MNIST if you want it.

A loader reads what ships inside scikit-learn, or makes its rows on the spot; only `mnist` needs the
network, once. Nothing is cached here. Images come as rows of pixels between 0 and 1, and where they
are binary the docstring says how they became so.
"""

from __future__ import annotations

import os
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from companion.inputs import check_count, check_generator, check_real

__all__ = ["Binarize", "Digits", "Movies", "bars_and_stripes", "digits", "mnist", "movies"]

Binarize = Literal["threshold", "sample"] | None
"""How grey pixels become binary: on from half the full scale up, by a coin for each, or not."""


class Digits(NamedTuple):
    """Images of handwritten digits, one a row, and the digits that they show (int64)."""

    train: Tensor
    test: Tensor
    train_labels: Tensor
    test_labels: Tensor


class Movies(NamedTuple):
    """Who likes which film: `likes` is (users, films), `new_user` is (films)."""

    titles: tuple[str, ...]
    likes: Tensor
    new_user: Tensor


def digits(
    *,
    binarize: Binarize = "threshold",
    test_fraction: float = 0.2,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Digits:
    """The 1,797 handwritten digits of 8 x 8 pixels that ship with scikit-learn.

    Pixels are whole numbers from 0 to 16. `binarize="threshold"` turns on those of 8 and above (a
    third of them), `"sample"` turns on a pixel of value p with probability p / 16, and None gives
    p / 16.

    The split is fixed and random-free: of the images of each digit, in the order of the data set,
    every fifth is a test image (with `test_fraction=0.2`). So all digits and all writers, whose
    images stand together, are in both parts; the test images are new drawings, not new hands. After
    thresholding 13 of the 355 test images equal a training image in every pixel.

    Args:
        binarize: how grey pixels become binary.
        test_fraction: share of the images kept for testing, between 0 and 1.
        generator: source of randomness for `binarize="sample"`, on the CPU.
        dtype: floating type of the images, by default PyTorch's default.
        device: where the tensors go, by default PyTorch's default device.

    Returns:
        `Digits`: `train` (1442, 64), `test` (355, 64), and their labels, 0 to 9.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type.

    Reference: E. Alpaydin and C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI
    Machine Learning Repository; scikit-learn holds its test set.

    >>> train, test, train_labels, _ = digits()
    >>> train.shape, test.shape, train.unique().tolist(), train_labels[:5].tolist()
    (torch.Size([1442, 64]), torch.Size([355, 64]), [0.0, 1.0], [0, 1, 2, 3, 4])
    """
    from sklearn.datasets import load_digits

    check_real("test_fraction", test_fraction, minimum=0.0, maximum=1.0)
    _check_images(binarize, generator, dtype)
    pixels, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
    # The k-th image of its digit, k = 1, 2, ...; it is for testing where k * fraction passes a
    # whole number.
    same = torch.nn.functional.one_hot(labels)
    k = same.cumsum(0)[torch.arange(len(labels), device="cpu"), labels].double()
    is_test = (k * test_fraction).floor() > ((k - 1) * test_fraction).floor()
    if not is_test.any():
        raise ValueError(
            f"test_fraction must be at least 1/{int(k.max())}, for a digit has no more images; at "
            f"{test_fraction:g} none is left for testing"
        )
    images = _scaled(pixels, 16, binarize, generator, dtype)
    return _moved(
        Digits(images[~is_test], images[is_test], labels[~is_test], labels[is_test]), device
    )


def mnist(
    *,
    binarize: Binarize = "threshold",
    generator: torch.Generator | None = None,
    data_home: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Digits:
    """MNIST: 70,000 handwritten digits of 28 x 28 pixels, from OpenML by way of scikit-learn.

    Nothing in the book needs it. The first call downloads it and scikit-learn keeps the file in
    `data_home`, so later calls work offline (but parse a long text file: keep what you get).

    Pixels are whole numbers from 0 to 255: `binarize="threshold"` turns on those of 128 and above,
    `"sample"` turns on a pixel of value p with probability p / 255, and None gives p / 255.

    Args:
        binarize: how grey pixels become binary.
        generator: source of randomness for `binarize="sample"`, on the CPU.
        data_home: folder for the download, by default scikit-learn's.
        dtype: floating type of the images, by default PyTorch's default.
        device: where the tensors go, by default PyTorch's default device.

    Returns:
        `Digits`: `train` (60000, 784), `test` (10000, 784), the usual split, and their labels.

    Raises:
        ConnectionError: MNIST is not on this computer and could not be downloaded.
        ValueError, TypeError: an argument out of range or of the wrong type, or a damaged download.

    Reference: Y. LeCun, L. Bottou, Y. Bengio and P. Haffner (1998), Gradient-based learning applied
    to document recognition.
    """
    from sklearn.datasets import fetch_openml, get_data_home

    _check_images(binarize, generator, dtype)
    folder = get_data_home(data_home)
    try:
        found = fetch_openml(
            "mnist_784",
            version=1,
            data_home=folder,
            as_frame=False,
            parser="liac-arff",  # the other parser needs pandas
        )
    except OSError as error:  # urllib's URLError and HTTPError, time-outs, refused connections
        raise ConnectionError(
            f"MNIST is not in {folder} and could not be downloaded from openml.org ({error}). Call "
            "mnist() once while online, or give data_home, a folder that holds it; digits() needs "
            "no network"
        ) from error
    if found.data.shape != (70_000, 784) or len(found.target) != 70_000:
        raise ValueError(
            f"expected 70000 images of 784 pixels, got {found.data.shape} and "
            f"{len(found.target)} labels; delete {folder}/openml and download again"
        )
    # Bytes first: as 64-bit numbers the images take 440 MB.
    pixels = torch.from_numpy(found.data.astype("uint8"))
    labels = torch.from_numpy(found.target.astype("int64"))
    images = _scaled(pixels, 255, binarize, generator, dtype)
    split = Digits(images[:60_000], images[60_000:], labels[:60_000], labels[60_000:])
    return _moved(split, device)


def bars_and_stripes(
    side: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Every pattern of horizontal stripes, and every pattern of vertical bars, on a square.

    A stripe pattern has each row wholly on or wholly off, a bar pattern each column. There are
    2^side of either; all off and all on belong to both, and are listed once: 2^(side + 1) - 2 rows.
    (Whoever *draws* them, first the orientation and then a coin for each line, meets these two
    twice as often as any other.)

    Args:
        side: rows, and columns, of the square.
        dtype: floating type, by default PyTorch's default.
        device: by default PyTorch's default device.

    Returns:
        `(2^(side + 1) - 2, side^2)`, zeros and ones, each pattern once; stripes first.

    Raises:
        ValueError, TypeError: `side` is not a positive integer.

    Reference: D. J. C. MacKay (2003), Information Theory, Inference, and Learning Algorithms,
    chapter 43.

    >>> bars_and_stripes(2, dtype=torch.int64).tolist()
    [[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 1, 0]]
    """
    check_count("side", side)
    dtype = dtype or torch.get_default_dtype()
    bit = torch.arange(side - 1, -1, -1, device=device)
    lines = (torch.arange(2**side, device=device)[:, None] >> bit) % 2  # all states of the lines
    stripes = lines.repeat_interleave(side, dim=1)
    bars = lines[1:-1].repeat(1, side)
    return torch.cat([stripes, bars]).to(dtype)


def movies(*, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Movies:
    """The six users and six films of a well-known tutorial on restricted Boltzmann machines.

    Args:
        dtype: floating type, by default PyTorch's default.
        device: by default PyTorch's default device.

    Returns:
        `Movies`: six titles, `likes` (6, 6), 1 where the user of the row likes the film of the
        column, and `new_user` (6,), whom the tutorial meets after training.

    Reference: E. Chen (2011), Introduction to Restricted Boltzmann Machines (a post on his blog).

    >>> titles, likes, new_user = movies()
    >>> [title for title, liked in zip(titles, new_user) if liked]
    ['Gladiator', 'Titanic']
    """
    titles = ("Harry Potter", "Avatar", "Lord of the Rings 3", "Gladiator", "Titanic", "Glitter")
    rows = ["111000", "101000", "111000", "001110", "001100", "001110", "000110"]
    table = torch.tensor(
        [[int(like) for like in row] for row in rows],
        dtype=dtype or torch.get_default_dtype(),
        device=device,
    )
    return Movies(titles, table[:-1], table[-1])


def _check_images(
    binarize: Any, generator: torch.Generator | None, dtype: torch.dtype | None
) -> None:
    if binarize not in ("threshold", "sample", None):
        raise ValueError(f"binarize must be 'threshold', 'sample' or None, got {binarize!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating dtype, got {dtype}")
    check_generator(generator, torch.device("cpu"))  # one seed, the same pixels on every device


def _scaled(
    pixels: Tensor,
    full: int,
    binarize: Binarize,
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """Whole numbers from 0 to `full` as numbers from 0 to 1."""
    dtype = dtype or torch.get_default_dtype()
    if binarize == "threshold":
        return (pixels >= (full + 1) // 2).to(dtype)
    if binarize == "sample":
        # A whole number below `full`, drawn evenly, is below p with probability p / full.
        shape, byte = pixels.shape, torch.uint8
        coins = torch.randint(full, shape, generator=generator, dtype=byte, device="cpu")
        return (coins < pixels).to(dtype)
    return pixels.to(dtype) / full


def _moved(split: Digits, device: torch.device | str | None) -> Digits:
    return Digits(*(x.to(device or torch.get_default_device()) for x in split))
