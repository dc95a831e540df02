"""Contrastive objectives: the negative phase comes from a Markov chain.

The log-likelihood's gradient has two phases,

    d/dtheta log p(v) = d/dtheta log p~(v) - E_{v' ~ p}[ d/dtheta log p~(v') ],

and the methods differ in where the negative particles `v'` come from. The particles are constants
of the loss: the expectation of the gradient is meant, not the gradient of the expectation, so no
derivative passes through the sampling.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from companion.objectives.rows import check_binary_rows
from companion.testing import binary_states

__all__ = ["GibbsModel", "contrastive_divergence", "maximum_likelihood", "two_phases"]


_MAX_UNITS = 16


class GibbsModel(Protocol):
    """What the contrastive objectives ask of a model; `RBM` and its relatives offer it."""

    def log_prob(self, v: Tensor) -> Tensor:
        """Unnormalised log-probability, `(..., D) -> (...)`."""
        ...

    def gibbs(
        self, v: Tensor, num_steps: int = 1, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """`num_steps` steps of a Markov chain that leaves the model invariant."""
        ...

    def sample_base(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` starting points for Markov chains, `(n, D)`."""
        ...


def contrastive_divergence(
    model: GibbsModel, v: Tensor, num_steps: int = 1, *, generator: torch.Generator | None = None
) -> Tensor:
    """Contrastive divergence, CD-k (Hinton 2002).

    The negative particles are the data after k Gibbs steps. The gradient is that of the difference
    of Kullback-Leibler divergences KL(p_0 || p) - KL(p_k || p) with one term left out, so it is
    biased for finite k; the bias falls as k grows (Carreira-Perpiñán and Hinton 2005).

    Args:
        model: an unnormalised model with `log_prob` and `gibbs`.
        v: a mini-batch of data, `(n, D)`.
        num_steps: k, the number of Gibbs steps.
        generator: source of randomness, on the model's device.

    Returns:
        scalar loss `mean log p~(v') - mean log p~(v)`, summed over a batch of machines. Its value
        is not the likelihood and need not fall as the model improves.

    Raises:
        ValueError, TypeError: the model rejects `v`, or `num_steps` is below 1.

    >>> from companion.models.rbm import RBM
    >>> rbm = RBM(4, 2, generator=torch.Generator().manual_seed(0))
    >>> v = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])
    >>> loss = contrastive_divergence(rbm, v, generator=torch.Generator().manual_seed(1))
    >>> loss.backward()
    >>> rbm.W.grad.shape
    torch.Size([4, 2])
    """
    fused = getattr(model, "contrastive_step", None)
    if fused is not None:
        return cast(Tensor, fused(v, num_steps, generator=generator)[0])
    negative = model.gibbs(v, num_steps, generator=generator)
    return two_phases(model, v, negative)


def two_phases(model: GibbsModel, v: Tensor, x: Tensor) -> Tensor:
    """The loss `mean log p~(x) - mean log p~(v)`: means over rows, summed over machines."""
    positive = model.log_prob(v).mean(-1).sum()
    return model.log_prob(x).mean(-1).sum() - positive


def maximum_likelihood(model: GibbsModel, v: Tensor) -> Tensor:
    """The exact negative log-likelihood, `log Z - mean log p~(v)`, for small machines.

    Log Z is the model's own `log_normalizer()` where it has one, else the sum over all binary
    states of the length of `v`'s rows. It is what the other objectives stand in for.

    Args:
        model: an unnormalised model of binary units with `log_prob`.
        v: data, `(n, D)`.

    Returns:
        scalar loss in nats a row, summed over a batch of machines.

    Raises:
        ValueError: the model rejects `v`, or has too many states to sum over (2^16); without a
            `log_normalizer`, `v` holds anything but zeros and ones.

    >>> from companion.models.rbm import RBM
    >>> rbm = RBM(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> _ = rbm.W.data.zero_()                       # three fair coins: 3 log 2 nats
    >>> f"{maximum_likelihood(rbm, torch.tensor([[1, 0, 1]])).item():.4f}"
    '2.0794'
    """
    log_prob = model.log_prob(v)
    own = getattr(model, "log_normalizer", None)
    if own is not None:
        return cast(Tensor, own()).sum() - log_prob.mean(-1).sum()
    num_units = v.shape[-1]
    if num_units > _MAX_UNITS:
        raise ValueError(
            f"maximum_likelihood sums over all 2^n states and stops at n = {_MAX_UNITS}, but v has "
            f"{num_units} units; learn by PersistentChains instead"
        )
    check_binary_rows(v)  # a model may take other values, which the sum would leave out
    states = binary_states(num_units, device=v.device, dtype=log_prob.dtype)
    return model.log_prob(states).logsumexp(-1).sum() - log_prob.mean(-1).sum()
