"""The annealing paths of the machine's relatives: with labels, with Gaussian units.

See `companion.models.rbm.annealing`, whose sweeps and weights they share.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from companion.inputs import check_count, check_generator
from companion.models.rbm.annealing import MachinePath, checked, coins, mix
from companion.models.rbm.units import categorical, check_states, softplus

if TYPE_CHECKING:
    from companion.models.rbm.gaussian import GaussianRBM
    from companion.models.rbm.labels import LabelRBM

__all__ = ["GaussianRBMPath", "LabelRBMPath"]


class LabelRBMPath(MachinePath):
    """The annealing path of a machine of data and labels (`LabelRBM.annealing_path`).

    As `RBMPath`, `E_0(v) = -a.v`, on joint states v = [x, one-hot(y)].

    Args:
        rbm: the machine.
        base_bias: a, `(D + K,)`, of the units of x and then of the labels; None for zeros.

    Raises:
        ValueError, TypeError: a bias of the wrong shape, dtype or device, or not finite.
    """

    def __init__(self, rbm: LabelRBM, base_bias: Tensor | None = None) -> None:
        self.rbm = rbm
        self.base_bias = checked("base_bias", base_bias, rbm._visible_parameters()[1])

    @property
    def base_log_z(self) -> Tensor:
        """Log Z at beta = 0, float64.

        `sum_i softplus(a_i)` over the units of x, plus `log sum_k exp(a_k)` over the labels, plus
        `num_hidden log 2`.
        """
        x, label = self._a.double().tensor_split([self.rbm.num_visible])
        return softplus(x).sum() + label.logsumexp(0) + self.rbm.num_hidden * math.log(2.0)

    @property
    def _a(self) -> Tensor:
        if self.base_bias is not None:
            return self.base_bias
        return self.rbm.b.new_zeros(self.rbm.num_visible + self.rbm.num_labels)

    @torch.no_grad()
    def sample_base(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` exact joint states at beta = 0, `(n, D + K)`."""
        check_count("n", n)
        check_generator(generator, self.rbm.W.device)
        return self._draw(self._a.expand(n, -1), generator)

    def _check(self, v: Tensor, generator: torch.Generator | None = None) -> Tensor:
        check_generator(generator, self.rbm.W.device)
        return self.rbm._check_visible(v)

    def _inputs(self, v: Tensor) -> Tensor:
        return (v @ self.rbm._visible_parameters()[0]).add_(self.rbm.c)

    def _ends(self, v: Tensor) -> tuple[Tensor, Tensor]:
        return (v @ self._a).double(), (v @ self.rbm._visible_parameters()[1]).double()

    def _draw_visible(
        self, h: Tensor, beta: Tensor | float, generator: torch.Generator | None
    ) -> Tensor:
        weights, bias = self.rbm._visible_parameters()
        return self._draw((h @ weights.T).mul_(beta) + mix(self._a, bias, beta), generator)

    def _draw(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        x, label = logits.tensor_split([self.rbm.num_visible], -1)
        x = coins(x.sigmoid(), generator)
        return self.rbm._join(x, categorical(label, generator))


class GaussianRBMPath(MachinePath):
    """The annealing path of a Gaussian machine (`GaussianRBM.annealing_path`).

    At beta = 0 the visible units are independent normals of mean m and variance t^2, so that
    `E_0(v) = sum_i (v_i - m_i)^2 / (2 t_i^2)`. At every beta they are normal given h, of precision
    `(1 - beta) / t^2 + beta / s^2`.

    Args:
        rbm: the machine.
        base_mean: m, `(D,)`; None takes b.
        base_variance: t^2, `(D,)`; None takes s^2.

    Raises:
        ValueError, TypeError: one of the wrong shape, dtype or device, not finite, or a variance
            that is not positive.
    """

    def __init__(
        self,
        rbm: GaussianRBM,
        base_mean: Tensor | None = None,
        base_variance: Tensor | None = None,
    ) -> None:
        self.rbm = rbm
        self.base_mean = checked("base_mean", base_mean, rbm.b)
        self.base_variance = checked("base_variance", base_variance, rbm.b)
        if base_variance is not None and (base_variance <= 0).any():
            first = int((base_variance <= 0).nonzero()[0])
            raise ValueError(
                f"base_variance must be positive; at index {first} it is {base_variance[first]:.4g}"
            )

    @property
    def base_log_z(self) -> Tensor:
        """Log Z at beta = 0, `sum_i log(2 pi t_i^2) / 2 + num_hidden log 2`, float64."""
        variance = self._base()[1].double()
        return 0.5 * (2.0 * math.pi * variance).log().sum() + self.rbm.num_hidden * math.log(2.0)

    @torch.no_grad()
    def sample_base(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` exact draws at beta = 0, `(n, D)`."""
        check_count("n", n)
        check_generator(generator, self.rbm.W.device)
        mean, variance = self._base()
        return _normal(mean.expand(n, -1), variance.sqrt(), generator)

    def _base(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the base."""
        mean = self.rbm.b.detach() if self.base_mean is None else self.base_mean
        if self.base_variance is None:
            return mean, self.rbm.log_variance.detach().exp()
        return mean, self.base_variance

    def _check(self, v: Tensor, generator: torch.Generator | None = None) -> Tensor:
        check_generator(generator, self.rbm.W.device)
        return check_states("v", v, self.rbm.num_visible, self.rbm.W)

    def _inputs(self, v: Tensor) -> Tensor:
        return ((v * torch.exp(-self.rbm.log_variance)) @ self.rbm.W).add_(self.rbm.c)

    def _ends(self, v: Tensor) -> tuple[Tensor, Tensor]:
        v, (mean, variance) = v.double(), self._base()
        start = ((v - mean).square() / variance).sum(-1)
        end = ((v - self.rbm.b).square() * torch.exp(-self.rbm.log_variance)).sum(-1)
        return -0.5 * start, -0.5 * end

    def _draw_visible(
        self, h: Tensor, beta: Tensor | float, generator: torch.Generator | None
    ) -> Tensor:
        mean, variance = self._base()
        own = torch.exp(-self.rbm.log_variance)
        precision = mix(1.0 / variance, own, beta)
        pull = mix(mean / variance, (self.rbm.b + h @ self.rbm.W.T) * own, beta)
        return _normal(pull / precision, precision.rsqrt(), generator)


def _normal(mean: Tensor, sd: Tensor, generator: torch.Generator | None) -> Tensor:
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + sd * noise
