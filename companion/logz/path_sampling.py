"""Log Z from draws at every beta of a ladder: thermodynamic integration and stepping stones.

Chains stand at the betas `0 = b_0 < ... < b_{R-1} = 1` of an annealing path. With
`U_beta(x) = d/dbeta log p~_beta(x)`, which on a geometric path is `log target - log base`,

    log Z_1 - log Z_0 = integral_0^1 E_beta[U_beta(x)] dbeta          thermodynamic integration
                      = sum_i log E_i[p~_{i+1}(x) / p~_i(x)]          stepping stones

Along a geometric path `E_beta[U]` never falls, since its own derivative is the variance of U.

Thermodynamic integration replaces the integral by a sum: it is off by a discretisation error, that
more draws don't make smaller. Stepping stones have none, but each logarithm is too low by about
half the variance of its mean. Both take the chains' word for the law at every beta: if these are
stuck, both are smooth, precise and wrong.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from companion.core import AnnealingPath, LogZ
from companion.importance import effective_sample_size
from companion.logz.ladder import collect
from companion.tempering import check_betas
from companion.tempering.parallel import stones, to_next

__all__ = ["stepping_stone", "thermodynamic_integration"]

_FEWEST = 10.0  # effective draws of a step of the ladder


# ---------------------------------------------------------------- thermodynamic integration


@torch.no_grad()
def thermodynamic_integration(
    path: AnnealingPath,
    betas: Tensor | Sequence[float],
    draws: Tensor | int,
    *,
    num_chains: int = 16,
    warmup: int = 100,
    thin: int = 1,
    swap: bool = True,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> LogZ:
    """Estimate log Z by integrating `m(beta) = E_beta[U]` over beta.

    The draws at each beta give m there, and also its slope `s = Var[U] + E[dU/dbeta]` (the variance
    alone for a geometric path). The rule is the corrected trapezoid's, the integral of the cubic
    with these values and slopes at both ends of an interval of length h,

        h (m_i + m_{i+1}) / 2 + h^2 (s_i - s_{i+1}) / 12,

    whose error falls as the fourth power of the number of intervals. `std_error` is the Monte Carlo
    error alone, from the spread of the independent chains: give ten or more. It is NaN for one.
    `discretization` is what the rule is off by: a third of what changes when neighbouring intervals
    are joined (the larger one of the two ways to pair them), or, of a single interval, the
    correction. The factor would be a third if the error fell as the square; with a smooth m it is
    five times too cautious.

    Args:
        path: any `AnnealingPath` whose log-density autograd can differentiate in beta.
        betas: the ladder, at least two, ascending from 0 to 1. Where m is steep (near 0, for a
            vague prior), they should be close.
        draws: how many to make of each chain, or the draws of `sample_ladder`.
        num_chains: as in `sample_ladder`, as are the other arguments; not used if there are draws.
            What is kept of a draw are two numbers a rung and a chain.

    Returns:
        A `LogZ` with `discretization`.

    Raises:
        ValueError: betas that do not ascend from 0 to 1, draws of another shape, a derivative that
            is not finite (above all at beta = 0, where the target is zero at a draw of the base),
            or none at all.
        TypeError: a path that is none.

    Warns:
        UserWarning: a discretisation error above the standard error; a variance of U under the base
            that hangs on one draw, as an infinite one does.

    Reference: Gelman and Meng (1998), *Simulating normalizing constants: from importance sampling
    to bridge sampling to path sampling*; Friel, Hurn and Wyse (2014), *Improving power posterior
    estimation of statistical evidence*, for the correction.

    >>> from companion.models.ising import Ising
    >>> model, g = Ising(4, 4, coupling=0.4), torch.Generator().manual_seed(0)
    >>> betas = torch.linspace(0.0, 1.0, 9)
    >>> log_z = thermodynamic_integration(model.annealing_path(), betas, 200, generator=g)
    >>> print(f"{log_z.value:.2f} +/- {log_z.std_error:.2f}, exact {model.log_z().value:.2f}")
    14.59 +/- 0.02, exact 14.56
    """
    betas = check_betas(betas, torch.device("cpu"), from_zero=True)
    run: dict[str, Any] = {"num_chains": num_chains, "warmup": warmup, "thin": thin, "swap": swap}
    run |= {"generator": generator, "progress": progress}
    first, second = collect(path, betas, draws, _derivatives, run)
    _check_derivatives(first, betas)
    betas = betas.to(first.device)
    num_chains = first.shape[1]
    centre = first.mean((1, 2), keepdim=True)
    value = first.mean(2)  # of each chain
    slope = ((first - centre).square() + second).mean(2)
    integral = _integrals(betas, value, slope).sum(0)
    spread = integral.std() if num_chains > 1 else torch.nan
    log_z = LogZ(
        integral.mean() + torch.as_tensor(path.base_log_z, device="cpu").double().to(integral),
        spread / math.sqrt(num_chains),
        discretization=_discretization(betas, value.mean(1), slope.mean(1)),
    )
    _warn(log_z, betas, first[0] - centre[0])
    return log_z


def _derivatives(at: Callable[[Tensor], Tensor], rows: Tensor, shape: torch.Size) -> Tensor:
    """First and second derivative in beta of the log-density at each point, `(2, *shape)`."""
    with torch.enable_grad():
        beta = rows.expand(shape).clone().requires_grad_()
        value = at(beta)
        if not value.requires_grad:
            raise ValueError(
                "the path's log-density has no derivative in beta: its log_prob and profile must "
                "compute with beta as a tensor, and outside of torch.no_grad()"
            )
        (first,) = torch.autograd.grad(value.sum(), beta, create_graph=True)
        second = torch.zeros_like(first)
        if first.requires_grad:
            (second,) = torch.autograd.grad(first.sum(), beta, materialize_grads=True)
    first = first.detach()
    if first.isnan().any():  # as autograd has it also where the target is zero: 0 times infinity
        zero = first.isnan() & (at(torch.ones_like(rows)) == -math.inf)
        first = torch.where(zero, -math.inf, first)
    return torch.stack([first, second.detach()])


def _integrals(betas: Tensor, value: Tensor, slope: Tensor, step: int = 1) -> Tensor:
    """The integrals from each beta to the one `step` further, by Hermite's cubic."""
    h = (betas[step:] - betas[:-step]).reshape(-1, *[1] * (value.ndim - 1))
    trapezoid = 0.5 * h * (value[step:] + value[:-step])
    return trapezoid + h.square() / 12.0 * (slope[:-step] - slope[step:])


def _joined(betas: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """By how much two neighbouring intervals differ from the one that they make up, `(R - 2,)`."""
    single = _integrals(betas, value, slope)
    return _integrals(betas, value, slope, 2) - single[1:] - single[:-1]


def _discretization(betas: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    if len(betas) == 2:
        return (slope[0] - slope[1]).abs() / 12.0
    change = _joined(betas, value, slope)
    return torch.stack([change[::2].sum(), change[1::2].sum()]).abs().max() / 3.0


def _check_derivatives(first: Tensor, betas: Tensor) -> None:
    bad = ~first.isfinite()
    if not bad.any():
        return
    rung = int(bad.flatten(1).any(1).nonzero()[0])
    hint = "look at the log-density there"
    if rung == 0 and (first[0][bad[0]] == -math.inf).all():
        hint = (
            "the base puts mass where the target has none, and log Z is no smooth function of "
            "beta; take a base that does not, or stepping_stone, which bears it"
        )
    raise ValueError(
        f"the derivative in beta is not finite at {int(bad[rung].sum())} of {bad[rung].numel()} "
        f"draws at beta = {float(betas[rung]):.3g}: {hint}"
    )


def _warn(log_z: LogZ, betas: Tensor, at_base: Tensor) -> None:
    assert log_z.discretization is not None
    if log_z.discretization > log_z.std_error:
        warnings.warn(
            f"the discretisation error, about {float(log_z.discretization):.2g}, exceeds the "
            f"standard error, {float(log_z.std_error):.2g}, and is not part of it: take more than "
            f"{len(betas)} betas, close where the integrand is steep, or stepping_stone",
            stacklevel=4,  # seen from the caller of the decorated function
        )
    square = at_base.square()
    share = float(square.max() / square.sum())  # NaN, and no news, where all are the same
    if square.numel() >= 400 and share > 0.25:
        warnings.warn(
            f"one of {square.numel()} draws of the base makes up {share:.0%} of the variance of "
            "the derivative in beta, which may be infinite there: neither error can be trusted. "
            "Take a base with lighter tails than the target, or stepping_stone",
            stacklevel=4,
        )


# ---------------------------------------------------------------- stepping stones


@torch.no_grad()
def stepping_stone(
    path: AnnealingPath,
    betas: Tensor | Sequence[float],
    draws: Tensor | int,
    *,
    num_chains: int = 16,
    warmup: int = 100,
    thin: int = 1,
    swap: bool = True,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> LogZ:
    """Estimate log Z by stepping stones: importance sampling from each beta to the next one.

    The mean of `p~_{i+1}(x) / p~_i(x)` over the draws at `b_i` estimates `Z_{i+1} / Z_i`. These are
    the increments that annealed importance sampling and `smc` accumulate; here every beta has
    chains of its own, and no mean has to be carried along. The value is too low by about half its
    variance. The standard error comes from the spread of the independent chains: give ten or more.
    It is NaN for one chain.

    Args:
        path: any `AnnealingPath`.
        betas: the ladder, at least two, ascending from 0 to 1.
        draws: how many to make of each chain, or the draws of `sample_ladder`. Those at beta = 1
            are not used.
        num_chains: as in `sample_ladder`, as are the other arguments; not used if there are draws.
            What is kept of a draw is one number a rung and a chain.

    Returns:
        A `LogZ`; its `ess` is the smallest effective sample size of a step of the ladder, by the
        weights alone, as if draws were independent.

    Raises:
        ValueError: betas that do not ascend from 0 to 1, draws of another shape, a step of the
            ladder in which every weight is zero; of draws that are given, a log-density that is NaN
            or plus infinity, or a density of zero at a draw's own beta.
        TypeError: a path that is none.

    Warns:
        UserWarning: steps of the ladder so long that few draws have all the weight.

    Reference: Xie, Lewis, Fan, Kuo and Chen (2011), *Improving marginal likelihood estimation for
    Bayesian phylogenetic model selection*.

    >>> from companion.models.ising import Ising
    >>> model, g = Ising(4, 4, coupling=0.4), torch.Generator().manual_seed(0)
    >>> betas = torch.linspace(0.0, 1.0, 9)
    >>> log_z = stepping_stone(model.annealing_path(), betas, 200, generator=g)
    >>> print(f"{log_z.value:.2f} +/- {log_z.std_error:.2f}, exact {model.log_z().value:.2f}")
    14.58 +/- 0.02, exact 14.56
    """
    betas = check_betas(betas, torch.device("cpu"), from_zero=True)
    run: dict[str, Any] = {"num_chains": num_chains, "warmup": warmup, "thin": thin, "swap": swap}
    run |= {"generator": generator, "progress": progress}
    given = isinstance(draws, Tensor)
    log_weights = collect(path, betas, draws, _checked if given else _to_next, run)
    if given:
        _check_draws(log_weights, betas)
    ess = effective_sample_size(log_weights.flatten(1), 1)
    num = log_weights[0].numel()
    if (ess < min(_FEWEST, 0.5 * num)).any():
        i = int(ess.argmin())
        warnings.warn(
            f"{int((ess < _FEWEST).sum())} of {len(ess)} steps of the ladder are too long: of the "
            f"{num} draws at beta = {float(betas[i]):.3g} only {float(ess[i]):.1f} are effective "
            f"at {float(betas[i + 1]):.3g}. Log Z may be far too low; take more betas there",
            stacklevel=3,  # seen from the caller of the decorated function
        )
    log_z = stones(path, log_weights.logsumexp(2) - math.log(log_weights.shape[2]))
    return LogZ(log_z.value, log_z.std_error, ess=ess.min())


def _to_next(at: Callable[[Tensor], Tensor], rows: Tensor, shape: torch.Size) -> Tensor:
    return to_next(at(rows), at(torch.cat([rows[1:], rows[-1:]])))


def _checked(at: Callable[[Tensor], Tensor], rows: Tensor, shape: torch.Size) -> Tensor:
    """The log weights of `_to_next`, but NaN where no draw of that beta can have them."""
    own, above = at(rows)[:-1], at(torch.cat([rows[1:], rows[-1:]]))[:-1]
    return torch.where(own.isfinite() & (above < math.inf), above - own, math.nan)


def _check_draws(log_weights: Tensor, betas: Tensor) -> None:
    wrong = log_weights.isnan()
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"{int(wrong.sum())} of {wrong.numel()} draws have density zero at their own beta, or "
            "a log-density there or at the next beta that is NaN or plus infinity; the first at "
            f"(rung, chain, draw) = {first}, beta = {float(betas[first[0]]):.3g}: are they draws "
            "of this path, in the order of betas?"
        )
