"""Enumeration: every state of a small binary model, and so its exact law."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from companion.core import LogProb
from companion.inputs import check_count

__all__ = ["binary_states", "enumerate_log_probs", "exact_distribution"]

_MAX_BITS = 25  # 33,554,432 states
_BLOCK_BITS = 14  # states evaluated in one call of a log-density


def binary_states(
    num_bits: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """All binary vectors of a length, in lexicographic order: row i holds the binary digits of i.

    Args:
        num_bits: n, the length, at most 25.
        device: where the states are made, by default PyTorch's default device.
        dtype: their dtype, by default PyTorch's default.

    Returns:
        `(2**n, n)`, zeros and ones.

    Raises:
        ValueError: `num_bits` below 1 or above 25.

    >>> binary_states(2)
    tensor([[0., 0.],
            [0., 1.],
            [1., 0.],
            [1., 1.]])
    """
    _check_bits(num_bits)
    states = torch.empty(2**num_bits, num_bits, device=device, dtype=dtype)
    index = torch.arange(2**num_bits, device=device)
    for bit in range(num_bits):  # by columns: a matrix of integers would take the memory again
        states[:, bit] = (index >> (num_bits - 1 - bit)) & 1
    return states


@torch.no_grad()
def enumerate_log_probs(
    log_prob: LogProb,
    num_bits: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The log-density of every binary state, evaluated in blocks of at most 2^14 states.

    Args:
        log_prob: unnormalised log-density, `(m, n) -> (m,)`; minus infinity forbids a state.
        num_bits: n, at most 25.
        device: where the states are made, by default PyTorch's default device.
        dtype: their dtype, by default PyTorch's default.

    Returns:
        `(2**n,)`, float64, in the order of `binary_states(n)`.

    Raises:
        ValueError: `num_bits` out of range; a log-density of another shape, NaN or plus infinity;
            no state allowed.

    >>> enumerate_log_probs(lambda x: x.sum(-1), 2)
    tensor([0., 1., 1., 2.], dtype=torch.float64)
    """
    blocks = log_prob_blocks(log_prob, num_bits, device=device, dtype=dtype)
    return check_allowed(torch.cat(list(blocks)))


def log_prob_blocks(
    log_prob: LogProb,
    num_bits: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Tensor]:
    """The blocks of `enumerate_log_probs`, in order, for sums whose memory must stay bounded."""
    _check_bits(num_bits)
    num_low = min(num_bits, _BLOCK_BITS)
    low = binary_states(num_low, device=device, dtype=dtype)
    high = low[:1, :0]  # one row of no bits
    if num_bits > num_low:
        high = binary_states(num_bits - num_low, device=device, dtype=dtype)
    for row in high:
        yield state_log_probs(log_prob, torch.cat([row.expand(len(low), -1), low], 1))


def exact_distribution(
    log_prob: LogProb,
    num_bits: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The probability of every binary state, by enumeration: `p(x) = p~(x) / sum_x' p~(x')`.

    Args:
        log_prob: unnormalised log-density, `(m, n) -> (m,)`.
        num_bits: n, at most 25.
        device: as in `enumerate_log_probs`, which does the work and raises its errors.
        dtype: as in `enumerate_log_probs`.

    Returns:
        `(2**n,)`, float64, in the order of `binary_states(n)`; the sum is 1.

    >>> exact_distribution(lambda x: x.sum(-1) * 0.6931471805599453, 2)  # p~ = 2^(number of ones)
    tensor([0.1111, 0.2222, 0.2222, 0.4444], dtype=torch.float64)
    """
    return enumerate_log_probs(log_prob, num_bits, device=device, dtype=dtype).softmax(0)


def state_log_probs(log_prob: LogProb, states: Tensor) -> Tensor:
    """The log-density at each row of `states`, float64, `(m, *event) -> (m,)`, or an error."""
    value = log_prob(states)
    if value.shape != states.shape[:1]:
        raise ValueError(
            f"log_prob must give one number a state: for states of shape {tuple(states.shape)} it "
            f"gave {tuple(value.shape)} instead of ({len(states)},)"
        )
    wrong = value.isnan() | (value == torch.inf)
    if wrong.any():
        i = int(torch.nonzero(wrong)[0])
        raise ValueError(
            f"log_prob is {float(value[i])} at the state {states[i].tolist()}; it must be finite "
            "or minus infinity"
        )
    return value.detach().double()


def check_allowed(log_probs: Tensor) -> Tensor:
    """Return `log_probs`, or raise if all of them are minus infinity."""
    if not (log_probs > -torch.inf).any():
        raise ValueError(
            "log_prob is minus infinity at every state: none is allowed, so there is nothing to "
            "normalise"
        )
    return log_probs


def _check_bits(num_bits: int) -> None:
    if check_count("num_bits", num_bits) > _MAX_BITS:
        raise ValueError(
            f"enumeration visits 2^num_bits states and stops at {_MAX_BITS} bits, got {num_bits}; "
            "estimate log Z by annealed importance sampling (AIS) instead"
        )
