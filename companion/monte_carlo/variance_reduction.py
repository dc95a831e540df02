"""Smaller errors from as many evaluations: control variates, antithetic points, strata, nets.

Each function returns an `Estimate` whose standard error follows from what is independent in its
design, and only from that: pairs rather than points, values within a stratum, whole nets. Except
for `control_variates`, which takes values that you have, the integrand f is a function on the open
unit cube `(0, 1)^d`; compose it with inverse distribution functions to integrate under other laws.
Points are float64, on the generator's device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from companion.inputs import check_count, check_generator
from companion.monte_carlo.estimates import Estimate, as_float64, estimate, evaluate, expectation

__all__ = ["antithetic", "control_variates", "quasi_monte_carlo", "stratified"]

Integrand = Callable[[Tensor], Tensor]


# ---------------------------------------------------------------- control variates


def control_variates(values: Tensor, controls: Tensor, means: Tensor) -> Estimate:
    """Estimate a mean with the help of other quantities, whose means are known.

    With f_i the values, c_i the controls and mu their means, the estimate is
    `mean(f) - b . (mean(c) - mu)`, where b is the least-squares slope of f on c. For n large its
    variance is `(1 - R^2)` times that of `mean(f)`, with R the multiple correlation of f and c, and
    no other b does better. That b comes from the same draws has two prices, both of order 1/n:

    - a bias, `-E[e (c - mu)^2] / (n Var c)` to leading order for one control, where e is the
      residual of f after regression on c; it is zero if the regression is linear, as for jointly
      normal f and c;
    - a larger variance, by the factor `(n - 2) / (n - k - 2)` for k controls in the normal case.

    The standard error is that of the regression line at mu,
    `s^2 (1/n + (mean(c) - mu)^T S^-1 (mean(c) - mu))`, with S the controls' centred sums of squares
    and products and `s^2` the residual sum of squares over `n - 1 - k`. In the normal case its
    square is unbiased for every n, and the error divided by it has Student's law with `n - 1 - k`
    degrees of freedom.

    Args:
        values: f_i, `(n, *batch)`, independent along the first dimension.
        controls: c_i, `(n, *batch, k)`, from the same draws.
        means: mu, the controls' exact means, `(k,)` or `(*batch, k)`.

    Returns:
        An `Estimate` of shape `(*batch)`, without gradient.

    Raises:
        TypeError: an argument that is not a tensor of real numbers.
        ValueError: shapes that do not fit, n below `k + 2`, NaN or infinity, a control that is
            constant or a linear combination of others.

    Reference: Lavenberg and Welch (1981), *A perspective on the use of control variables to
    increase the efficiency of Monte Carlo simulations*.

    >>> u = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> for found in estimate(u.exp()), control_variates(u.exp(), u[:, None], torch.tensor([0.5])):
    ...     print(f"{found.value:.4f} +/- {found.std_error:.4f}")                  # e - 1 = 1.7183
    1.7171 +/- 0.0156
    1.7182 +/- 0.0020
    """
    f, c, mu = (
        as_float64(name, x)
        for name, x in (("values", values), ("controls", controls), ("means", means))
    )
    _check_controls(f, c, mu)
    n, k = len(f), c.shape[-1]
    f = f.movedim(0, -1)  # (*batch, n)
    c = c.movedim(0, -2)  # (*batch, n, k)
    f_mean, c_mean = f.mean(-1), c.mean(-2)
    f, c = f - f_mean[..., None], c - c_mean[..., None, :]
    # Orthogonal columns, c = q r: the slopes are r^-1 q^T f, and S^-1 is r^-1 r^-T.
    q, r = torch.linalg.qr(c)
    _check_rank(r, c, c_mean, controls.dtype)
    gap = torch.linalg.solve_triangular(r.mT, (c_mean - mu)[..., None], upper=False)[..., 0]
    slopes = (q * f[..., None]).sum(-2)
    residuals = f - (q * slopes[..., None, :]).sum(-1)
    variance = residuals.square().sum(-1) / (n - 1 - k)
    std_error = (variance * (1.0 / n + gap.square().sum(-1))).sqrt()
    return Estimate(f_mean - (slopes * gap).sum(-1), std_error, n)


def _check_controls(f: Tensor, c: Tensor, mu: Tensor) -> None:
    if f.ndim == 0 or c.shape[:-1] != f.shape:
        raise ValueError(
            f"values of shape {tuple(f.shape)} need controls of that shape and one more dimension, "
            f"(n, *batch, k), got {tuple(c.shape)}; a single control is controls[..., None]"
        )
    n, k = len(f), c.shape[-1]
    if mu.shape not in (c.shape[-1:], c.shape[1:]):
        raise ValueError(
            f"means must be {tuple(c.shape[-1:])} or {tuple(c.shape[1:])}, one a control, got "
            f"{tuple(mu.shape)}"
        )
    if n < k + 2:
        raise ValueError(f"{k} controls need at least {k + 2} draws, got {n}")


def _check_rank(r: Tensor, c: Tensor, c_mean: Tensor, dtype: torch.dtype) -> None:
    """Raise unless each control has a part that the mean and the controls before it lack."""
    eps = torch.finfo(dtype if dtype.is_floating_point else torch.float64).eps
    spread = c.square().mean(-2).sqrt()
    left = r.diagonal(dim1=-2, dim2=-1).abs() / math.sqrt(c.shape[-2])
    constant = spread <= 100 * eps * c_mean.abs()
    for wrong, name in (
        (constant, "is constant"),
        (~constant & (left <= 100 * eps * spread), "is a linear combination of those before it"),
    ):
        if wrong.any():
            *problem, control = wrong.nonzero()[0].tolist()
            where = f" in problem {tuple(problem)}" if problem else ""
            raise ValueError(
                f"control {control}{where} {name}: it tells nothing new, and the slopes are not "
                "determined; leave it out"
            )


# ---------------------------------------------------------------- points of the unit cube

_TINY = 2.0**-53  # keeps 0 and 1 out, where inverse distribution functions are infinite


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Independent uniform numbers in float64, on the generator's device."""
    check_generator(generator, getattr(generator, "device", torch.device("cpu")))
    device = None if generator is None else generator.device
    return torch.rand(shape, dtype=torch.float64, device=device, generator=generator)


def _interior(u: Tensor) -> Tensor:
    return u.clamp(min=_TINY, max=1.0 - _TINY)


class _Cube:
    """The uniform law on the unit cube, as a sampler."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return _interior(_uniform((n, self.dim), generator))


def antithetic(
    f: Integrand, dim: int, num_pairs: int, *, generator: torch.Generator | None = None
) -> Estimate:
    """Estimate the integral of f over the unit cube from pairs of opposite points, u and 1 - u.

    The two values of a pair are dependent, the means of different pairs are not: the standard error
    is that of the pairs' means. With rho the correlation of f(u) and f(1 - u), the variance is
    `(1 + rho)` times that of as many independent points: less if f is monotone in each coordinate,
    twice as much if f is even, `f(u) = f(1 - u)`.

    For the reflection z, -z of a symmetric law compose f with its quantile function: for the normal
    law `torch.special.ndtri(1 - u)` is `-torch.special.ndtri(u)`.

    Args:
        f: the integrand, `(m, dim) -> (m, *batch)` for any m.
        dim: dimension of the cube.
        num_pairs: number of pairs, at least 2; f is evaluated at twice as many points.
        generator: source of randomness.

    Returns:
        An `Estimate` of shape `(*batch)`; its `num_samples` are the pairs.

    Raises:
        ValueError: a count out of range, an f that loses the sample dimension or gives NaN or
            infinity.

    Reference: Hammersley and Morton (1956), *A new Monte Carlo technique: antithetic variates*.

    >>> g = torch.Generator().manual_seed(0)
    >>> found = antithetic(lambda u: u.exp().prod(1), 1, 500, generator=g)         # e - 1 = 1.7183
    >>> print(f"{found.value:.4f} +/- {found.std_error:.4f}")
    1.7153 +/- 0.0028
    """
    check_count("dim", dim)
    check_count("num_pairs", num_pairs, minimum=2)

    def pair_mean(u: Tensor) -> Tensor:
        return (evaluate(f, u, "f(u)") + evaluate(f, 1.0 - u, "f(1 - u)")) / 2.0

    return expectation(pair_mean, _Cube(dim), num_pairs, generator=generator)


_MOST_POINTS = 10**8


@torch.no_grad()
def stratified(
    f: Integrand,
    dim: int,
    num_strata_per_dim: int,
    per_stratum: int = 2,
    *,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Estimate the integral of f over the unit cube from random points in each of its small cubes.

    Each axis is cut into m equal parts, and r independent points are drawn in each of the `m^d`
    strata. With sigma_s the standard deviation of f within stratum s, the variance is
    `sum_s sigma_s^2 / (m^(2d) r)`: that of as many independent points, less the variance of the
    strata's means. The standard error takes each stratum's own sample variance, divisor r - 1, and
    its square is unbiased.

    Args:
        f: the integrand, `(points, dim) -> (points, *batch)`.
        dim: d.
        num_strata_per_dim: m; f is evaluated at `m^d r` points.
        per_stratum: r, at least 2: one point has no variance.
        generator: source of randomness.

    Returns:
        An `Estimate` of shape `(*batch)`; its `num_samples` are the points.

    Raises:
        ValueError: a count out of range, more than 100,000,000 points, an f that loses the sample
            dimension or gives NaN or infinity.

    Reference: Owen (2013), *Monte Carlo theory, methods and examples*, chapter 8.

    >>> g = torch.Generator().manual_seed(0)
    >>> found = stratified(lambda u: u.exp().prod(1), 1, 500, generator=g)         # e - 1 = 1.71828
    >>> print(f"{found.value:.6f} +/- {found.std_error:.6f}")
    1.718276 +/- 0.000033
    """
    d = check_count("dim", dim)
    m = check_count("num_strata_per_dim", num_strata_per_dim)
    r = check_count("per_stratum", per_stratum, minimum=2)
    if d * math.log(m) + math.log(r) > math.log(_MOST_POINTS):
        raise ValueError(
            f"{m}^{d} strata of {r} points are too many to evaluate; stratify the few coordinates "
            "that matter most, or use quasi_monte_carlo"
        )
    u = _uniform((r, m**d, d), generator)
    strata = torch.arange(m**d, device=u.device)[:, None]
    corner = strata // m ** torch.arange(d, device=u.device) % m  # the digits of s in base m
    y = evaluate(f, _interior((corner + u) / m).reshape(-1, d), "f(u)")
    variance, mean = torch.var_mean(y.reshape(r, m**d, *y.shape[1:]), 0)
    return Estimate(mean.mean(0), (variance.mean(0) / (r * m**d)).sqrt(), r * m**d)


Engine = Literal["sobol", "halton"]


@torch.no_grad()
def quasi_monte_carlo(
    f: Integrand,
    dim: int,
    num_points: int,
    *,
    engine: Engine = "sobol",
    num_replicates: int = 16,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Estimate the integral of f over the unit cube from independently scrambled point sets.

    A scrambled point set covers the cube evenly, and each of its points is uniform: the mean of f
    over it is unbiased. Its points depend on each other, so that their spread says nothing of its
    error; the standard error is that of the means of R independently scrambled sets. With n points
    a set, the variance falls faster than `1/n`, and like `1/n^3` up to logarithms where f is
    smooth. In few dimensions a smooth f has means with heavy tails: most sets are far better than
    that, a few make up the variance, and the standard error from R of them varies accordingly.

    Args:
        f: the integrand, `(num_points, dim) -> (num_points, *batch)`.
        dim: dimension of the cube.
        num_points: n, the points of one set; for "sobol" a power of two, since other numbers of its
            points are not balanced and converge more slowly.
        engine: "sobol" (Sobol' points with a random linear scramble and digital shift) or "halton"
            (Halton points with randomly permuted digits).
        num_replicates: R, at least 2; f is evaluated at n R points. With few replicates Student's
            law with R - 1 degrees of freedom gives the interval; the normal one of `interval` is
            too short, by a tenth for 16.
        generator: source of randomness.

    Returns:
        An `Estimate` of shape `(*batch)`; its `num_samples` are the replicates.

    Raises:
        ValueError: an unknown engine, a count out of range, for "sobol" a number of points that is
            no power of two, an f that loses the sample dimension or gives NaN or infinity.

    Reference: Owen (1997), *Scrambled net variance for integrals of smooth functions*; Matoušek
    (1998), *On the L2-discrepancy for anchored boxes*; Owen (2022), *On dropping the first Sobol'
    point*.

    >>> g = torch.Generator().manual_seed(0)
    >>> f = lambda u: u.exp().prod(1)                                    # (e - 1)^2 = 2.95249
    >>> found = quasi_monte_carlo(f, 2, 256, generator=g)
    >>> print(f"{found.value:.5f} +/- {found.std_error:.5f}")
    2.95264 +/- 0.00022
    """
    check_count("dim", dim)
    n = check_count("num_points", num_points)
    check_count("num_replicates", num_replicates, minimum=2)
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {', '.join(get_args(Engine))}; got {engine!r}")
    if engine == "sobol" and n & (n - 1):
        raise ValueError(
            f"num_points must be a power of two for Sobol' points, got {n}; take "
            f"{1 << n.bit_length() - 1} or {1 << n.bit_length()}"
        )
    seeds = (_uniform((num_replicates,), generator) * 2**53).long()
    means = [
        evaluate(f, _scrambled(engine, dim, n, seed).to(seeds.device), "f(u)").mean(0)
        for seed in seeds.tolist()
    ]
    return estimate(torch.stack(means))


def _scrambled(engine: Engine, dim: int, n: int, seed: int) -> Tensor:
    from scipy.stats import qmc  # slow to import

    if engine == "halton":
        return _interior(torch.from_numpy(qmc.Halton(dim, seed=seed).random(n)))
    # SciPy's coordinates are left ends of 2^30 cells; in their middle they are also inside (0, 1).
    return torch.from_numpy(qmc.Sobol(dim, bits=30, seed=seed).random(n)) + 2.0**-31
