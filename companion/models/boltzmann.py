"""The fully visible Boltzmann machine: binary units, every pair of them coupled.

    log p~(v) = b.v + 1/2 v.J v,      J symmetric, with zeros on its diagonal

Nothing is hidden, so the log-likelihood is concave and each unit given all the others is a logistic
regression, `p(v_i = 1 | v_-i) = sigmoid(b_i + (J v)_i)`; only log Z is out of reach for many units.
That makes it the machine on which to compare ways of learning.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from companion.core import LogZ
from companion.inputs import check_count, check_generator, check_real
from companion.logz import enumeration
from companion.models.rbm.model import bernoulli
from companion.models.rbm.units import check_binary, small_weights
from companion.testing import exact_distribution

__all__ = ["BoltzmannMachine"]

_MAX_SAMPLED = 20  # units whose 2^D probabilities `sample_exact` keeps


class BoltzmannMachine(nn.Module):
    """A Boltzmann machine without hidden units (Ackley, Hinton and Sejnowski 1985).

    What is stored in `J` need not be symmetric: the machine uses `couplings`, the mean of J and its
    transpose with the diagonal set to zero. So gradients keep the symmetry: that of `log_prob` is
    `v_i v_j / 2` in both entries of a pair and 0 on the diagonal. Each entry holds half of the
    derivative by the coupling of units i and j, whose change is that of both entries. The log
    likelihood's gradient in J is therefore half the difference of second moments of data and model.

    Entries of J start as independent normal draws of standard deviation 0.01, biases at 0.

    Args:
        num_units: D, the number of units.
        generator: source of randomness for J.
        device: where the parameters live.
        dtype: floating type of the parameters.

    Attributes:
        J: what `couplings` is made of, `(D, D)`.
        b: biases, `(D,)`.

    All methods take states with any leading dimensions; boolean and integer states are cast to the
    dtype of J, another floating dtype is an error.

    Raises:
        ValueError, TypeError: no positive number of units, or a dtype that is not floating.

    Reference: Ackley, Hinton and Sejnowski (1985), *A learning algorithm for Boltzmann machines*.

    >>> machine = BoltzmannMachine(4, generator=torch.Generator().manual_seed(0))
    >>> v = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]])
    >>> log_likelihood = machine.log_prob(v) - machine.log_z().value
    >>> log_likelihood.shape, bool((log_likelihood < 0).all())
    (torch.Size([2]), True)
    """

    def __init__(
        self,
        num_units: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_units = check_count("num_units", num_units)
        size = (num_units, num_units)
        self.J = small_weights(*size, generator=generator, device=device, dtype=dtype)
        self.b = nn.Parameter(torch.zeros(num_units, device=device, dtype=dtype))

    @property
    def couplings(self) -> Tensor:
        """The symmetric matrix that the machine uses, `(D, D)`, with zeros on its diagonal."""
        symmetric = (self.J + self.J.mT) / 2
        return symmetric - symmetric.diagonal().diag()

    @torch.no_grad()
    def init_biases(self, v: Tensor, *, smoothing: float = 1.0) -> None:
        """Set b to the log-odds of the data's unit means, so that J = 0 models independent units.

        Args:
            v: data, `(n, D)`.
            smoothing: this many imaginary ones and as many zeros are added to each unit's count
                (Laplace smoothing), so that a unit that is never on keeps a finite bias.
        """
        check_real("smoothing", smoothing, minimum=0.0)
        v = self._check(v).flatten(0, -2)
        counts = v.sum(0, dtype=torch.float64) + smoothing  # 16 bits do not hold a count
        self.b.copy_(torch.logit(counts / (len(v) + 2.0 * smoothing)))

    # ------------------------------------------------------------ energies

    def energy(self, v: Tensor) -> Tensor:
        """The energy `E(v) = -b.v - 1/2 v.J v`, `(..., D) -> (...)`; low energy is likely."""
        return -self.log_prob(v)

    def log_prob(self, v: Tensor) -> Tensor:
        """The unnormalised log-probability `-E(v)`, `(..., D) -> (...)`; subtract `log_z`."""
        return _log_prob(self._check(v), self.b, self.couplings)

    @torch.no_grad()
    def log_z(self) -> LogZ:
        """The exact log partition function, by summing over all 2^D states in float64.

        Returns:
            an exact `LogZ` (standard error 0), without gradient.

        Raises:
            ValueError: more than 25 units.
        """
        b, couplings = self.b.double(), self.couplings.double()
        return enumeration(
            lambda v: _log_prob(v, b, couplings), self.num_units, device=b.device, dtype=b.dtype
        )

    # ------------------------------------------------------------ conditionals and sampling

    def conditional_probs(self, v: Tensor) -> Tensor:
        """`p(v_i = 1 | v_-i)` for every unit, `(..., D) -> (..., D)`, by one product with J."""
        return torch.sigmoid(self.b + self._check(v) @ self.couplings)

    @torch.no_grad()
    def gibbs(
        self, v: Tensor, num_steps: int = 1, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """`num_steps` sweeps of Gibbs sampling: units 0, 1, ..., D - 1 in turn, given the others.

        A sweep leaves p(v) invariant, but is not reversible: its reverse visits the units in the
        opposite order. Its D steps depend on one another and cannot be taken at once.

        Args:
            v: current states, `(..., D)`.
            num_steps: number of sweeps, at least 1.
            generator: source of randomness, on the device of J.

        Returns:
            new states, `(..., D)`, without gradient; `v` is left as it is.

        Raises:
            ValueError, TypeError: `v` is no batch of states, or a count is out of range.
        """
        check_count("num_steps", num_steps)
        check_generator(generator, self.b.device)
        v, couplings = self._check(v).clone(), self.couplings
        for _ in range(num_steps):
            for i in range(self.num_units):  # the diagonal is zero: v_i has no say in its own fate
                v[..., i] = bernoulli(torch.sigmoid(self.b[i] + v @ couplings[i]), generator)
        return v

    @torch.no_grad()
    def sample_base(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` draws from independent units with the biases alone, `(n, D)`: starts for chains."""
        check_count("n", n)
        check_generator(generator, self.b.device)
        return bernoulli(torch.sigmoid(self.b).expand(n, -1), generator)

    @torch.no_grad()
    def sample_exact(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` independent exact draws, `(n, D)`, by enumeration.

        Raises:
            ValueError: more than 20 units, or n below 1.
        """
        check_count("n", n)
        check_generator(generator, self.b.device)
        if self.num_units > _MAX_SAMPLED:
            raise ValueError(
                f"sample_exact keeps the probabilities of all 2^D states and stops at "
                f"D = {_MAX_SAMPLED}; this machine has {self.num_units} units. Use gibbs instead."
            )
        b, couplings = self.b.double(), self.couplings.double()
        p = exact_distribution(
            lambda v: _log_prob(v, b, couplings), self.num_units, device=b.device, dtype=b.dtype
        )
        index = torch.multinomial(p, n, replacement=True, generator=generator)
        bit = torch.arange(self.num_units - 1, -1, -1, device=b.device)
        return ((index[:, None] >> bit) & 1).to(self.b.dtype)

    def _check(self, v: Tensor) -> Tensor:
        return check_binary("v", v, self.num_units, self.b)

    def extra_repr(self) -> str:
        """Sizes, for `print(machine)`."""
        return f"num_units={self.num_units}"


def _log_prob(v: Tensor, b: Tensor, couplings: Tensor) -> Tensor:
    return (v * (b + v @ couplings / 2)).sum(-1)
