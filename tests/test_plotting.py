"""The book's figures: colours that can be read and told apart, and drawings that draw the numbers.

The colour sums follow WCAG 2.1 (contrast), CIE 1976 (differences) and Machado, Oliveira and
Fernandes 2009 (simulated colour blindness, at full severity).
"""

import io
import itertools
import subprocess
import sys

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from companion.plotting import (
    BACKGROUND,
    COLORS,
    error_band,
    label_line,
    show_images,
    show_intervals,
    slope_guide,
    use_style,
)


@pytest.fixture(autouse=True)
def style():
    with mpl.rc_context():
        use_style()
        yield
        plt.close("all")


@pytest.fixture
def ax():
    return plt.subplots()[1]


# ---------------------------------------------------------------- colours

BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def linear(color):
    c = np.array(mpl.colors.to_rgb(color))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(one, two):
    light, dark = sorted((float(TO_XYZ[1] @ linear(c)) for c in (one, two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def difference(one, two, seen_through):
    """Distance in CIELAB, under D65."""

    def lab(color):
        rgb = np.clip(np.array(seen_through) @ linear(color), 0, 1)
        x, y, z = TO_XYZ @ rgb / [0.95047, 1.0, 1.08883]
        x, y, z = (
            np.cbrt(t) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29 for t in (x, y, z)
        )
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    return float(np.linalg.norm(lab(one) - lab(two)))


def closest_pair(colors, seen_through):
    return min(difference(a, b, seen_through) for a, b in itertools.combinations(colors, 2))


def test_the_colour_sums_give_known_values():
    assert contrast("white", "black") == pytest.approx(21)
    assert contrast("#767676", "white") == pytest.approx(4.54, abs=0.01)  # the limit case of WCAG
    assert difference("white", "black", np.eye(3)) == pytest.approx(100, abs=0.01)
    assert difference("#ff0000", "#00ff00", np.eye(3)) == pytest.approx(170.6, abs=0.1)


@pytest.mark.parametrize("name", COLORS)
def test_every_colour_can_be_read_on_the_ground_even_as_text(name):
    assert contrast(COLORS[name], BACKGROUND) >= 4.5


def test_the_usual_bright_palette_would_fail():
    okabe_ito = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
    assert sum(contrast(color, BACKGROUND) < 3 for color in okabe_ito) == 4


@pytest.mark.parametrize("kind", BLINDNESS)
def test_the_cycle_and_ink_are_told_apart_in_every_colour_blindness(kind):
    cycle = [COLORS[name] for name in ("blue", "orange", "green", "purple", "ink")]
    assert closest_pair(cycle, BLINDNESS[kind]) >= 19  # 2 is just noticeable
    if kind in ("protanopia", "deuteranopia"):  # the control: matplotlib's own red and green
        assert closest_pair(["#2ca02c", "#d62728", "#8c564b"], BLINDNESS[kind]) < 19


# ---------------------------------------------------------------- the style


def test_the_style_wears_the_colours_of_the_module():
    cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    assert [mpl.colors.to_hex(c) for c in cycle] == list(COLORS.values())[:4]
    for key in ("figure.facecolor", "axes.facecolor"):
        assert mpl.colors.to_hex(plt.rcParams[key]) == BACKGROUND
    for key in ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"):
        assert mpl.colors.to_hex(plt.rcParams[key]) == COLORS["ink"]


def test_letters_are_nine_pixels_tall_on_a_phone():
    scale = 340 / (plt.rcParams["figure.figsize"][0] * 72)  # CSS pixels a point
    for key in (
        "font.size",
        "axes.titlesize",
        "axes.labelsize",
        "xtick.labelsize",
        "legend.fontsize",
    ):
        assert plt.rcParams[key] * scale >= 9, key


def picture(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def sample_figure():
    fig, ax = plt.subplots()
    n = np.array([10, 100, 1000])
    line = error_band(ax, n, 1 / n, 0.1 / n)
    label_line(ax, line, "error")
    slope_guide(ax, (10, 1000), 0.2)
    return fig


def test_figures_are_opaque_and_the_same_every_time():
    one, two = picture(sample_figure()), picture(sample_figure())
    assert one == two
    pixels = plt.imread(io.BytesIO(one))
    assert pixels.shape[1] == int(5.4 * 144)
    assert (pixels[..., 3] == 1).all()
    assert pixels[0, 0, :3] == pytest.approx(mpl.colors.to_rgb(BACKGROUND), abs=0.003)


def test_use_style_changes_nothing_but_the_style():
    backend = mpl.get_backend()
    use_style()
    assert mpl.get_backend() == backend


def test_only_plotting_imports_matplotlib():
    code = (
        "import pkgutil, sys, importlib, companion\n"
        "for m in pkgutil.walk_packages(companion.__path__, 'companion.'):\n"
        "    if m.name != 'companion.plotting':\n"
        "        importlib.import_module(m.name)\n"
        "assert 'matplotlib' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- drawings


@pytest.mark.parametrize("flat", [True, False])
def test_a_mosaic_holds_every_image_in_its_place(flat, ax):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(5, 2, 3, generator=g)
    drawn = show_images(x.flatten(1) if flat else x, shape=(2, 3), columns=2, ax=ax)
    mosaic = drawn.get_array()
    assert drawn.axes is ax
    assert mosaic.shape == (3 * 3 - 1, 2 * 4 - 1)
    for i in range(5):
        row, column = divmod(i, 2)
        tile = mosaic[3 * row : 3 * row + 2, 4 * column : 4 * column + 3]
        assert np.array_equal(tile, x[i].double().numpy())
    assert mosaic.mask.sum() == mosaic.size - 5 * 6  # the lines between, and the empty place
    (frames,) = ax.collections
    boxes = [path.get_extents().bounds for path in frames.get_paths()]
    assert boxes[3] == (3.5, 2.5, 3, 2)  # the fourth image: second row, second column


def test_grey_is_from_paper_to_ink_and_signed_numbers_are_centred_on_zero(ax):
    assert show_images(torch.full((1, 4), 0.5), shape=(2, 2), ax=ax).get_clim() == (0, 1)
    drawn = show_images(torch.tensor([[-3.0, 0, 1, 2]]), shape=(2, 2), diverging=True, ax=ax)
    assert drawn.get_clim() == (-3, 3)
    red, green, blue, _ = drawn.cmap(drawn.norm(np.array([0.0])))[0]
    assert min(red, green, blue) > 0.95
    red, _, blue, _ = drawn.cmap(drawn.norm(np.array([3.0])))[0]
    assert red > blue
    assert show_images(torch.zeros(1, 4), shape=(2, 2), diverging=True, ax=ax).get_clim() == (-1, 1)


def test_a_mosaic_makes_a_figure_of_its_own_shape():
    drawn = show_images(torch.zeros(20, 64), shape=(8, 8))
    width, height = drawn.axes.figure.get_size_inches()
    assert width == plt.rcParams["figure.figsize"][0]
    assert height / width == pytest.approx(17 / 89)


def test_a_band_reaches_so_many_standard_errors(ax):
    mean, error = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.25, 0.0])
    line = error_band(ax, [1, 2, 3], mean, error, num_std_errors=3, label="x", linestyle=":")
    assert line.get_ydata().tolist() == [1, 2, 4]
    assert (line.get_label(), line.get_linestyle()) == ("x", ":")
    (band,) = ax.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert corners == {(1, -0.5), (1, 2.5), (2, 1.25), (2, 2.75), (3, 4)}
    assert mpl.colors.to_hex(band.get_facecolor()[0]) == mpl.colors.to_hex(line.get_color())


def test_numbers_may_be_tensors_that_need_gradients_or_live_elsewhere(ax, device):
    x = torch.arange(3.0, device=device).requires_grad_()
    assert error_band(ax, x, x**2, x).get_ydata().tolist() == [0, 1, 4]


def test_a_label_stands_beside_its_line_inside_the_figure(ax):
    (line,) = ax.plot([0, 1, 2], [0, 1, 4])
    label = label_line(ax, line, "a label of some length")
    ax.figure.draw_without_rendering()
    box = label.get_window_extent()
    x, y = ax.transData.transform((2, 4))
    assert label.get_color() == line.get_color()
    assert box.x0 > x
    assert box.y0 < y < box.y1
    assert box.x1 <= ax.figure.bbox.x1  # the layout made room
    left = label_line(ax, line, "left", at=1, offset=(-5, 0)).get_window_extent()
    assert left.x1 < ax.transData.transform((1, 1))[0]
    above = label_line(ax, line, "above", at=1, offset=(0, 5)).get_window_extent()
    assert above.y0 > ax.transData.transform((1, 1))[1]


def test_a_slope_guide_is_straight_with_that_slope_on_logarithmic_axes(ax):
    line = slope_guide(ax, (10, 1e5), 3.0, slope=-2 / 3, text="n to the -2/3")
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    x, y = np.log(line.get_xdata()), np.log(line.get_ydata())
    assert np.diff(y) / np.diff(x) == pytest.approx(-2 / 3)
    assert y[0] == pytest.approx(np.log(3))
    assert [text.get_text() for text in ax.texts] == ["n to the -2/3"]
    slope_guide(ax, (1, 10), 1.0)
    for slope, label in ((-0.5, "-1/2"), (-0.55, "-0.55"), (-2.0, "-2"), (0.5, "0.5")):
        slope_guide(ax, (1, 10), 1.0, slope=slope)
        assert ax.texts[-1].get_text() == "slope " + label.replace("-", "\N{MINUS SIGN}")


def test_intervals_that_miss_stand_out_in_colour_and_in_width(ax):
    drawn = show_intervals(ax, [0.0, 1.5, -2.0, 1.0], [2.0, 3.0, 0.5, 1.0], exact=1.0)
    colors = [mpl.colors.to_hex(color) for color in drawn.get_colors()]
    blue, orange = COLORS["blue"], COLORS["orange"]
    assert colors == [blue, orange, orange, blue]  # an end that touches covers
    assert list(drawn.get_linewidths()) == [1.2, 2.4, 2.4, 1.2]
    ends = [path.vertices[:, 0].tolist() for path in drawn.get_paths()]
    assert ends == [[0, 2], [1.5, 3], [-2, 0.5], [1, 1]]
    assert ax.lines[0].get_xdata() == [1, 1]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("x", "options", "match"),
    [
        (torch.zeros(2, 5), {}, r"x must be \(n, 4\) or \(n, 2, 2\), got \(2, 5\)"),
        (torch.zeros(4), {}, "x must be"),
        (torch.zeros(0, 4), {}, "x is empty"),
        (torch.full((1, 4), float("nan")), {}, "x has 4 NaN"),
        (torch.full((1, 4), -0.1), {}, "diverging=True"),
        (torch.full((1, 4), 1.1), {}, r"must lie in \[0, 1\], got 1.1 to 1.1"),
        (torch.zeros(1, 4), {"columns": 0}, "columns must be at least 1"),
        (torch.zeros(1, 4), {"shape": (0, 4)}, "height must be at least 1"),
    ],
)
def test_images_that_cannot_be_drawn_get_a_sentence(x, options, match, ax):
    with pytest.raises(ValueError, match=match):
        show_images(x, **{"shape": (2, 2), "ax": ax} | options)
    assert not ax.images


def test_bad_numbers_get_a_sentence(ax):
    with pytest.raises(ValueError, match=r"vectors of one length, got x \(2,\), mean \(3,\)"):
        error_band(ax, [1, 2], [1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="std_error must not be negative, got -1"):
        error_band(ax, [1, 2], [1, 2], [1, -1])
    with pytest.raises(ValueError, match="mean has 1 NaN"):
        error_band(ax, [1, 2], [1, float("inf")], [1, 1])
    with pytest.raises(ValueError, match="num_std_errors must be"):
        error_band(ax, [1, 2], [1, 1], [1, 1], num_std_errors=-1)
    with pytest.raises(ValueError, match="interval 1 has lower above upper"):
        show_intervals(ax, [0, 2], [1, 1], exact=0)
    with pytest.raises(ValueError, match="exact must be a finite number"):
        show_intervals(ax, [0], [1], exact=float("nan"))
    with pytest.raises(ValueError, match="x must be a finite number above 0"):
        slope_guide(ax, (0, 10), 1)
    with pytest.raises(ValueError, match="y must be"):
        slope_guide(ax, (1, 10), -1)
    (line,) = ax.plot([0, 1], [0, float("nan")])
    for at in (1, 2, -3):
        with pytest.raises(ValueError, match="has 2 points and none to label"):
            label_line(ax, line, "x", at=at)
