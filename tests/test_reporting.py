"""Numbers in prose: as many digits as the error supports, stored as the site shows them."""

import math
import random
from ast import literal_eval

import pytest
import torch
from IPython.core.formatters import format_display_data
from myst_nb.core.variables import format_plain_text

from companion import reporting
from companion.reporting import format_estimate, glue, round_to_error, typeset


@pytest.mark.parametrize(
    ("value", "std_error", "rounded", "estimate"),
    [
        (3.14159, 0.00123, "3.1416", "3.1416 ± 0.0012"),
        (3.14159, 0.0164, "3.142", "3.142 ± 0.016"),
        (9.996, 0.0996, "10.00", "10.00 ± 0.10"),  # rounding carries, in both
        (12345.6, 1234.5, "12300", "12300 ± 1200"),
        (-14159.0, 16.4, "-14159", "-14159 ± 16"),
        (0.0001, 0.5, "0.00", "0.00 ± 0.50"),
        (-0.0001, 0.5, "0.00", "0.00 ± 0.50"),  # no minus zero
        (0.0, 1e-20, "0.0e-20", "(0.0 ± 1.0)e-20"),
        (-2.5e-7, 1e-8, "-2.50e-07", "(-2.50 ± 0.10)e-07"),
        (6.02214e23, 1e19, "6.02214e+23", "(6.02214 ± 0.00010)e+23"),
        (0.5, 1e10, "0.0e+10", "(0.0 ± 1.0)e+10"),
        (999999.96, 0.5, "999999.96", "999999.96 ± 0.50"),
        (999999.996, 0.5, "1.00000000e+06", "(1.00000000 ± 0.00000050)e+06"),
        (0.00012, 0.000012, "0.000120", "0.000120 ± 0.000012"),
        (math.pi, 0.0, "3.141592654", "3.141592654"),  # exact
        (1797, 0, "1797", "1797"),
        (1e300, 1e-5, "1e+300", "1e+300"),  # an error below the last digit of a float64
        (torch.tensor(2.5), torch.tensor(0.25), "2.50", "2.50 ± 0.25"),
    ],
)
def test_digits_follow_the_standard_error(value, std_error, rounded, estimate):
    assert round_to_error(value, std_error) == rounded
    assert format_estimate(value, std_error) == estimate


def test_rounding_moves_no_value_by_more_than_a_twentieth_of_its_error():
    # The error is at least 10 units of the last place, and rounding moves half a unit.
    draw = random.Random(1)
    for _ in range(2000):
        error = 10.0 ** draw.uniform(-12, 12)
        value = draw.gauss(0, 1) * error * 10.0 ** draw.uniform(-2, 4)
        moved = abs(float(round_to_error(value, error)) - value) / error
        assert moved <= 0.0501
        shown = format_estimate(value, error).strip("(").replace(")", "").partition(" ± ")[2]
        mantissa, _, power = shown.partition("e")
        assert float(f"{mantissa}e{power or 0}") == pytest.approx(error, rel=0.051)


@pytest.mark.parametrize(
    ("value", "std_error", "message"),
    [
        (math.nan, 0.1, "value must be finite, got nan"),
        (math.inf, 0.1, "value must be finite, got inf"),
        (1.0, math.nan, "std_error must be finite, got nan"),
        (1.0, math.inf, "std_error must be finite, got inf.*median"),
        (1.0, -0.1, "std_error must not be negative, got -0.1"),
    ],
)
def test_what_has_no_digits_is_refused(value, std_error, message):
    for function in (round_to_error, format_estimate):
        with pytest.raises(ValueError, match=message):
            function(value, std_error)


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        ("-0.33", "−0.33"),
        ("1.2e-07", "1.2 × 10⁻⁷"),
        ("(-2.50 ± 0.10)e+12", "(−2.50 ± 0.10) × 10¹²"),
        ("size7e", "size7e"),
        ("take-2", "take-2"),
        ("apples", "apples"),
    ],
)
def test_typesetting(number, shown):
    assert typeset(number) == shown


# ---------------------------------------------------------------- glue


@pytest.fixture
def glued(monkeypatch):
    """What {glue:text} shows of each name, as myst-nb makes it of what is stored."""
    shown = {}

    def store(name, variable, display):
        assert display is False
        data, _ = format_display_data(variable)
        assert isinstance(literal_eval(data["text/plain"]), str)
        shown[name] = format_plain_text(data["text/plain"], "s")

    monkeypatch.setattr("myst_nb.glue", store)
    monkeypatch.setattr(reporting, "_glued", {})
    return shown


def test_an_estimate_is_glued_with_its_error(glued):
    glue("area", torch.tensor(0.79182), torch.tensor(0.0041))
    assert glued == {"area": "0.7918", "area-se": "0.0041"}


def test_trailing_zeros_and_signs_survive_the_way_to_the_page(glued):
    glue("half", 0.5, 0.1)
    glue("third", -1 / 3, digits=2)
    glue("tiny", 0.00000012, digits=2)
    glue("small", -1.2e-9, 3e-11)
    assert glued["half"] == "0.50"
    assert glued["half-se"] == "0.10"
    assert glued["third"] == "−0.33"
    assert glued["tiny"] == "1.2 × 10⁻⁷"
    assert glued["small"] == "−1.200 × 10⁻⁹"
    assert glued["small-se"] == "0.030 × 10⁻⁹"


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (math.pi, 5, "3.1416"),
        (0.0, 3, "0.00"),
        (9.996, 3, "10.0"),
        (123456.0, 3, "123000"),
        (-0.5, 10, "−0.5000000000"),
        (5, 2, "5.0"),
    ],
)
def test_a_deterministic_number_has_the_digits_asked_for(glued, value, digits, shown):
    glue("it", value, digits=digits)
    assert glued == {"it": shown}


@pytest.mark.parametrize(("value", "shown"), [(1797, "1,797"), (-12, "−12"), ("CD-1", "CD-1")])
def test_whole_numbers_and_texts_are_shown_as_they_are(glued, value, shown):
    glue("it", value)
    assert glued == {"it": shown}


def test_an_exact_value_has_no_error(glued):
    glue("log-z", 23.2782, 0.0)
    assert glued == {"log-z": "23.2782", "log-z-se": "0"}


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((0.5,), {}),
        ((torch.tensor(3),), {}),
        ((True,), {}),
        ((True, 0.1), {}),
        ((0.5, 0.1), {"digits": 3}),
        (("0.5", 0.1), {}),
        (("0.5",), {"digits": 2}),
    ],
)
def test_numbers_of_unknown_precision_are_refused(glued, arguments, options):
    with pytest.raises(TypeError, match="how many digits of 'it'"):
        glue("it", *arguments, **options)
    assert glued == {}


@pytest.mark.parametrize(
    ("value", "digits", "message"),
    [
        (0.5, 0, "digits must be at least 1"),
        (0.5, 11, "digits must be at most 10, got 11"),
        (math.nan, 3, "value must be finite"),
    ],
)
def test_digits_that_mean_nothing_are_refused(glued, value, digits, message):
    with pytest.raises(ValueError, match=message):
        glue("it", value, digits=digits)
    assert glued == {}


def test_a_name_keeps_its_text(glued):
    glue("it", 1)
    glue("it", 1)  # the cell was run again
    with pytest.raises(ValueError, match="'it' is glued already, as 1, and cannot also be 2"):
        glue("it", 2)
    with pytest.raises(ValueError, match="'it' is glued already"):
        glue("it", 0.5, 0.1)
    assert glued == {"it": "1"}
