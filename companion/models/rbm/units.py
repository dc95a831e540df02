"""What the machines share: small weights, checks of states, a draw of K."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from companion.inputs import check_finite, check_generator

__all__ = [
    "categorical",
    "check_binary",
    "check_states",
    "check_whole",
    "small_weights",
    "softplus",
]


def small_weights(
    *shape: int,
    generator: torch.Generator | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Parameter:
    """Independent normal draws of standard deviation 0.01 (Hinton 2010, section 8)."""
    dtype = dtype or torch.get_default_dtype()
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating dtype, got {dtype}")
    weights = torch.empty(shape, device=device, dtype=dtype)
    check_generator(generator, weights.device)
    return nn.Parameter(weights.normal_(0.0, 0.01, generator=generator))


def softplus(x: Tensor) -> Tensor:
    """`log(1 + exp(x))` to double precision: PyTorch's default drops 2e-9 where x is above 20."""
    return nn.functional.softplus(x, threshold=40.0)


def categorical(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One draw from each softmax, `(..., K) -> (...)`, int64: three times as fast as
    `torch.multinomial`, by one uniform number against the cumulated probabilities."""
    total = logits.softmax(-1).cumsum(-1)
    limits = total[..., :-1] / total[..., -1:]
    shape = (*limits.shape[:-1], 1)
    noise = torch.rand(shape, generator=generator, device=logits.device, dtype=logits.dtype)
    return (noise >= limits).sum(-1)


def check_states(name: str, x: Tensor, num_units: int, like: Tensor) -> Tensor:
    """Return `x` in the dtype of the parameter `like`, or say why it is no batch of states.

    The values are not looked at, so that a density can still be compiled and differentiated.
    """
    _check_shape(name, x, num_units, like)
    if x.is_floating_point() and x.dtype != like.dtype:
        raise TypeError(f"{name} is {x.dtype} but the machine is {like.dtype}; convert one of them")
    if x.is_complex():
        raise TypeError(f"{name} must be real, got {x.dtype}")
    return x.to(like.dtype)


def check_binary(name: str, x: Tensor, num_units: int, like: Tensor) -> Tensor:
    """Return `x` in the dtype of the parameter `like`, or raise if it is no batch of zeros and
    ones, `(..., num_units)`."""
    x = check_states(name, x, num_units, like)
    if torch.count_nonzero(x * (x - 1)):  # also counts NaN and infinity
        check_finite(name, x)
        first = tuple(torch.nonzero(x * (x - 1))[0].tolist())
        raise ValueError(
            f"{name} must hold zeros and ones only; at index {first} it holds {x[first]:.4g}. "
            "Binarise the data first."
        )
    return x


def check_whole(
    name: str, x: Tensor, *, minimum: int, maximum: int, device: torch.device
) -> Tensor:
    """Return `x` as int64, or raise if it is no tensor of whole numbers within the limits."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {x.dtype}; convert it with .long()")
    if x.numel() == 0:
        raise ValueError(f"{name} is an empty batch: its shape is {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} but the machine is on {device}")
    x = x.long()
    outside = (x < minimum) | (x > maximum)
    if outside.any():
        first = tuple(torch.nonzero(outside)[0].tolist())
        raise ValueError(
            f"{name} must lie from {minimum} to {maximum}; at index {first} it is {int(x[first])}"
        )
    return x


def _check_shape(name: str, x: Tensor, num_units: int, like: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim == 0 or x.shape[-1] != num_units:
        raise ValueError(f"{name} must have shape (..., {num_units}), got {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{name} is an empty batch: its shape is {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device} but the machine is on {like.device}")
