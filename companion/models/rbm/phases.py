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
from torch.nn.functional import softplus

from companion.core import with_gradients
from companion.inputs import check_count, check_generator
from companion.models.rbm.model import RBM, bernoulli, dot, row

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
    data_inputs = row(c) + v @ weights
    data_probs = torch.sigmoid(data_inputs)
    probs = data_probs if hidden_probs is None else hidden_probs
    for _ in range(num_steps):
        h = bernoulli(probs, generator)
        x = bernoulli(torch.sigmoid(row(b) + h @ weights.mT), generator)
        inputs = row(c) + x @ weights
        probs = torch.sigmoid(inputs)
    value = (dot(x, b) + softplus(inputs).sum(-1)).mean(-1)
    value = value - (dot(v, b) + softplus(data_inputs).sum(-1)).mean(-1)
    g_weights = _mean_product(x, probs) - _mean_product(v, data_probs)
    g_b, g_c = x.mean(-2) - v.mean(-2), probs.mean(-2) - data_probs.mean(-2)
    # leading dimensions beyond the batch of machines are summed over
    shaped = (g.sum_to_size(p.shape) for g, p in ((g_weights, weights), (g_b, b), (g_c, c)))
    gradients = rbm._gradients(*(g.to(weights.dtype) for g in shaped))
    parameters = dict(rbm.named_parameters())
    loss = with_gradients(
        value.sum(), list(parameters.values()), [gradients[name] for name in parameters]
    )
    return loss, x, probs


def _mean_product(v: Tensor, h: Tensor) -> Tensor:
    """The mean over the rows of the outer products, `(..., n, D), (..., n, H) -> (..., D, H)`."""
    return (v / v.shape[-2]).mT @ h
