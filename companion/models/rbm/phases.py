"""Both phases of contrastive learning in one call, with the fewest products.

The gradient of `mean log p~(x) - mean log p~(v)` needs only the machine's sufficient statistics,

    d/dW = x' P(h = 1 | x) / m - v' P(h = 1 | v) / n,

and sampling `x` has computed most of them. Done apart, a step of CD-1 costs six products of a batch
with W: two to sample, one for each log-density and one for each gradient. Done together it costs
five, since what the hidden units of the data receive is both the first half of the sweep and the
data's statistic. Beside these products what is left is memory traffic: an update in place writes
the last two products straight into W, where a loss makes a gradient of W's size, and its optimiser
reads that again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from companion.core import with_gradients
from companion.inputs import check_count, check_generator, check_real
from companion.models.rbm.annealing import coins
from companion.models.rbm.model import RBM, bernoulli, dot, row
from companion.models.rbm.units import softplus

__all__ = ["contrastive_step", "contrastive_update"]

_Phases: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]  # x, P(h = 1 | x), v, P(h = 1 | v)


def contrastive_step(
    rbm: RBM,
    v: Tensor,
    num_steps: int,
    hidden_probs: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `RBM.contrastive_step` does."""
    with torch.no_grad():
        phases, (of_data, of_chains) = _both_phases(
            rbm, v, num_steps, hidden_probs, generator, weigh=True
        )

    def gradients(
        scale: Tensor, x: Tensor, probs: Tensor, v: Tensor, data_probs: Tensor
    ) -> list[Tensor]:
        return _gradients(rbm, _centred(rbm, (x, probs, v, data_probs)), scale)

    loss = with_gradients(
        (of_chains - of_data).sum(), list(rbm.parameters()), gradients, saved=phases
    )
    return loss, phases[0], phases[1]


@torch.no_grad()
def contrastive_update(
    rbm: RBM,
    v: Tensor,
    rate: float,
    num_steps: int,
    hidden_probs: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """What `RBM.contrastive_update` does."""
    check_real("rate", rate, minimum=0.0)
    weights, b, c = rbm.parameters(recurse=False)
    wide = torch.promote_types(weights.dtype, torch.float32)  # a sum of 16-bit numbers overflows
    total = weights.sum(dtype=wide) + b.sum(dtype=wide) + c.sum(dtype=wide)
    if not math.isfinite(total.item()):
        raise FloatingPointError(
            "a parameter is NaN or infinite, so no update was made: go back to a state that was "
            "good, and take a lower rate"
        )
    phases, _ = _both_phases(rbm, v, num_steps, hidden_probs, generator, draw=coins)
    x, probs, v, data_probs = centred = _centred(rbm, phases)
    if x.ndim == v.ndim == 2 and x.dtype == weights.dtype:
        in_place = _may_add_in_place(weights, x, v)
        for states, hidden, share in ((v, data_probs, rate / len(v)), (x, probs, -rate / len(x))):
            if in_place:
                weights.addmm_(states.T, hidden, alpha=share)
            else:
                weights.add_(states.T @ hidden, alpha=share)
            b.add_(states.sum(0), alpha=share)
            c.add_(hidden.sum(0), alpha=share)
    else:  # a batch of machines, or 16-bit products
        with torch.autocast(weights.device.type, enabled=False):  # as `backward` runs
            gradients = _gradients(rbm, centred, 1.0)
        for parameter, g in zip((weights, b, c), gradients, strict=True):
            parameter.sub_(g, alpha=rate)
    return phases[0], phases[1]


def _both_phases(
    rbm: RBM,
    v: Tensor,
    num_steps: int,
    hidden_probs: Tensor | None,
    generator: torch.Generator | None,
    *,
    draw: Callable[[Tensor, torch.Generator | None], Tensor] = bernoulli,
    weigh: bool = False,
) -> tuple[_Phases, list[Tensor]]:
    """Both phases' states and hidden units, and their mean log-probabilities where it has to weigh.

    The data's comes first, then the chains'; to be called without gradients.
    """
    weights, b, c = rbm.W, rbm.b, rbm.c
    check_count("num_steps", num_steps)
    check_generator(generator, weights.device)
    v = rbm._check_units("v", v, rbm.num_visible)
    if v.ndim < 2:
        raise ValueError(f"v must be a matrix (n, {rbm.num_visible}), got {tuple(v.shape)}")
    if hidden_probs is not None:
        _check_probs(hidden_probs, rbm)
    log_probs = []
    # In place where it can be: fresh memory for a batch costs as much as the arithmetic.
    data_probs = (v @ weights).add_(row(c))
    if weigh:
        log_probs.append(_mean_log_prob(v, data_probs, b))
    data_probs.sigmoid_()
    probs = data_probs if hidden_probs is None else hidden_probs
    for step in range(num_steps):
        x = (draw(probs, generator) @ weights.mT).add_(row(b)).sigmoid_()
        x = draw(x, generator)
        probs = (x @ weights).add_(row(c))
        if weigh and step == num_steps - 1:
            log_probs.append(_mean_log_prob(x, probs, b))
        probs.sigmoid_()
    return (x, probs, v, data_probs), log_probs


def _check_probs(probs: Tensor, rbm: RBM) -> None:
    dtypes = (rbm.W.dtype, torch.bfloat16, torch.float16)  # 16 bits come from autocast
    if probs.ndim < 2 or probs.shape[-1] != rbm.num_hidden or probs.dtype not in dtypes:
        raise ValueError(
            f"hidden_probs must be (..., m, {rbm.num_hidden}) of {rbm.W.dtype}, as the last call "
            f"returned it, got {tuple(probs.shape)} of {probs.dtype}"
        )


def _mean_log_prob(x: Tensor, hidden_inputs: Tensor, b: Tensor) -> Tensor:
    return (dot(x, b) + softplus(hidden_inputs).sum(-1)).mean(-1)


def _gradients(rbm: RBM, phases: _Phases, scale: Tensor | float) -> list[Tensor]:
    """The loss's gradients, times a scalar, in the order of `rbm.parameters()`: W and both biases.

    Differences of means, so the biases' do not see whether the states are centred.
    """
    x, probs, v, data_probs = phases
    probs, data_probs = scale * probs, scale * data_probs  # spares a pass over W
    gradients = (
        _mean_products(x, probs, v, data_probs),
        scale * (x.mean(-2) - v.mean(-2)),
        probs.mean(-2) - data_probs.mean(-2),
    )
    # leading dimensions beyond the batch of machines are summed over
    shaped = zip(gradients, rbm.parameters(), strict=True)
    return [g.sum_to_size(p.shape).to(p.dtype) for g, p in shaped]


def _centred(rbm: RBM, phases: _Phases) -> _Phases:
    x, probs, v, data_probs = phases
    return *rbm._centre(x, probs), *rbm._centre(v, data_probs)


def _mean_products(x: Tensor, x_probs: Tensor, v: Tensor, v_probs: Tensor) -> Tensor:
    """The difference of the mean outer products, `(..., n, D), (..., n, H) -> (..., D, H)`."""
    product = x.mT @ x_probs
    v, v_probs = v.to(product.dtype), v_probs.to(product.dtype)
    if x.ndim == v.ndim == 2 and _may_add_in_place(product, x, v):
        return product.addmm_(v.mT, v_probs, beta=1.0 / len(x), alpha=-1.0 / len(v))
    return product / x.shape[-2] - v.mT @ v_probs / v.shape[-2]


def _may_add_in_place(weights: Tensor, x: Tensor, v: Tensor) -> bool:
    """Whether rows are few: in place, some shapes add and round at W's size once for each row."""
    return max(len(x), len(v)) <= min(weights.shape)
