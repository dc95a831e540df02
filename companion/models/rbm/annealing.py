"""The machine's annealing path: its energy is turned on step by step.

    E_beta(v, h) = beta E(v, h) - (1 - beta) a.v
    log p~_beta(v) = ((1 - beta) a + beta b).v + sum_j softplus(beta (c_j + (v.W)_j))

At beta = 0 the units are independent, with visible biases a; at beta = 1 this is the machine. At
every beta it is a machine, with weights beta W, so its conditionals are as exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from companion.inputs import check_count, check_finite, check_generator
from companion.models.rbm.model import RBM, bernoulli, dot, row
from companion.models.rbm.units import softplus

__all__ = ["RBMPath"]


class RBMPath:
    """The annealing path of a machine (`RBM.annealing_path`).

    A step is a sweep of block Gibbs sampling: all hidden units given the visible ones, then the
    reverse. As a kernel on v it is reversible. It costs two products with W; `advance` weighs and
    moves for two, where weighing and moving apart take three.

    Args:
        rbm: the machine.
        base_bias: a, `(*batch_shape, D)`; None for zeros.

    Raises:
        ValueError, TypeError: a bias of the wrong shape, dtype or device, or not finite.

    Reference: Salakhutdinov and Murray (2008), *On the quantitative analysis of deep belief
    networks*.
    """

    def __init__(self, rbm: RBM, base_bias: Tensor | None = None) -> None:
        if base_bias is not None:
            check_finite("base_bias", base_bias)
            b = rbm.b
            if (base_bias.shape, base_bias.dtype, base_bias.device) != (b.shape, b.dtype, b.device):
                raise ValueError(
                    f"base_bias must be {tuple(b.shape)} of {b.dtype} on {b.device}, got "
                    f"{tuple(base_bias.shape)} of {base_bias.dtype} on {base_bias.device}"
                )
            base_bias = base_bias.detach()
        self.rbm, self.base_bias = rbm, base_bias

    @property
    def base_log_z(self) -> Tensor:
        """Log Z at beta = 0, `sum_i softplus(a_i) + num_hidden log 2`, float64, one a machine."""
        return softplus(self._a.double()).sum(-1) + self.rbm.num_hidden * math.log(2.0)

    @property
    def _a(self) -> Tensor:
        return torch.zeros_like(self.rbm.b) if self.base_bias is None else self.base_bias

    @torch.no_grad()
    def sample_base(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` exact draws at beta = 0, `(*batch_shape, n, D)`."""
        check_count("n", n)
        check_generator(generator, self.rbm.W.device)
        probs = torch.sigmoid(self._a)[..., None, :]
        return bernoulli(probs.expand(*self.rbm.batch_shape, n, -1), generator)

    @torch.no_grad()
    def log_prob(self, v: Tensor, beta: Tensor | float) -> Tensor:
        """`log p~_beta(v)`, `(..., D) -> (...)`; `beta` broadcasts over the leading dimensions."""
        v = self._check(v)
        beta, rbm = _of_units(beta, v), self.rbm
        visible = (v * _mix(row(self._a), row(rbm.b), beta)).sum(-1)
        return visible + softplus(beta * (row(rbm.c) + v @ rbm.W)).sum(-1)

    @torch.no_grad()
    def profile(self, v: Tensor) -> Callable[[Tensor | float], Tensor]:
        """The log-density at `v` as a function of beta, in float64: one product with W."""
        v = self._check(v)
        return self._profile(v, row(self.rbm.c) + v @ self.rbm.W)

    @torch.no_grad()
    def step(
        self, v: Tensor, beta: Tensor | float, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """A sweep of block Gibbs sampling at `beta`, `(..., D) -> (..., D)`."""
        check_generator(generator, self.rbm.W.device)
        v = self._check(v)
        return self._sweep(row(self.rbm.c) + v @ self.rbm.W, _of_units(beta, v), generator)

    @torch.no_grad()
    def advance(
        self,
        v: Tensor,
        beta: Tensor | float,
        next_beta: Tensor | float,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weigh and move, as `companion.tempering.advance` does, with two products in all."""
        check_generator(generator, self.rbm.W.device)
        v = self._check(v)
        inputs = row(self.rbm.c) + v @ self.rbm.W
        at = self._profile(v, inputs)
        increment = at(next_beta) - at(beta)
        return self._sweep(inputs, _of_units(next_beta, v), generator), increment

    def _check(self, v: Tensor) -> Tensor:
        return self.rbm._check_units("v", v, self.rbm.num_visible)

    def _profile(self, v: Tensor, inputs: Tensor) -> Callable[[Tensor | float], Tensor]:
        # float64: log weights are differences between close betas
        inputs = inputs.detach().double()
        start, end = (dot(v, bias.detach()) for bias in (self._a, self.rbm.b))
        start, end = start.double(), end.double()

        def at(beta: Tensor | float) -> Tensor:
            hidden = softplus(_of_units(beta, inputs) * inputs).sum(-1)
            return _mix(start, end, beta if isinstance(beta, Tensor) else float(beta)) + hidden

        return at

    def _sweep(
        self, inputs: Tensor, beta: Tensor | float, generator: torch.Generator | None
    ) -> Tensor:
        rbm = self.rbm
        h = bernoulli(torch.sigmoid(beta * inputs), generator)
        bias = _mix(row(self._a), row(rbm.b), beta)
        return bernoulli((h @ rbm.W.mT).mul_(beta).add_(bias).sigmoid_(), generator)


def _of_units(beta: Tensor | float, like: Tensor) -> Tensor | float:
    """`beta`, which broadcasts over leading dimensions, made to broadcast over units as well."""
    return beta.to(like)[..., None] if isinstance(beta, Tensor) else beta


def _mix(start: Tensor, end: Tensor, beta: Tensor | float) -> Tensor:
    return (1.0 - beta) * start + beta * end
