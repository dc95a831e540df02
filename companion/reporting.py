"""How numbers reach the prose: rounded to what their standard error supports.

A digit that the standard error does not support says nothing, and changes with the seed. So the
standard error is shown with two significant digits, and the value to the same decimal place.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from numbers import Integral
from typing import SupportsFloat

from companion.inputs import check_count

__all__ = ["format_estimate", "glue", "round_to_error", "typeset"]

_MAX_DIGITS = 10  # the digits of a float64 result that every processor agrees on
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_glued: dict[str, str] = {}


def round_to_error(value: SupportsFloat, std_error: SupportsFloat) -> str:
    """The value, rounded to the decimal place of the second significant digit of its error.

    Args:
        value: the estimate, a number or a tensor with one entry.
        std_error: its standard error; 0 marks an exact value, which is given ten significant
            digits.

    Returns:
        the text, in plain form or, below 1e-4 and from 1e6 on, in scientific form.

    Raises:
        ValueError: a value or standard error that is not finite, or a negative standard error.

    >>> round_to_error(3.14159, 0.0164)
    '3.142'
    >>> round_to_error(-14159.0, 1640.0)
    '-14200'
    >>> round_to_error(6.02214e23, 1e19)
    '6.02214e+23'
    """
    text, _, power = _rounded(value, std_error)
    return text + power


def format_estimate(value: SupportsFloat, std_error: SupportsFloat) -> str:
    """The value and its standard error, both rounded as `round_to_error` does.

    Args:
        value: the estimate, a number or a tensor with one entry.
        std_error: its standard error; an exact value (0) is given alone.

    Returns:
        the text `value ± std_error`.

    Raises:
        ValueError: a value or standard error that is not finite, or a negative standard error.

    >>> format_estimate(3.14159, 0.00123)
    '3.1416 ± 0.0012'
    >>> format_estimate(2.5e-7, 1e-8)
    '(2.50 ± 0.10)e-07'
    """
    text, error, power = _rounded(value, std_error)
    if error is None:
        return text + power
    return f"({text} ± {error}){power}" if power else f"{text} ± {error}"


def typeset(number: str) -> str:
    """The number as prose shows it: a minus for the hyphen, a power of ten for the e.

    Args:
        number: what `round_to_error` or `format_estimate` gives; other text is left alone.

    Returns:
        the text.

    >>> typeset("(-2.50 ± 0.10)e-07")
    '(−2.50 ± 0.10) × 10⁻⁷'
    """
    number = re.sub(
        r"(?<=[\d)])e\+?(-?)0*(\d+)$",
        lambda found: " × 10" + (found[1] + found[2]).translate(_SUPERSCRIPT),
        number,
    )
    return re.sub(r"(?<![^\s(])-(?=\d)", "−", number)


def glue(
    name: str,
    value: SupportsFloat | str,
    std_error: SupportsFloat | None = None,
    *,
    digits: int | None = None,
) -> None:
    """Store a number in the notebook for the prose, which shows it by {glue:text}`name`.

    Args:
        name: how the prose refers to it; a name is used once in a notebook.
        value: an estimate (give `std_error`), a deterministic number (give `digits`), or a whole
            number or a text, which are shown as they are.
        std_error: standard error of the estimate. It rounds the value, and is itself stored as
            `name-se`.
        digits: significant digits of a deterministic float64 number, 1 to 10.

    Raises:
        TypeError: a number of unknown precision: it has neither `std_error` nor `digits`, or both.
        ValueError: a value that is not finite, or a name that holds another text already.

    >>> glue("pi-estimate", 3.14159, 0.0164)      # 3.142, and 0.016 as pi-estimate-se
    >>> glue("pi", math.pi, digits=5)             # 3.1416
    >>> glue("digit-images", 1797)                # 1,797
    """
    alone = std_error is None and digits is None
    if isinstance(value, str) and alone:
        texts = {name: value}
    elif isinstance(value, Integral) and not isinstance(value, bool) and alone:
        texts = {name: f"{int(value):,}"}
    elif isinstance(value, (str, bool)) or alone or (std_error is not None and digits is not None):
        raise TypeError(
            f"cannot tell how many digits of {name!r} to show: give a float its std_error or, if "
            "it is deterministic, its digits; give an integer or a text alone. Got a "
            f"{type(value).__name__}, std_error={std_error!r}, digits={digits!r}"
        )
    elif digits is not None:
        texts = {name: _significant(value, digits)}
    else:
        assert std_error is not None
        text, error, power = _rounded(value, std_error)
        texts = {name: text + power, f"{name}-se": "0" if error is None else error + power}
    for key, text in texts.items():
        _store(key, text)


def _significant(value: SupportsFloat, digits: int) -> str:
    """The value with so many significant digits."""
    if check_count("digits", digits) > _MAX_DIGITS:
        raise ValueError(f"digits must be at most {_MAX_DIGITS}, got {digits}")
    number = _finite("value", value)
    text, _, power = _layout(number, 0.0, _exponent(number, digits) - digits + 1)
    return text + power


def _rounded(value: SupportsFloat, std_error: SupportsFloat) -> tuple[str, str | None, str]:
    """Value, error (None if exact) and power of ten (often none), as texts."""
    number, error = _finite("value", value), _finite("std_error", std_error)
    if error < 0:
        raise ValueError(f"std_error must not be negative, got {error}")
    if error <= 1e-15 * abs(number):  # none, or below the digits of a float64
        return f"{number:.{_MAX_DIGITS}g}", None, ""
    return _layout(number, error, _exponent(error) - 1)


def _finite(name: str, value: SupportsFloat) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(
            f"{name} must be finite, got {number}: no digit of it means anything. Where a variance "
            "does not exist, report a median and quantiles instead"
        )
    return number


def _exponent(value: float, digits: int = 2) -> int:
    """The power of ten of the leading digit, once rounded: 0.0996 is 1.0e-1."""
    return int(f"{value:.{digits - 1}e}".split("e")[1])


def _layout(value: float, error: float, place: int) -> tuple[str, str, str]:
    """Value and error rounded at 10**place, over a common power of ten where that reads better."""
    unit = Decimal(1).scaleb(place)
    rounded = [Decimal(repr(number)).quantize(unit) for number in (value, error)]
    largest = max(abs(number) for number in rounded)
    power = largest.adjusted() if largest else 0
    if -4 <= power < 6:
        power = 0
    shown = (number.scaleb(-power) for number in rounded)
    text, error_text = (f"{n if n else abs(n):f}" for n in shown)  # no minus before a zero
    return text, error_text, f"e{power:+03d}" if power else ""


def _store(name: str, text: str) -> None:
    from myst_nb import glue as myst_glue

    text = typeset(text)
    if _glued.setdefault(name, text) != text:
        raise ValueError(
            f"{name!r} is glued already, as {_glued[name]}, and cannot also be {text}: choose "
            "another name, or restart the kernel"
        )
    # The text stays a string: its quotes are what keeps {glue:text} from reading 0.50 as 0.5.
    myst_glue(name, text, display=False)
