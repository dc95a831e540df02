"""Denoising score matching, and what a score of noisy data is good for.

Add noise to data, `x = v + sigma e` with e standard normal. What comes out has the smoothed density
`p_sigma`, the data's law convolved with N(0, sigma^2). Its score says where the noise came from
(Tweedie's formula, as told by Robbins 1956):

    E[v | x] = x + sigma^2 grad log p_sigma(x)

so that predicting the noise by least squares learns the score, without second derivatives. The
score learned is that of p_sigma, not that of the data. The target must be the clean datum, or its
noise: least squares towards the noisy point learns to do nothing, which is a score of zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from companion.inputs import check_count, check_finite, check_generator, check_real
from companion.objectives.rows import check_rows
from companion.objectives.score import model_score

__all__ = ["annealed_langevin", "denoising_score_matching", "tweedie"]


def denoising_score_matching(
    model: Any, v: Tensor, sigma: Tensor | float, *, generator: torch.Generator | None = None
) -> Tensor:
    """Denoising score matching (Vincent 2011), with fresh noise at every call.

        mean_v 1/2 |sigma s(x) + e|^2,      x = v + sigma e,      e ~ N(0, I)

    That is `sigma^2 / 2 |s(x) - (v - x) / sigma^2|^2`. Its expectation is sigma^2 times the squared
    distance `1/2 |s - grad log p_sigma|^2` of score matching on noisy data, up to a constant of
    data and noise. The factor sigma^2 makes the values of several scales comparable (Song and Ermon
    2019); for one scale it changes nothing but the size of the gradient.

    Args:
        model: anything with `score`, `(..., D) -> (..., D)`, or `log_prob`, `(..., D) -> (...)`,
            which is then differentiated.
        v: data, `(..., n, D)`, floating; leading dimensions are those of the model.
        sigma: the standard deviation of the noise. A number is one scale, which the model need not
            be told. Of a vector `(scales,)` every row draws one with equal probability, and the
            model is called `model.score(x, sigma)` or `model.log_prob(x, sigma)`, with sigma
            `(..., n)`.
        generator: source of randomness for noise and scales.

    Returns:
        scalar loss, the sum over leading dimensions. A score of zero has loss D / 2.

    Raises:
        ValueError: a bad `v`; a sigma that is not positive, or neither a number nor a vector.
        TypeError: `v` is not floating.

    Reference: Vincent (2011), *A connection between score matching and denoising autoencoders*;
    Song and Ermon (2019), *Generative modeling by estimating gradients of the data distribution*.

    >>> class Normal:                                       # the score of N(0, 1 + sigma^2)
    ...     score = staticmethod(lambda x, sigma: -x / (1 + sigma**2)[..., None])
    >>> v = torch.randn(10**4, 2, generator=torch.Generator().manual_seed(0))
    >>> scales, g = torch.tensor([1.0, 0.5]), torch.Generator().manual_seed(1)
    >>> loss = denoising_score_matching(Normal(), v, scales, generator=g)
    >>> f"{loss:.2f}"                                       # exact: 1/2 + 4/5, halved
    '0.65'
    """
    check_rows(v, floating=True)
    check_generator(generator, v.device)
    if isinstance(sigma, Tensor):
        _check_scales("sigma", sigma)
        index = torch.randint(len(sigma), v.shape[:-1], device=v.device, generator=generator)
        sigma = sigma.to(v)[index]
    else:
        check_real("sigma", sigma, minimum=0.0)
    noise = torch.randn(v.shape, dtype=v.dtype, device=v.device, generator=generator)
    return _denoising_rows(model, v, sigma, noise).mean(-1).sum()


def tweedie(model: Any, x: Tensor, sigma: Tensor | float) -> Tensor:
    """The mean of the clean data given noisy ones, `E[v | x] = x + sigma^2 s(x)`.

    The posterior mean, not a draw: between two modes it lies where there are no data.

    Args:
        model: the score of the noisy data, as for `denoising_score_matching`.
        x: noisy points, `(..., D)`.
        sigma: the noise in `x`: a number, which the model is not told, or a tensor that broadcasts
            over `(...)`, which is handed on.

    Returns:
        `(..., D)`, without gradient.

    Raises:
        ValueError: a sigma that is not positive, or points that are not finite.

    Reference: Robbins (1956), *An empirical Bayes approach to statistics*; Efron (2011), *Tweedie's
    formula and selection bias*.

    >>> class Normal:                                       # data N(0, 1), noise N(0, 1)
    ...     score = staticmethod(lambda x: -x / 2)
    >>> tweedie(Normal(), torch.tensor([[3.0, -1.0]]), 1.0)
    tensor([[ 1.5000, -0.5000]])
    """
    _check_points(x)
    if isinstance(sigma, Tensor):
        _check_positive("sigma", sigma)
        sigma = sigma.to(x).expand(x.shape[:-1])
    else:
        check_real("sigma", sigma, minimum=0.0)
    return x.detach() + _of_units(sigma) ** 2 * _score(model, x, sigma).detach()


def annealed_langevin(
    model: Any,
    sigmas: Tensor,
    x: Tensor,
    num_steps: int,
    step_size: float,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Annealed Langevin dynamics (Song and Ermon 2019): sampling from scores, from coarse to fine.

        x <- x + a_i / 2 s(x, sigma_i) + sqrt(a_i) e,      a_i = step_size sigma_i^2 / sigma_last^2

    `num_steps` such steps at each scale. While sigma is large the modes run together and chains
    pass between them; as it falls each of them stays where the weights have put it. Nothing is
    rejected, so what is sampled is biased in three ways: the last density is that of the data with
    noise sigma_last; each scale has so many steps and no more; and the steps are finite. On a
    normal law of variance t the stationary variance is `t / (1 - a / (4 t))`. As the smoothed
    density bends at most like N(0, sigma_i^2), steps are stable for `step_size < 4 sigma_last^2`,
    and with `r = step_size / sigma_last^2` a normal variance is too large by `1 / (1 - r / 4)` at
    most.

    Args:
        model: `score(x, sigma)`, or `log_prob(x, sigma)`, which is differentiated; with sigma
            `(...)`.
        sigmas: scales from the largest to the smallest, `(scales,)`. The largest should be about as
            wide as the data.
        x: starts, `(..., D)`, such as noise of standard deviation `sigmas[0]`.
        num_steps: steps at each scale.
        step_size: a at the smallest scale, in the squared unit of `x`.
        generator: source of randomness.

    Returns:
        the chains' last states, `(..., D)`, without gradient.

    Raises:
        ValueError: scales that are not positive or that rise, a count or step size out of range,
            starts or a score that are not finite.

    Reference: Song and Ermon (2019), *Generative modeling by estimating gradients of the data
    distribution*.

    >>> class Normal:                                       # data N(0, 1)
    ...     score = staticmethod(lambda x, sigma: -x / (1 + sigma**2)[..., None])
    >>> sigmas, g = torch.tensor([3.0, 1.0, 0.3]), torch.Generator().manual_seed(0)
    >>> start = 3 * torch.randn(10**4, 1, generator=g)
    >>> x = annealed_langevin(Normal(), sigmas, start, 50, 0.1, generator=g)
    >>> f"{x.var():.2f}"                                    # 1.09 with its noise, and a little more
    '1.12'
    """
    _check_scales("sigmas", sigmas)
    if (sigmas.diff() > 0).any():
        raise ValueError(f"sigmas must fall from the largest to the smallest, got {sigmas}")
    _check_points(x)
    check_count("num_steps", num_steps)
    check_real("step_size", step_size, minimum=0.0)
    check_generator(generator, x.device)
    x, sigmas = x.detach(), sigmas.detach().to(x)
    for sigma, a in zip(sigmas, step_size * (sigmas / sigmas[-1]) ** 2, strict=True):
        of_rows = sigma.expand(x.shape[:-1])
        for _ in range(num_steps):
            noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            x = x + a / 2 * _score(model, x, of_rows).detach() + a.sqrt() * noise
    return check_finite("the chains' last states", x)


def _check_points(x: Tensor) -> None:
    check_finite("x", x)
    if not x.is_floating_point():
        raise TypeError(f"x must be floating, got {x.dtype}; convert it with .float()")


def _denoising_rows(model: Any, v: Tensor, sigma: Tensor | float, noise: Tensor) -> Tensor:
    """The row's values, `(..., n)`, for given noise."""
    x = v.detach() + _of_units(sigma) * noise
    return (_of_units(sigma) * _score(model, x, sigma) + noise).square().sum(-1) / 2


@torch.enable_grad()
def _score(model: Any, x: Tensor, sigma: Tensor | float) -> Tensor:
    """The score, from a model that is told sigma if it is a tensor."""
    x = x.detach().requires_grad_()
    return model_score(model, x, sigma) if isinstance(sigma, Tensor) else model_score(model, x)


def _of_units(sigma: Tensor | float) -> Tensor | float:
    """`sigma`, which is one number a row, made to broadcast over units."""
    return sigma[..., None] if isinstance(sigma, Tensor) else sigma


def _check_positive(name: str, sigma: Tensor) -> None:
    check_finite(name, sigma)
    if not (sigma > 0).all():
        raise ValueError(f"{name} must be positive, got {sigma}")


def _check_scales(name: str, sigmas: Tensor) -> None:
    _check_positive(name, sigmas)
    if sigmas.ndim != 1:
        raise ValueError(f"{name} must be a vector of scales, got shape {tuple(sigmas.shape)}")
