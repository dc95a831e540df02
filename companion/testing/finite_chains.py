"""Markov chains on finitely many states, by their transition matrix.

`P[i, j]`, `(m, m)`, is the probability of going from state i to state j
(`companion.testing.transition_matrix` gets it from a kernel), and `p`, `(m,)`, a law on the states.
Everything here is exact up to round-off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from companion.inputs import check_finite, check_real

__all__ = [
    "detailed_balance_error",
    "mixing_time",
    "reversal",
    "spectral_gap",
    "stationary_error",
]

_MAX_DOUBLINGS = 30  # a chain that needs more than 2^30 steps counts as never mixing


def stationary_error(matrix: Tensor, p: Tensor) -> float:
    """How far one step moves the law p: the largest entry of `|p P - p|`.

    Args:
        matrix: P, `(m, m)`, rows sum to 1.
        p: probabilities, `(m,)`.

    Returns:
        0 up to round-off if and only if P leaves p invariant.

    Raises:
        ValueError: not a transition matrix, or not a law on its states.

    >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> stationary_error(swap, torch.tensor([0.5, 0.5]))
    0.0
    >>> stationary_error(swap, torch.tensor([0.75, 0.25]))
    0.5
    """
    matrix, p = _check_chain(matrix, p)
    return float((p @ matrix - p).abs().max())


def detailed_balance_error(matrix: Tensor, p: Tensor) -> float:
    """The largest net flow between two states: the largest entry of `|p_i P_ij - p_j P_ji|`.

    It is 0 up to round-off if and only if P is reversible with respect to p, and then p is
    invariant. The converse is false: a systematic sweep leaves p invariant without detailed
    balance.

    Args:
        matrix: P, `(m, m)`, rows sum to 1.
        p: probabilities, `(m,)`.

    Returns:
        the largest net flow.

    Raises:
        ValueError: as `stationary_error`.

    >>> third = torch.full((3,), 1 / 3)
    >>> round_trip = torch.eye(3).roll(1, 1)                # 0 -> 1 -> 2 -> 0
    >>> f"{stationary_error(round_trip, third):.3f} {detailed_balance_error(round_trip, third):.3f}"
    '0.000 0.333'
    """
    matrix, p = _check_chain(matrix, p)
    flow = p[:, None] * matrix
    return float((flow - flow.T).abs().max())


def reversal(matrix: Tensor, p: Tensor) -> Tensor:
    """The chain run backwards in equilibrium: `P*_ij = p_j P_ji / p_i`, equal to P if reversible.

    Args:
        matrix: P, `(m, m)`, rows sum to 1.
        p: its invariant law, `(m,)`, positive.

    Returns:
        P*, `(m, m)`, float64.

    Raises:
        ValueError: as `stationary_error`, or p is zero somewhere, or not invariant.

    >>> reversal(torch.eye(3).roll(1, 1), torch.full((3,), 1 / 3))
    tensor([[0., 0., 1.],
            [1., 0., 0.],
            [0., 1., 0.]], dtype=torch.float64)
    """
    matrix, p = _check_chain(matrix, p)
    _check_invariant(matrix, p)
    if not (p > 0).all():
        raise ValueError(f"p must be positive; it is 0 at state {int((p == 0).nonzero()[0])}")
    return matrix.T * p / p[:, None]


def spectral_gap(matrix: Tensor, p: Tensor) -> float:
    """How fast the chain forgets: `1 - max |lambda|` over all eigenvalues of P but the first.

    The distance from equilibrium falls in the end like `(1 - gap)^t`. A chain that is periodic or
    falls into parts has gap 0.

    Args:
        matrix: P, `(m, m)`, rows sum to 1.
        p: its invariant law, `(m,)`; states of probability 0 are left out.

    Returns:
        the gap, between 0 and 1.

    Raises:
        ValueError: as `stationary_error`, or p is not invariant.

    Reference: Levin and Peres (2017), *Markov Chains and Mixing Times*, chapter 12.

    >>> f"{spectral_gap(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([0.75, 0.25])):.4f}"
    '0.4000'
    """
    matrix, p = _check_chain(matrix, p)
    _check_invariant(matrix, p)
    root = p[p > 0].sqrt()
    # Similar to P, and symmetric if P is reversible: its eigenvalues are well-conditioned then.
    similar = root[:, None] * matrix[p > 0][:, p > 0] / root
    similar = similar - root[:, None] * root  # takes out the eigenvalue 1 of the law itself
    return max(0.0, 1.0 - float(torch.linalg.eigvals(similar).abs().max()))


def mixing_time(matrix: Tensor, p: Tensor, epsilon: float = 0.25) -> int:
    """How many steps until the chain is near its law p from wherever it starts.

    The first t with `max_i ||P^t(i, .) - p|| <= epsilon`, in total variation
    `||q - p|| = sum_j |q_j - p_j| / 2`. That distance never grows with t, so powers of P by
    repeated squaring find it in about `2 log2 t` products.

    Args:
        matrix: P, `(m, m)`, rows sum to 1.
        p: its invariant law, `(m,)`.
        epsilon: the distance, between 0 and 1.

    Returns:
        t, a number of steps.

    Raises:
        ValueError: as `stationary_error`, or not that near within 2^30 steps (a chain that is
            periodic, falls into parts or has another law).

    Reference: Levin and Peres (2017), *Markov Chains and Mixing Times*, section 4.5.

    >>> lazy = torch.tensor([[0.99, 0.01], [0.01, 0.99]])   # distance 0.98^t / 2
    >>> mixing_time(lazy, torch.tensor([0.5, 0.5]))
    35
    """
    matrix, p = _check_chain(matrix, p)
    check_real("epsilon", epsilon, minimum=0.0, maximum=1.0)

    def is_near(power: Tensor) -> bool:
        return float((power - p).abs().sum(1).max()) / 2 <= epsilon

    power = torch.eye(len(p), dtype=p.dtype, device=p.device)
    if is_near(power):
        return 0
    doublings = [matrix]  # P^1, P^2, P^4, ...
    while not is_near(doublings[-1]):
        if len(doublings) > _MAX_DOUBLINGS:
            raise ValueError(
                f"the chain is not within {epsilon} of p after 2^{_MAX_DOUBLINGS} steps: it is "
                "periodic, falls into parts, or has another law"
            )
        square = doublings[-1] @ doublings[-1]
        doublings.append(square / square.sum(1, keepdim=True))
    steps = 0
    for k in reversed(range(len(doublings))):  # the largest number of steps that is not enough
        longer = power @ doublings[k]
        if not is_near(longer):
            power, steps = longer, steps + 2**k
    return steps + 1


def _check_chain(matrix: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, or an error that says what is wrong with them."""
    check_finite("matrix", matrix)
    check_finite("p", p)
    if p.ndim != 1 or matrix.shape != (len(p), len(p)):
        raise ValueError(
            f"expected a matrix (m, m) and a law (m,), got {tuple(matrix.shape)} and "
            f"{tuple(p.shape)}"
        )
    matrix, p = matrix.detach().double(), p.detach().double()
    for name, rows in (("each row of the matrix", matrix), ("p", p[None])):
        error = float((rows.sum(1) - 1).abs().max())
        if (rows < 0).any() or error > 1e-5:
            raise ValueError(
                f"{name} must hold probabilities that sum to 1; the smallest entry is "
                f"{float(rows.min()):.3g} and a sum is off by {error:.3g}"
            )
    return matrix, p


def _check_invariant(matrix: Tensor, p: Tensor) -> None:
    error = stationary_error(matrix, p)
    if error > 1e-6:
        raise ValueError(f"p must be invariant under P, but one step moves it by {error:.3g}")
