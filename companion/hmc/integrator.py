"""The leapfrog integrator: Hamiltonian dynamics in steps that keep volume and can be run backwards.

A point x is given a momentum p, and the pair moves on the level sets of the Hamiltonian
`H(x, p) = -log p~(x) + p^T M^-1 p / 2`: `dx/dt = M^-1 p` and `dp/dt = grad log p~(x)`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from companion.core import LogProb, gradient, value_and_grad
from companion.inputs import check_count
from companion.mcmc.mass import Mass, make_mass, velocity

__all__ = ["Phase", "leapfrog"]


class Phase(NamedTuple):
    """A point of phase space, with what the next step needs."""

    x: Tensor
    """Position, `(*chains, *event)`."""
    p: Tensor
    """Momentum, `(*chains, *event)`."""
    log_prob: Tensor
    """The log-density at x, `(*chains)`."""
    grad: Tensor
    """Its gradient, `(*chains, *event)`."""


def leapfrog(
    log_prob: LogProb,
    x: Tensor,
    p: Tensor,
    grad: Tensor,
    step_size: Tensor | float,
    num_steps: int,
    mass: Mass | Tensor | None = None,
) -> Phase:
    """Follow Hamiltonian dynamics for `num_steps` leapfrog steps of size e.

    A step is half a kick, a drift, and half a kick:
    `p <- p + e/2 grad(x)`, then `x <- x + e M^-1 p`, then `p <- p + e/2 grad(x)`. Between steps two
    half kicks make a whole one. Each part is a shear, so volume is preserved exactly; and from
    `(x', -p')` the same steps lead back to `(x, -p)`. The energy is not conserved, but its error
    stays bounded and is of order `e^2` at a fixed length `e num_steps`, as long as e is below
    `2 / omega` for the highest frequency omega of the dynamics.

    The cost is one gradient a step: the one at the start is handed in. The value of the log-density
    is asked for at the end only.

    Args:
        log_prob: the log-density, `(*chains, *event) -> (*chains)`.
        x: positions, `(*chains, *event)`.
        p: momenta, `(*chains, *event)`.
        grad: gradient of the log-density at x, `(*chains, *event)`.
        step_size: e, a number, or a tensor that broadcasts against x (`(*chains, 1)` for vectors);
            negative to go backwards.
        num_steps: number of steps, at least 1.
        mass: M, the covariance of the momentum (not its standard deviation): None for the identity,
            a diagonal of the event's shape, `(d, d)` for events of shape `(d,)`, or a `Mass`, which
            saves its factorisation. For events that are square matrices it has to be a `Mass`: a
            square tensor counts as a matrix, not as a diagonal.

    Returns:
        A `Phase`: where the chains arrive, and the log-density and its gradient there.

    Raises:
        ValueError: `num_steps` below 1, a mass as in `make_mass`, or one of fewer or more
            dimensions than the events have, told by what `log_prob` gives.

    Reference: Neal (2011), *MCMC using Hamiltonian dynamics*, section 5.2.3.

    >>> def bell(x):
    ...     return -0.5 * x.square()
    >>> x, p = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])      # two chains on a circle
    >>> end = leapfrog(bell, x, p, -x, step_size=0.01, num_steps=157)  # about a quarter turn
    >>> print([f"{v:.2f}" for v in end.x], [f"{v:.2f}" for v in end.p])
    ['0.00', '1.00'] ['-1.00', '0.00']
    >>> back = leapfrog(bell, end.x, -end.p, end.grad, 0.01, 157)
    >>> bool((back.x - x).abs().max() < 1e-5)
    True
    """
    check_count("num_steps", num_steps)
    event_ndim = None  # told by a tensor, and by nothing else
    if mass is None:
        mass = Mass(None, None, None)
    elif not isinstance(mass, Mass):
        is_dense = mass.ndim == 2 and mass.shape[0] == mass.shape[1]
        event_ndim = 1 if is_dense else mass.ndim
        mass = make_mass(mass, x.shape[max(0, x.ndim - event_ndim) :], x.dtype, x.device)
    # addcmul, a + s b in one pass. In add(a, b, alpha=s) the compiler of PyTorch 2.13 loses alpha
    # where b is a matrix product: the energy would be wrong, silently.
    step = torch.as_tensor(step_size, dtype=x.dtype, device=x.device)
    half = 0.5 * step
    p = torch.addcmul(p, grad, half)
    for _ in range(num_steps - 1):
        x = torch.addcmul(x, velocity(mass, p), step)
        p = torch.addcmul(p, gradient(log_prob, x), step)
    x = torch.addcmul(x, velocity(mass, p), step)
    value, grad = value_and_grad(log_prob, x)
    if event_ndim is not None and x.ndim - value.ndim != event_ndim:
        raise ValueError(
            f"this mass is one for events of {event_ndim} dimensions, but those of log_prob have "
            f"the shape {tuple(x.shape[value.ndim :])}: hand in a Mass, "
            "make_mass(mass, event_shape, x.dtype, x.device)"
        )
    return Phase(x, torch.addcmul(p, grad, half), value, grad)
