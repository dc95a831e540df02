"""Figures in the book's style, and the few drawings that several chapters share.

    use_style()
    fig, ax = plt.subplots()
    line = error_band(ax, n, mean, std_error)
    label_line(ax, line, "running mean")

Call `use_style` once, before the first figure. The helpers draw on the axes that they are given and
return what they drew. Numbers may be tensors on any device, arrays or lists. Of the package only
the figures need matplotlib, so nothing else imports this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation
from torch import Tensor

from companion.inputs import check_count, check_real

__all__ = [
    "BACKGROUND",
    "COLORS",
    "error_band",
    "label_line",
    "show_images",
    "show_intervals",
    "slope_guide",
    "use_style",
]

Numbers: TypeAlias = Tensor | npt.ArrayLike

BACKGROUND = "#fcfcfa"
"""The ground of every figure, nearly white and opaque on light and dark pages alike."""

COLORS = {
    "blue": "#0a5fd2",
    "orange": "#b34700",
    "green": "#078353",
    "purple": "#701a75",
    "ink": "#1f1f1f",
    "grey": "#6b6b6b",
}
"""Colours by name. The first four are the cycle; ink is for exact values, grey for guides.

All have a contrast of at least 4.5:1 on the ground, so that a label may wear its line's colour. The
cycle and ink are told apart in every kind of colour blindness; grey is not, so let it be dashed.
"""


def use_style() -> None:
    """Draw all figures from now on in the book's style (the file `book.mplstyle`)."""
    plt.style.use(Path(__file__).with_name("book.mplstyle"))


def show_images(
    x: Numbers,
    *,
    shape: tuple[int, int],
    columns: int = 10,
    diverging: bool = False,
    ax: Axes | None = None,
) -> AxesImage:
    """Draw a mosaic of small images: digits, samples, the weights of hidden units.

    Args:
        x: images, one a row, `(n, height * width)` or `(n, height, width)`.
        shape: `(height, width)` of an image.
        columns: images a row of the mosaic.
        diverging: draw signed numbers in red (positive) and blue, white at zero; the scale is that
            of the largest absolute value. Otherwise numbers are from 0 (paper) to 1 (ink).
        ax: where to draw, by default a new figure as wide as the text.

    Returns:
        the image; `set_clim` gives several mosaics one scale, `figure.colorbar` takes it.

    Raises:
        ValueError: a wrong shape, nothing to draw, a number that is not finite, or (unless
            `diverging`) one outside [0, 1].

    >>> show_images(torch.eye(4), shape=(2, 2), columns=3).get_array().shape
    (5, 8)
    """
    height, width = (
        check_count(name, n) for name, n in zip(("height", "width"), shape, strict=True)
    )
    check_count("columns", columns)
    images = _numbers("x", x)
    if images.ndim < 2 or images.shape[1:] not in {(height * width,), (height, width)}:
        raise ValueError(
            f"x must be (n, {height * width}) or (n, {height}, {width}), got {images.shape}"
        )
    if not diverging and (images.min() < 0 or images.max() > 1):
        raise ValueError(
            f"x must lie in [0, 1], got {images.min():.3g} to {images.max():.3g}; draw signed "
            "numbers with diverging=True"
        )
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    # Every image with a free line below and to its right, the last of which are cut off.
    tiles = np.full((rows * columns, height + 1, width + 1), np.nan)
    tiles[: len(images), :-1, :-1] = images.reshape(-1, height, width)
    mosaic = tiles.reshape(rows, columns, height + 1, width + 1).swapaxes(1, 2)
    mosaic = mosaic.reshape(rows * (height + 1), columns * (width + 1))[:-1, :-1]

    if ax is None:
        across = plt.rcParams["figure.figsize"][0]
        down = across * mosaic.shape[0] / mosaic.shape[1]
        ax = plt.subplots(figsize=(across, down))[1]
    limit = float(np.abs(images).max()) or 1.0
    drawn = ax.imshow(
        np.ma.masked_invalid(mosaic),
        cmap="RdBu_r" if diverging else "gray_r",
        vmin=-limit if diverging else 0.0,
        vmax=limit if diverging else 1.0,
    )
    corners = [divmod(i, columns) for i in range(len(images))]
    frames = [
        Rectangle((j * (width + 1) - 0.5, i * (height + 1) - 0.5), width, height)
        for i, j in corners
    ]
    frame = PatchCollection(frames, facecolor="none", edgecolor=COLORS["grey"], linewidth=0.4)
    ax.add_collection(frame)
    ax.set(xlim=(-1, mosaic.shape[1]), ylim=(mosaic.shape[0], -1))  # room for the outer frames
    ax.set_axis_off()
    return drawn


def error_band(
    ax: Axes,
    x: Numbers,
    mean: Numbers,
    std_error: Numbers,
    *,
    num_std_errors: float = 2.0,
    **options: Any,
) -> Line2D:
    """Draw a line with a band of `num_std_errors` standard errors on either side.

    Args:
        ax: where to draw.
        x: abscissae, `(n,)`.
        mean: the line, `(n,)`.
        std_error: standard errors, `(n,)`, not negative; or standard deviations for a band that
            shows the spread. Say which in the caption.
        num_std_errors: half the width of the band.
        options: for `Axes.plot`: `color`, `label`, `linestyle` and so on.

    Returns:
        the line.

    Raises:
        ValueError: lengths differ, a number is not finite, or a standard error is negative.
    """
    x, mean, std_error = _equal_lengths(x=x, mean=mean, std_error=std_error)
    check_real("num_std_errors", num_std_errors, minimum=0.0)
    if std_error.min() < 0:
        raise ValueError(f"std_error must not be negative, got {std_error.min():.3g}")
    (line,) = ax.plot(x, mean, **options)
    half = num_std_errors * std_error
    ax.fill_between(x, mean - half, mean + half, color=line.get_color(), alpha=0.2, linewidth=0)
    return line


def label_line(
    ax: Axes, line: Line2D, text: str, *, at: int = -1, offset: tuple[float, float] = (5.0, 0.0)
) -> Annotation:
    """Write a label beside a line, in the line's colour, instead of a legend.

    Args:
        ax: the axes that hold the line.
        line: the line.
        text: the label.
        at: index of the point of the line beside which it goes, by default the last one.
        offset: points to the right and upwards from there; to the left if negative.

    Returns:
        the label; the layout leaves room for it outside the axes.

    Raises:
        ValueError: the line has no such point, or it is not finite.
    """
    points = np.asarray(line.get_xydata(), dtype=float)
    if not -len(points) <= at < len(points) or not np.isfinite(points[at]).all():
        raise ValueError(f"the line has {len(points)} points and none to label at index {at}")
    return ax.annotate(
        text,
        xy=(points[at, 0], points[at, 1]),
        xytext=offset,
        textcoords="offset points",
        color=line.get_color(),
        ha="left" if offset[0] > 0 else "right" if offset[0] < 0 else "center",
        va="center" if offset[1] == 0 else "bottom" if offset[1] > 0 else "top",
        annotation_clip=False,
    )


def slope_guide(
    ax: Axes, x: tuple[float, float], y: float, *, slope: float = -0.5, text: str | None = None
) -> Line2D:
    """Draw a dashed guide `y (x / x_0)^slope`, a straight line on two logarithmic axes.

    Args:
        ax: where to draw; both axes become logarithmic.
        x: where the guide begins (x_0) and ends, positive.
        y: its height at the beginning, positive.
        slope: the exponent, by default that of Monte Carlo errors.
        text: a label for its end, by default `slope -1/2` and the like.

    Returns:
        the line.

    Raises:
        ValueError: `x` or `y` is not positive, or the slope is not finite.

    >>> fig, ax = plt.subplots()
    >>> slope_guide(ax, (10, 1000), 2.0).get_ydata().round(3).tolist()
    [2.0, 0.2]
    """
    begin, end = (check_real("x", value, minimum=0.0) for value in x)
    check_real("y", y, minimum=0.0)
    check_real("slope", slope)
    ax.set_xscale("log")
    ax.set_yscale("log")
    heights = [y, y * (end / begin) ** slope]
    (line,) = ax.plot([begin, end], heights, "--", color=COLORS["grey"], linewidth=1.2)
    if text is None:
        number = "-1/2" if slope == -0.5 else f"{slope:g}"
        text = "slope " + number.replace("-", "\N{MINUS SIGN}")
    label_line(ax, line, text)
    return line


def show_intervals(ax: Axes, lower: Numbers, upper: Numbers, exact: float) -> LineCollection:
    """Draw confidence intervals below each other; those that miss the exact value stand out.

    Args:
        ax: where to draw.
        lower: lower ends, `(n,)`.
        upper: upper ends, `(n,)`.
        exact: the value that the intervals are meant to cover.

    Returns:
        the intervals, in the order given; a miss is orange and twice as wide as a hit.

    Raises:
        ValueError: lengths differ, a number is not finite, or an interval is upside down.
    """
    lower, upper = _equal_lengths(lower=lower, upper=upper)
    check_real("exact", exact)
    if (lower > upper).any():
        raise ValueError(f"interval {int((lower > upper).argmax())} has lower above upper")
    hit = (lower <= exact) & (exact <= upper)
    intervals = ax.hlines(
        np.arange(len(lower)),
        lower,
        upper,
        colors=np.where(hit, COLORS["blue"], COLORS["orange"]).tolist(),
        linewidths=np.where(hit, 1.2, 2.4).tolist(),
    )
    ax.axvline(exact, color=COLORS["ink"], linewidth=1.2)
    ax.invert_yaxis()
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.grid(visible=False)
    return intervals


def _numbers(name: str, values: Numbers) -> npt.NDArray[np.float64]:
    """`values` as a float64 array, finite and not empty."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError(f"{name} is empty: its shape is {array.shape}")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(f"{name} has {bad} NaN or infinite entries of {array.size}; remove them")
    return array


def _equal_lengths(**values: Numbers) -> list[npt.NDArray[np.float64]]:
    arrays = [_numbers(name, x) for name, x in values.items()]
    if len({array.shape for array in arrays}) > 1 or arrays[0].ndim != 1:
        shapes = ", ".join(f"{name} {a.shape}" for name, a in zip(values, arrays, strict=True))
        raise ValueError(f"expected vectors of one length, got {shapes}")
    return arrays
