"""Exact sums over all states of a layer of binary units, in blocks whose memory is bounded."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from companion.models.rbm.model import MAX_ENUMERATED
from companion.testing import binary_states

__all__ = ["log_sum_states"]

_MAX_DIFFERENTIATED = 16  # the graph keeps all 2^n states
_BLOCK_BITS = 12  # at most 2^12 states in a block
_BLOCK_NUMBERS = 22  # and at most 2^22 numbers: 32 MiB of the other layer's inputs


def log_sum_states(
    weights: Tensor, own: Tensor, other: Tensor, sum_out: Callable[[Tensor], Tensor]
) -> Tensor:
    """The log of a sum over all states of one layer, the other layer summed out in closed form.

        log sum_{h in {0,1}^n} exp(own.h + f(other + h.weights))

    The inputs of a block of states are those of a table of all patterns of the first few units plus
    one row for the other units, so no product is computed twice and, without gradients, memory
    stays bounded.

    Args:
        weights: `(n, m)`, from the layer that is summed over to the other one.
        own: biases of the units that are summed over, `(n,)`.
        other: biases of the other layer, `(m,)`.
        sum_out: f, the log of the sum (or integral) over the other layer given its inputs, float64,
            `(states, m) -> (states, *batch)`.

    Returns:
        `(*batch)`, float64.

    Raises:
        ValueError: n is above 25, or above 16 where the sum is differentiated.

    >>> def two_binary_units(inputs):
    ...     return torch.nn.functional.softplus(inputs).sum(-1)
    >>> total = log_sum_states(torch.zeros(3, 2), torch.zeros(3), torch.zeros(2), two_binary_units)
    >>> f"{total.exp().item():.4f}"                        # all 2^3 * 2^2 states weigh 1
    '32.0000'
    """
    weights, own, other = weights.double(), own.double(), other.double()
    num_units, num_other = weights.shape
    if num_units > MAX_ENUMERATED:
        raise ValueError(
            f"log_z sums over all 2^n states of the hidden layer and stops at n = {MAX_ENUMERATED};"
            f" this machine has {num_units} hidden units. Estimate log Z by annealed importance "
            "sampling (AIS) instead."
        )
    if num_units > _MAX_DIFFERENTIATED and torch.is_grad_enabled() and weights.requires_grad:
        raise ValueError(
            "log_normalizer differentiates a sum over all 2^n states of the hidden layer and stops "
            f"at n = {_MAX_DIFFERENTIATED}; this machine has {num_units} hidden units. Take log_z, "
            "which needs no gradient, or learn by PersistentChains."
        )
    affordable = _BLOCK_NUMBERS - (num_other - 1).bit_length()
    num_low = min(num_units, _BLOCK_BITS, max(affordable, 1))
    low = binary_states(num_low, device=own.device, dtype=own.dtype)
    high = low[:1, :0]  # one row of no units
    if num_units > num_low:
        high = binary_states(num_units - num_low, device=own.device, dtype=own.dtype)
    low_input, low_bias = low @ weights[:num_low] + other, low @ own[:num_low]
    total = own.new_full((), -math.inf)
    for row in high:
        values = sum_out(low_input + row @ weights[num_low:])
        bias = low_bias + row @ own[num_low:]
        values = values + bias.reshape(-1, *[1] * (values.ndim - 1))
        total = torch.logaddexp(total, values.logsumexp(0))
    return total
