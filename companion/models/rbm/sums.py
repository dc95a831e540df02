"""Exact sums over all states of a layer of binary units, in blocks whose memory is bounded."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from companion.testing import binary_states

__all__ = ["MAX_ENUMERATED", "log_sum_states"]

MAX_ENUMERATED = 25
"""Largest layer whose 2^n states are summed over."""

_MAX_DIFFERENTIATED = 16  # the graph keeps all 2^n states
_BLOCK_BITS = 12  # at most 2^12 states in a block
_BLOCK_NUMBERS = 19  # and at most 2^19 numbers: 4 MiB of the other layer's inputs fit a cache


def log_sum_states(
    weights: Tensor, own: Tensor, other: Tensor, sum_out: Callable[[Tensor], Tensor]
) -> Tensor:
    """The log of a sum over all states of one layer, the other layer summed out in closed form.

        log sum_{h in {0,1}^n} exp(own.h + f(other + h.weights))

    The inputs of a block of states are those of a table of all patterns of the first few units plus
    one row for the other units, so no product is computed twice and, without gradients, memory
    stays bounded.

    Args:
        weights: `(*machines, n, m)`, from the layer that is summed over to the other one.
        own: biases of the units that are summed over, `(*machines, n)`.
        other: biases of the other layer, `(*machines, m)`.
        sum_out: f, the log of the sum (or integral) over the other layer given its inputs, float64,
            `(*machines, states, m) -> (*machines, states, *batch)`.

    Returns:
        `(*machines, *batch)`, float64.

    Raises:
        ValueError: n is above 25, or above 16 where the sum is differentiated.

    >>> def two_binary_units(inputs):
    ...     return torch.nn.functional.softplus(inputs).sum(-1)
    >>> total = log_sum_states(torch.zeros(3, 2), torch.zeros(3), torch.zeros(2), two_binary_units)
    >>> f"{total.exp().item():.4f}"                        # all 2^3 * 2^2 states weigh 1
    '32.0000'
    """
    weights, own, other = weights.double(), own.double(), other.double()
    (*machines, num_units, num_other), axis = weights.shape, own.ndim - 1
    if num_units > MAX_ENUMERATED:
        raise ValueError(
            f"log_z sums over all 2^n states of the smaller layer of binary units and stops at n = "
            f"{MAX_ENUMERATED}; this machine has {num_units} there. Estimate log Z by annealed "
            "importance sampling (AIS) instead."
        )
    if num_units > _MAX_DIFFERENTIATED and torch.is_grad_enabled() and weights.requires_grad:
        raise ValueError(
            "log_normalizer differentiates a sum over all 2^n states of the smaller layer of "
            f"binary units and stops at n = {_MAX_DIFFERENTIATED}; this machine has {num_units} "
            "there. Take log_z, which needs no gradient, or learn by PersistentChains."
        )
    affordable = _BLOCK_NUMBERS - (num_other * math.prod(machines) - 1).bit_length()
    num_low = min(num_units, _BLOCK_BITS, max(affordable, 1))
    low = binary_states(num_low, device=own.device, dtype=own.dtype)
    high = low[:1, :0]  # one row of no units
    if num_units > num_low:
        high = binary_states(num_units - num_low, device=own.device, dtype=own.dtype)
    low_input = low @ weights[..., :num_low, :] + other[..., None, :]
    low_bias = own[..., :num_low] @ low.T
    total = own.new_full((), -math.inf)
    for row in high:
        values = sum_out(low_input + (row @ weights[..., num_low:, :])[..., None, :])
        bias = low_bias + (own[..., num_low:] @ row)[..., None]
        values = values + bias.reshape(*bias.shape, *[1] * (values.ndim - bias.ndim))
        total = torch.logaddexp(total, values.logsumexp(axis))
    return total
