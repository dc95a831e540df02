"""Both phases of contrastive learning in one call, with the fewest products.

The gradient of `mean log p~(x) - mean log p~(v)` needs only the machine's sufficient statistics,

    d/dW = x' P(h = 1 | x) / m - v' P(h = 1 | v) / n,

and sampling `x` has computed most of them. Done apart, a step of CD-1 costs six products of a batch
with W: two to sample, one for each log-density and one for each gradient. Done together it costs
five, since what the hidden units of the data receive is both the first half of the sweep and the
data's statistic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from companion.core import with_gradients
from companion.inputs import check_count, check_generator
from companion.models.rbm.model import RBM, bernoulli, dot, row
from companion.models.rbm.units import softplus

__all__ = ["contrastive_step"]


def contrastive_step(
    rbm: RBM,
    v: Tensor,
    num_steps: int,
    hidden_probs: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `RBM.contrastive_step` does."""
    check_count("num_steps", num_steps)
    check_generator(generator, rbm.W.device)
    v = rbm._check_units("v", v, rbm.num_visible)
    weights, b, c = rbm.W.detach(), rbm.b.detach(), rbm.c.detach()
    # In place where it can be: fresh memory for a batch costs as much as the arithmetic.
    data_probs = (v @ weights).add_(row(c))
    value = -(dot(v, b) + softplus(data_probs).sum(-1)).mean(-1)
    data_probs.sigmoid_()
    probs = data_probs if hidden_probs is None else hidden_probs
    for step in range(num_steps):
        h = bernoulli(probs, generator)
        x = bernoulli((h @ weights.mT).add_(row(b)).sigmoid_(), generator)
        probs = (x @ weights).add_(row(c))
        if step == num_steps - 1:
            value = value + (dot(x, b) + softplus(probs).sum(-1)).mean(-1)
        probs.sigmoid_()
    names, parameters = zip(*rbm.named_parameters(), strict=True)

    def gradients(
        scale: Tensor, x: Tensor, probs: Tensor, v: Tensor, data_probs: Tensor
    ) -> list[Tensor]:
        probs, data_probs = scale * probs, scale * data_probs
        g_weights = _mean_products(x, probs, v, data_probs)
        g_b, g_c = scale * (_mean(x) - _mean(v)), _mean(probs) - _mean(data_probs)
        # leading dimensions beyond the batch of machines are summed over
        shaped = (g.sum_to_size(p.shape) for g, p in ((g_weights, weights), (g_b, b), (g_c, c)))
        named = rbm._gradients(*(g.to(weights.dtype) for g in shaped))
        return [named[name] for name in names]

    saved = (x, probs, v, data_probs)
    return with_gradients(value.sum(), parameters, gradients, saved=saved), x, probs


def _mean_products(x: Tensor, x_probs: Tensor, v: Tensor, v_probs: Tensor) -> Tensor:
    """The difference of the mean outer products, `(..., n, D), (..., n, H) -> (..., D, H)`."""
    if x.ndim == v.ndim == 2:
        product = x.T @ x_probs
        v, v_probs = v.to(product.dtype), v_probs.to(product.dtype)
        return product.addmm_(v.T, v_probs, beta=1.0 / len(x), alpha=-1.0 / len(v))
    return x.mT @ x_probs / x.shape[-2] - v.mT @ v_probs / v.shape[-2]


def _mean(x: Tensor) -> Tensor:
    """The mean over the rows, `(..., n, units) -> (..., units)`, faster as a product."""
    return x.new_full((x.shape[-2],), 1.0 / x.shape[-2]) @ x
