"""What objectives ask of data: rows, with leading dimensions where the model has some."""

from __future__ import annotations

import torch
from torch import Tensor

from companion.inputs import check_finite

__all__ = ["check_binary_rows", "check_rows"]


def check_rows(v: Tensor, *, floating: bool = False) -> Tensor:
    """Return `v`, or raise unless it is finite data `(..., n, D)`, floating where that is needed.

    >>> check_rows(torch.tensor([0.0, 1.0]))
    Traceback (most recent call last):
        ...
    ValueError: v must be a matrix (n, D), or (..., n, D), got (2,)
    """
    if not isinstance(v, Tensor) or v.ndim < 2:
        got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
        raise ValueError(f"v must be a matrix (n, D), or (..., n, D), got {got}")
    if floating and not v.is_floating_point():
        raise TypeError(f"v must be floating: the objective differentiates by it; got {v.dtype}")
    return check_finite("v", v)


def check_binary_rows(v: Tensor) -> Tensor:
    """Return `v`, or raise unless it is data `(..., n, D)` of zeros and ones.

    What flips units or sums over their states asks for this itself: a model may take other values.
    """
    check_rows(v)
    other = (v != 0) & (v != 1)
    if other.any():
        first = tuple(torch.nonzero(other)[0].tolist())
        raise ValueError(
            f"v must hold zeros and ones only, as the objective goes through the states of binary "
            f"units; at index {first} it holds {v[first]:.4g}"
        )
    return v
