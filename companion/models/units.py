"""Binary states: their check, which the models share."""

from __future__ import annotations

import torch
from torch import Tensor

from companion.inputs import check_finite

__all__ = ["check_units"]


def check_units(name: str, x: Tensor, num_units: int, like: Tensor) -> Tensor:
    """Return `x` in the dtype of `like`, or say why it is no batch of states of `num_units` units.

    Args:
        name: what the argument is called.
        x: zeros and ones, `(..., num_units)`; boolean and integer states are cast.
        num_units: D, the number of units.
        like: a parameter of the model, whose device and floating dtype states must have.

    Returns:
        `x` in the dtype of `like`.

    Raises:
        ValueError: another shape or device, no state at all, or entries other than 0 and 1.
        TypeError: no tensor, complex, or another floating dtype.

    >>> check_units("v", torch.tensor([[True, False]]), 2, torch.zeros(2))
    tensor([[1., 0.]])
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim == 0 or x.shape[-1] != num_units:
        raise ValueError(f"{name} must have shape (..., {num_units}), got {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{name} is an empty batch: its shape is {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device} but the machine is on {like.device}")
    if x.is_complex():
        raise TypeError(f"{name} must be real, got {x.dtype}")
    if x.is_floating_point() and x.dtype != like.dtype:
        raise TypeError(f"{name} is {x.dtype} but the machine is {like.dtype}; convert one of them")
    x = x.to(like.dtype)
    if torch.count_nonzero(x * (x - 1)):  # also counts NaN and infinity
        check_finite(name, x)
        first = tuple(torch.nonzero(x * (x - 1))[0].tolist())
        raise ValueError(
            f"{name} must hold zeros and ones only; at index {first} it holds {x[first]:.4g}. "
            "Binarise the data first."
        )
    return x
