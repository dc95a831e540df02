"""Contrastive objectives: the negative phase comes from a Markov chain.

The log-likelihood's gradient has two phases,

    d/dtheta log p(v) = d/dtheta log p~(v) - E_{v' ~ p}[ d/dtheta log p~(v') ],

and the methods differ in where the negative particles `v'` come from. The particles are constants
of the loss: the expectation of the gradient is meant, not the gradient of the expectation, so no
derivative passes through the sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from companion.inputs import check_count

__all__ = ["GibbsModel", "PersistentChains", "contrastive_divergence"]


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
        scalar loss `mean log p~(v') - mean log p~(v)`. Its value is not the likelihood and need not
        fall as the model improves.

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
    negative = model.gibbs(v, num_steps, generator=generator)
    return _two_phases(model, v, negative)


class PersistentChains:
    """Stochastic maximum likelihood, also called persistent contrastive divergence.

    (Younes 1989; Tieleman 2008.) The negative particles are a set of Markov chains that go on from
    one update to the next. If the chains are in equilibrium the gradient is unbiased; they stay
    near it only while the learning rate is small beside their mixing time.

    Args:
        model: an unnormalised model with `log_prob`, `gibbs` and `sample_base`.
        num_chains: number of chains; the noise of the negative phase falls with its square root.
        generator: source of randomness for the chains, on the model's device.

    Attributes:
        x: the chains' present states, `(num_chains, D)`.

    >>> from companion.models.rbm import RBM
    >>> g = torch.Generator().manual_seed(0)
    >>> rbm = RBM(4, 2, generator=g)
    >>> chains = PersistentChains(rbm, num_chains=10, generator=g)
    >>> chains.loss(torch.tensor([[1, 1, 0, 0]])).backward()
    >>> chains.x.shape
    torch.Size([10, 4])
    """

    def __init__(
        self, model: GibbsModel, num_chains: int, *, generator: torch.Generator | None = None
    ) -> None:
        check_count("num_chains", num_chains)
        self.model = model
        self.generator = generator
        self.x = model.sample_base(num_chains, generator=generator)

    def loss(
        self, v: Tensor, num_steps: int = 1, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Advance the chains by `num_steps` and return the loss for a mini-batch of data.

        Args:
            v: a mini-batch of data, `(n, D)`; n need not equal the number of chains.
            num_steps: Gibbs steps of every chain before this update.
            generator: takes the place of the chains' own generator.

        Returns:
            scalar loss `mean log p~(x) - mean log p~(v)` over chains x and data v.
        """
        positive = self.model.log_prob(v).mean()  # checks v before the chains move
        self.x = self.model.gibbs(self.x, num_steps, generator=generator or self.generator)
        return self.model.log_prob(self.x).mean() - positive

    def state_dict(self) -> dict[str, Tensor]:
        """The chains and, if they have a generator of their own, its state."""
        state = {"x": self.x}
        if self.generator is not None:
            state["generator"] = self.generator.get_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: the chains' number, shape or dtype differs.
        """
        x = state["x"]
        if x.shape != self.x.shape or x.dtype != self.x.dtype:
            raise ValueError(
                f"the saved chains are {tuple(x.shape)} of {x.dtype}, these are "
                f"{tuple(self.x.shape)} of {self.x.dtype}"
            )
        self.x = x.to(self.x.device, copy=True)
        if self.generator is not None and "generator" in state:
            self.generator.set_state(state["generator"].cpu())


def _two_phases(model: GibbsModel, positive: Tensor, negative: Tensor) -> Tensor:
    return model.log_prob(negative).mean() - model.log_prob(positive).mean()
