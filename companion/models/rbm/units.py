"""What the machines share: small weights, softplus, checks of states, a draw of K."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from companion.inputs import check_finite, check_generator

__all__ = [
    "categorical",
    "check_binary",
    "check_states",
    "check_whole",
    "of_units",
    "small_weights",
    "softplus",
    "softplus_change",
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


def softplus_change(
    inputs: Tensor,
    beta: Tensor | float,
    next_beta: Tensor | float,
    next_sigmoid: Tensor | None = None,
) -> Tensor:
    """`sum_j softplus(next_beta a_j) - softplus(beta a_j)` without cancellation, float64.

    With d = next_beta - beta >= 0 (otherwise the two change their roles, and the sign),

        softplus((beta + d) a) - softplus(beta a)
            = d max(a, 0) + log(1 + sigmoid(-beta |a|) (exp(-d |a|) - 1)).

    The second term lies between 0 and minus half of `d |a|`: the sum is as precise as the dtype is,
    however close the two betas are, and nothing overflows. Where `d |a|` is at most 1, as in all
    fine schedules,

        softplus((beta + d) a) - softplus(beta a) = -log(1 + sigmoid((beta + d) a) (exp(-d a) - 1))

    is as precise, also for d < 0, and half of the work if the sigmoid is known.

    Args:
        inputs: a, `(..., units)`.
        beta: at least 0, a number or a tensor that broadcasts over the leading dimensions.
        next_beta: likewise.
        next_sigmoid: `sigmoid(next_beta a)`, if it is at hand.

    >>> a, close = torch.tensor([3.0]), 0.5 + 1e-6        # sigmoid(1.5) 3 1e-6, in single precision
    >>> f"{softplus_change(a, 0.5, close):.4e}"
    '2.4527e-06'
    """
    low: Tensor | float
    distance: Tensor | float
    sign: Tensor | float
    if isinstance(beta, Tensor) or isinstance(next_beta, Tensor):
        start, end = (
            torch.as_tensor(x, dtype=torch.float64, device=inputs.device) for x in (beta, next_beta)
        )
        change = end - start
        low, distance, sign = torch.minimum(start, end), change.abs(), change.sign()
        inputs = inputs + 0.0 * of_units(change, inputs)  # of the common shape
    else:
        change_of_beta = next_beta - beta
        if next_sigmoid is not None:
            smallest, largest = inputs.aminmax()
            if abs(change_of_beta) * max(float(largest), -float(smallest)) <= 1.0:
                m = (inputs * -change_of_beta).expm1_().mul_(next_sigmoid)
                return -m.log1p_().sum(-1).double()
        low, distance = min(beta, next_beta), abs(change_of_beta)
        sign = math.copysign(1.0, change_of_beta)
    size = inputs.abs()
    m = (size * of_units(-low, size)).sigmoid_().mul_(size.mul_(of_units(-distance, size)).expm1_())
    positive = torch.clamp(inputs, min=0.0, out=size).sum(-1).double()
    return sign * (distance * positive + m.log1p_().sum(-1).double())


def of_units(beta: Tensor | float, like: Tensor) -> Tensor | float:
    """`beta`, which broadcasts over leading dimensions, made to broadcast over units as well."""
    return beta.to(like)[..., None] if isinstance(beta, Tensor) else beta


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
    if torch.addcmul(x, x, x, value=-1.0).abs_().sum().item():  # x - x^2; also NaN and infinity
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
