"""Noise-contrastive estimation: tell data from noise whose density is known.

Mix one part of data with nu parts of noise of density q. If data have the density p, a point u is a
datum with log-odds

    G(u) = log p(u) - log q(u) - log nu.

Logistic regression finds these log-odds; with `log p = log p~ - log_z` and q known it finds the
model, and log Z as one parameter more. The density of the noise must be in the log-odds: a
classifier without it learns the ratio p/q, which is no density.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from companion.inputs import check_count, check_generator, check_real, draw
from companion.objectives.rows import check_rows

__all__ = ["noise_contrastive"]


def noise_contrastive(
    model: Any,
    v: Tensor,
    noise: Any,
    *,
    log_z: Tensor | float,
    noise_ratio: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Noise-contrastive estimation (Gutmann and Hyvärinen 2010), with fresh noise at every call.

        mean_v softplus(-G(v)) + nu mean_u softplus(G(u)),       u ~ q
        G(u) = log p~(u) - log_z - log q(u) - log nu

    Given enough data, the minimum over the model *and* `log_z` is the data's density, with
    `log_z = log Z`, if q is positive wherever the data are. Unlike maximum likelihood this may
    treat the normaliser as free. With nu the gradient approaches that of the likelihood, the
    difference falling as 1 / nu, and the closer the noise is to the data, the fewer it takes. Noise
    that is told apart at a glance teaches nothing: far from the data all its terms vanish.

    Args:
        model: anything with `log_prob`, `(..., D) -> (...)`; binary or continuous.
        v: data, `(..., n, D)`; leading dimensions are those of the model.
        noise: q, a `torch.distributions` object over one row (such as `Independent(Bernoulli(p),
            1)`), or an object with `sample(n, generator=)` and `log_prob`. It is not learned.
        log_z: the model's log normaliser, usually a parameter that is learned with the model's own;
            a scalar, a tensor of the leading dimensions, or a number that is held fixed.
        noise_ratio: nu, noise points for each row.
        generator: source of randomness for the noise.

    Returns:
        scalar loss, the sum over leading dimensions, at 1 + nu log-densities a row. With
        `G = 0` everywhere it is `(1 + nu) log 2`.

    Raises:
        ValueError: a bad `v`; a q over anything but rows of D entries, or zero at a datum;
            `noise_ratio` below 1; a `log_z` of another shape.
        TypeError: a noise that cannot be drawn from.

    Reference: Gutmann and Hyvärinen (2010), *Noise-contrastive estimation: a new estimation
    principle for unnormalized statistical models*; (2012), *Noise-contrastive estimation of
    unnormalized statistical models, with applications to natural image statistics*.

    >>> from torch.distributions import Bernoulli, Independent
    >>> from companion.models.rbm import RBM
    >>> rbm = RBM(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> coins = Independent(Bernoulli(torch.full((3,), 0.5, dtype=torch.float64)), 1)
    >>> log_z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    >>> g = torch.Generator().manual_seed(0)
    >>> loss = noise_contrastive(rbm, torch.tensor([[1, 0, 1]]), coins, log_z=log_z, generator=g)
    >>> loss.backward()
    >>> bool(log_z.grad < 0)                             # log Z is above 0: 5 log 2
    True
    """
    check_rows(v)
    check_generator(generator, v.device)
    check_count("noise_ratio", noise_ratio)
    *lead, n, dim = v.shape
    if isinstance(log_z, Tensor):
        if log_z.shape not in (torch.Size(), torch.Size(lead)):
            raise ValueError(
                f"log_z must be a scalar or have the leading dimensions {tuple(lead)} of v, got "
                f"{tuple(log_z.shape)}"
            )
        log_z = log_z[..., None]
    else:
        check_real("log_z", log_z)
    u = draw(noise, math.prod(lead) * noise_ratio * n, generator=generator).detach()
    if u.shape[1:] != (dim,):
        raise ValueError(
            f"noise must be drawn in rows of {dim} entries, got shape {tuple(u.shape[1:])}; a "
            "torch distribution needs batch shape () and event shape (D,): see Independent"
        )
    u = u.view(*lead, -1, dim)
    of_data = softplus(-_log_odds(model, v, noise, log_z, noise_ratio, u.dtype)).mean(-1)
    of_noise = softplus(_log_odds(model, u, noise, log_z, noise_ratio, u.dtype)).mean(-1)
    return (of_data + noise_ratio * of_noise).sum()


def _log_odds(
    model: Any, x: Tensor, noise: Any, log_z: Tensor | float, ratio: float, dtype: torch.dtype
) -> Tensor:
    """G at each row, `(..., n, D) -> (..., n)`; the noise sees `x` in the dtype of its draws."""
    log_prob: Tensor = model.log_prob(x)
    if log_prob.shape != x.shape[:-1]:
        raise ValueError(
            f"log_prob must give a number a row, {tuple(x.shape[:-1])}, got "
            f"{tuple(log_prob.shape)}; a batch of models needs data with its leading dimensions"
        )
    with torch.no_grad():
        log_q = noise.log_prob(x.to(dtype))
    if log_q.shape != log_prob.shape:
        raise ValueError(
            f"noise.log_prob must give a number a row, {tuple(log_prob.shape)}, got "
            f"{tuple(log_q.shape)}; a torch distribution needs Independent(..., 1)"
        )
    if not torch.isfinite(log_q).all():
        raise ValueError(
            "noise.log_prob is not finite at a row, so nothing can be learned there: the noise "
            "must be possible wherever the data are"
        )
    return log_prob - log_z - log_q - math.log(ratio)
