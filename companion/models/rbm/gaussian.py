"""The machine with Gaussian visible units, for data that are real numbers.

    E(v, h) = sum_i (v_i - b_i)^2 / (2 s_i^2) - c.h - sum_ij (v_i / s_i^2) W_ij h_j

Given h, the visible units are independent normals of mean `b + W h` and variance `s^2`; given v,
the hidden units are independent coins. So the density of v is a mixture of 2^H normals with one
common diagonal covariance, whose means are the sums of subsets of the columns of W.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from companion.core import LogZ
from companion.inputs import check_count, check_finite, check_generator
from companion.models.rbm import likelihood
from companion.models.rbm.model import bernoulli
from companion.models.rbm.sums import log_sum_states
from companion.models.rbm.units import check_binary, check_states, small_weights, softplus

if TYPE_CHECKING:
    from companion.models.rbm.relatives import GaussianRBMPath

__all__ = ["GaussianRBM"]


class GaussianRBM(nn.Module):
    """A Gaussian-Bernoulli restricted Boltzmann machine (Hinton and Salakhutdinov 2006).

    The parametrisation is that of Cho, Ilin and Raiko (2011): the hidden units see `v / s^2`, and
    the variance is learned through its logarithm. `log_prob` is twice differentiable in v, so score
    matching and Langevin or Hamiltonian chains apply besides block Gibbs sampling; it does not look
    at the values of v: NaN in, NaN out.

    Weights start as independent normal draws of standard deviation 0.01, biases at 0 and variances
    at 1; `init_from_data` makes the machine that of independent normals. The scale of the weights
    is that of the data: standardise the data first, or learning rates do not carry over.

    Args:
        num_visible: D, the number of visible units.
        num_hidden: H, the number of hidden units.
        generator: source of randomness for the weights.
        device: where the parameters live.
        dtype: floating type of the parameters.

    Attributes:
        W: weights, `(num_visible, num_hidden)`, in the units of v.
        b: visible biases, `(num_visible,)`, in the units of v.
        c: hidden biases, `(num_hidden,)`.
        log_variance: `log s^2` of v given h, `(num_visible,)`.

    All methods take states with any leading dimensions.

    Reference: Cho, Ilin and Raiko (2011), *Improved learning of Gaussian-Bernoulli restricted
    Boltzmann machines*.

    >>> rbm = GaussianRBM(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> _ = rbm.W.data.zero_()                              # a standard normal
    >>> log_density = rbm.log_prob(torch.zeros(1, 2, dtype=torch.float64)) - rbm.log_z().value
    >>> f"{log_density.item():.4f}"                         # -log(2 pi)
    '-1.8379'
    """

    def __init__(
        self,
        num_visible: int,
        num_hidden: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_visible = check_count("num_visible", num_visible)
        self.num_hidden = check_count("num_hidden", num_hidden)
        self.W = small_weights(
            num_visible, num_hidden, generator=generator, device=device, dtype=dtype
        )
        self.b = nn.Parameter(self.W.new_zeros(num_visible))
        self.c = nn.Parameter(self.W.new_zeros(num_hidden))
        self.log_variance = nn.Parameter(self.W.new_zeros(num_visible))

    @torch.no_grad()
    def init_from_data(self, v: Tensor) -> None:
        """Set b to the mean and `log_variance` to the log of the variance of each unit.

        With W = 0 this is the best machine of independent units.

        Args:
            v: data, `(n, num_visible)`.

        Raises:
            ValueError: a unit is constant (it has no variance to take the logarithm of), or the
                data are not finite.
        """
        v = check_states("v", check_finite("v", v), self.num_visible, self.W)
        v = v.reshape(-1, self.num_visible)
        constant = (v == v[0]).all(0)
        if constant.any():
            unit = int(constant.nonzero()[0])
            raise ValueError(f"visible unit {unit} is constant in the data; leave it out")
        self.b.copy_(v.mean(0))
        self.log_variance.copy_(v.var(0, correction=0).log())

    # ------------------------------------------------------------ energies

    def energy(self, v: Tensor, h: Tensor) -> Tensor:
        """The joint energy `E(v, h)`, `(..., D), (..., H) -> (...)`; low energy is likely."""
        v = check_states("v", v, self.num_visible, self.W)
        h = check_binary("h", h, self.num_hidden, self.W)
        precision = torch.exp(-self.log_variance)
        containment = 0.5 * ((v - self.b).square() * precision).sum(-1)
        return containment - h @ self.c - (((v * precision) @ self.W) * h).sum(-1)

    def free_energy(self, v: Tensor) -> Tensor:
        """The free energy `F(v) = -log sum_h exp(-E(v, h))`, `(..., D) -> (...)`."""
        v = check_states("v", v, self.num_visible, self.W)
        precision = torch.exp(-self.log_variance)
        containment = 0.5 * ((v - self.b).square() * precision).sum(-1)
        return containment - softplus(self.c + (v * precision) @ self.W).sum(-1)

    def log_prob(self, v: Tensor) -> Tensor:
        """The unnormalised log-density `-F(v)`, `(..., D) -> (...)`; subtract `log_z`."""
        return -self.free_energy(v)

    @torch.no_grad()
    def log_z(self) -> LogZ:
        """The exact log partition function, by summing over the states of the hidden layer.

        For each h the integral over v is that of a normal density, so that

            Z = prod_i sqrt(2 pi s_i^2) sum_h exp(c.h + sum_i (m_i^2 - b_i^2) / (2 s_i^2)),

        with `m = b + W h`. No gradient passes through.

        Returns:
            an exact `LogZ` (standard error 0).

        Raises:
            ValueError: there are more than 25 hidden units.
        """
        return LogZ(self.log_normalizer(), 0.0)

    def log_normalizer(self) -> Tensor:
        """`log_z().value` as a scalar that can be differentiated, float64.

        By it `companion.objectives.maximum_likelihood` is exact.

        Raises:
            ValueError: there are more than 16 hidden units.
        """
        b, log_variance = self.b.double(), self.log_variance.double()
        precision = torch.exp(-log_variance)

        def integrate(mean: Tensor) -> Tensor:
            return 0.5 * ((mean - b) * (mean + b)) @ precision

        total = log_sum_states(self.W.T, self.c, b, integrate)
        return total + 0.5 * (math.log(2.0 * math.pi) + log_variance).sum()

    log_likelihood = likelihood.log_likelihood

    # ------------------------------------------------------------ conditionals and sampling

    def hidden_probs(self, v: Tensor) -> Tensor:
        """`P(h_j = 1 | v)` for every hidden unit, `(..., D) -> (..., H)`."""
        v = check_states("v", v, self.num_visible, self.W)
        return torch.sigmoid(self.c + (v * torch.exp(-self.log_variance)) @ self.W)

    def visible_mean(self, h: Tensor) -> Tensor:
        """The mean of `v` given `h`, `b + W h`, `(..., H) -> (..., D)`."""
        h = check_binary("h", h, self.num_hidden, self.W)
        return self.b + h @ self.W.T

    @torch.no_grad()
    def sample_hidden(self, v: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """A draw of `h` given `v`, `(..., D) -> (..., H)`, zeros and ones in W's dtype."""
        check_generator(generator, self.W.device)
        return bernoulli(self.hidden_probs(check_finite("v", v)), generator)

    @torch.no_grad()
    def sample_visible(self, h: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """A draw of `v` given `h`, `(..., H) -> (..., D)`: mean and noise."""
        check_generator(generator, self.W.device)
        return self._add_noise(self.visible_mean(h), generator)

    @torch.no_grad()
    def gibbs(
        self, v: Tensor, num_steps: int = 1, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """`num_steps` sweeps of block Gibbs sampling, each `h` given `v`, then `v` given `h`.

        A sweep leaves p(v) invariant and is reversible with respect to it.

        Args:
            v: current visible states, `(..., D)`.
            num_steps: number of sweeps, at least 1.
            generator: source of randomness, on W's device.

        Returns:
            new visible states, `(..., D)`, without gradient; `v` is left as it is.

        Raises:
            ValueError, TypeError: `v` is no batch of finite visible states, or a count is out of
                range.
        """
        check_count("num_steps", num_steps)
        check_generator(generator, self.W.device)
        v = check_states("v", check_finite("v", v), self.num_visible, self.W)
        scaled_weights = self.W * torch.exp(-self.log_variance)[:, None]
        for _ in range(num_steps):
            h = bernoulli(torch.sigmoid(self.c + v @ scaled_weights), generator)
            v = self._add_noise(self.b + h @ self.W.T, generator)
        return v

    def annealing_path(
        self, base_mean: Tensor | None = None, base_variance: Tensor | None = None
    ) -> GaussianRBMPath:
        """The path from independent normals to this machine, with exact conditionals.

        Args:
            base_mean: mean of each unit in the base, `(D,)`; None takes b.
            base_variance: its variance, `(D,)`; None takes s^2, that of v given h. The data's own
                mean and variance are a better start.

        Returns:
            A `GaussianRBMPath`. It looks at the machine as it is at the time of each call.
        """
        from companion.models.rbm.relatives import GaussianRBMPath  # which imports this module

        return GaussianRBMPath(self, base_mean, base_variance)

    @torch.no_grad()
    def sample_base(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` draws from independent normals of mean b and variance s^2, `(n, D)`.

        This is where Markov chains start: the machine's law if W were 0.
        """
        check_count("n", n)
        check_generator(generator, self.W.device)
        return self._add_noise(self.b.expand(n, -1), generator)

    def _add_noise(self, mean: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + torch.exp(0.5 * self.log_variance) * noise

    def extra_repr(self) -> str:
        """Sizes, for `print(rbm)`."""
        return f"num_visible={self.num_visible}, num_hidden={self.num_hidden}"
