"""The machines' annealing paths: their energies are turned on step by step.

    E_beta(v, h) = beta E(v, h) + (1 - beta) E_0(v)

At beta = 0 the visible units are independent, with the energy E_0 of the base, and the hidden ones
are fair coins; at beta = 1 this is the machine. At every beta it is a machine with weights beta W
and hidden biases beta c, so its conditionals are as exact. Summing out the hidden units,

    log p~_beta(v) = -(1 - beta) E_0(v) - beta E_1(v) + sum_j softplus(beta a_j(v)),

where E_1 is what E says of v alone and a_j is what hidden unit j receives at beta = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from companion.inputs import check_count, check_finite, check_generator
from companion.models.rbm.model import RBM, bernoulli, dot, row
from companion.models.rbm.units import of_units, softplus, softplus_change

__all__ = ["MachinePath", "RBMPath", "checked", "coins", "mix"]


class MachinePath:
    """What all machines' paths have in common: how they weigh and move."""

    @torch.no_grad()
    def log_prob(self, v: Tensor, beta: Tensor | float) -> Tensor:
        """`log p~_beta(v)`, `(..., D) -> (...)`; `beta` broadcasts over the leading dimensions."""
        v = self._check(v)
        start, end = self._ends(v)
        beta = beta.to(v) if isinstance(beta, Tensor) else beta
        hidden = softplus(of_units(beta, v) * self._inputs(v)).sum(-1)
        return mix(start, end, beta).to(v.dtype) + hidden

    @torch.no_grad()
    def profile(self, v: Tensor) -> Callable[[Tensor | float], Tensor]:
        """The log-density at `v` as a function of beta, in float64: one product with W."""
        v = self._check(v)
        inputs = self._inputs(v).double()  # log weights are differences between close betas
        start, end = self._ends(v)

        def at(beta: Tensor | float) -> Tensor:
            hidden = softplus(of_units(beta, inputs) * inputs).sum(-1)
            return mix(start, end, beta if isinstance(beta, Tensor) else float(beta)) + hidden

        return at

    @torch.no_grad()
    def step(
        self, v: Tensor, beta: Tensor | float, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """A sweep of block Gibbs sampling at `beta`, `(..., D) -> (..., D)`."""
        v = self._check(v, generator)
        return self._sweep(self._hidden_probs(self._inputs(v), beta), of_units(beta, v), generator)

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
        v = self._check(v, generator)
        inputs = self._inputs(v)
        probs = self._hidden_probs(inputs, next_beta)
        change = softplus_change(inputs, beta, next_beta, probs)
        increment = (next_beta - beta) * self._slope(v) + change
        return self._sweep(probs, of_units(next_beta, v), generator), increment

    def _hidden_probs(self, inputs: Tensor, beta: Tensor | float) -> Tensor:
        return (of_units(beta, inputs) * inputs).sigmoid_()

    def _sweep(
        self, probs: Tensor, beta: Tensor | float, generator: torch.Generator | None
    ) -> Tensor:
        """Hidden units with the given probabilities, then the visible ones."""
        return self._draw_visible(coins(probs, generator), beta, generator)

    def _slope(self, v: Tensor) -> Tensor:
        """`E_0(v) - E_1(v)`, float64: how the part of v alone grows with beta."""
        start, end = self._ends(v)
        return end - start

    # ------------------------------------------------------------ what each machine has its own

    def _check(self, v: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """States as they are needed, or an error."""
        raise NotImplementedError

    def _inputs(self, v: Tensor) -> Tensor:
        """What the hidden units receive at beta = 1, a new tensor."""
        raise NotImplementedError

    def _ends(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """`-E_0(v)` and `-E_1(v)`, float64."""
        raise NotImplementedError

    def _draw_visible(
        self, h: Tensor, beta: Tensor | float, generator: torch.Generator | None
    ) -> Tensor:
        """Visible units given hidden ones."""
        raise NotImplementedError


class RBMPath(MachinePath):
    """The annealing path of a machine (`RBM.annealing_path`); `E_0(v) = -a.v`.

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
        self.rbm, self.base_bias = rbm, checked("base_bias", base_bias, rbm.b)

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

    def _check(self, v: Tensor, generator: torch.Generator | None = None) -> Tensor:
        check_generator(generator, self.rbm.W.device)
        return self.rbm._check_units("v", v, self.rbm.num_visible)

    def _inputs(self, v: Tensor) -> Tensor:
        return affine(row(self.rbm.c), v, self.rbm.W, 1.0)

    def _ends(self, v: Tensor) -> tuple[Tensor, Tensor]:
        return dot(v, self._a).double(), dot(v, self.rbm.b).double()

    def _slope(self, v: Tensor) -> Tensor:
        return dot(v, self.rbm.b - self._a).double()

    def _draw_visible(
        self, h: Tensor, beta: Tensor | float, generator: torch.Generator | None
    ) -> Tensor:
        bias = mix(row(self._a), row(self.rbm.b), beta)
        return coins(affine(bias, h, self.rbm.W.mT, beta).sigmoid_(), generator)


# ---------------------------------------------------------------- inside


def affine(bias: Tensor, x: Tensor, weights: Tensor, beta: Tensor | float) -> Tensor:
    """`bias + beta x.weights`, a new tensor; in one pass where the shapes are plain."""
    if x.ndim == weights.ndim == 2 and not isinstance(beta, Tensor):
        return torch.addmm(bias, x, weights, alpha=beta)
    return (x @ weights).mul_(beta).add_(bias)


def coins(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Zeros and ones with the given probabilities, `(..., units)`, as `bernoulli` draws them.

    In single precision random numbers cost a third of what the products cost, so bits are saved:
    with 16 bits k, uniform on 0..65535, and a uniform u of [0, 1), a unit is on where
    `k + u < 65536 p`. This is exact, and u matters once in 65,536 times: the states in a batch have
    u in common, one number a unit. Each state still has independent units; that a unit is decided
    by u in two given states at once has a probability of 2e-10.
    """
    if probs.dtype != torch.float32:
        return bernoulli(probs, generator)
    n = probs.numel()
    bits = torch.empty((n + 3) // 4, dtype=torch.int64, device=probs.device)
    k = bits.random_(-(2**63), None, generator=generator).view(torch.uint16)  # all 64 bits of each
    k = k[:n].view(probs.shape).to(probs.dtype)
    minus_u = torch.empty(probs.shape[-1], dtype=probs.dtype, device=probs.device)
    minus_u.uniform_(-1.0, 0.0, generator=generator)
    return k.sub_(probs, alpha=65536.0).le_(minus_u)  # exact where u matters


def checked(name: str, x: Tensor | None, like: Tensor) -> Tensor | None:
    """A parameter of the base, without gradient, or an error unless it is as the machine's own."""
    if x is None:
        return None
    check_finite(name, x)
    if (x.shape, x.dtype, x.device) != (like.shape, like.dtype, like.device):
        raise ValueError(
            f"{name} must be {tuple(like.shape)} of {like.dtype} on {like.device}, got "
            f"{tuple(x.shape)} of {x.dtype} on {x.device}"
        )
    return x.detach()


def mix(start: Tensor, end: Tensor, beta: Tensor | float) -> Tensor:
    """`(1 - beta) start + beta end`, exact at both ends."""
    return torch.lerp(start, end, beta.to(end) if isinstance(beta, Tensor) else beta)
