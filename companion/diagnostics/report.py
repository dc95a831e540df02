"""What a sampler tells of its own trouble, and a table of everything: `print(summary(trace))`."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from companion.core import Trace
from companion.diagnostics.convergence import (
    ess_bulk,
    ess_tail,
    mcse_mean,
    mcse_quantile,
    mcse_sd,
    rhat,
)
from companion.diagnostics.draws import checked_draws, is_constant
from companion.inputs import check_count
from companion.reporting import format_estimate, round_to_error

__all__ = ["Divergences", "Summary", "divergences", "e_bfmi", "summary"]

_LEVELS = (0.05, 0.5, 0.95)
_MAX_ROWS = 20


# ---------------------------------------------------------------- energies and divergences


def e_bfmi(energy: Tensor | Trace) -> Tensor:
    """Estimated Bayesian fraction of missing information of each chain of a Hamiltonian sampler.

    `sum_i (E_i - E_{i-1})^2 / sum_i (E_i - mean E)^2`: how much of the spread of the energy one
    redrawn momentum covers. Independent energies give 2; below some 0.3 the chain diffuses through
    the energies and may not reach the tails. Energies of every step are needed, not thinned ones.

    Args:
        energy: the Hamiltonian after each step, `(chains, draws)`, or a `Trace` of a kernel that
            tells it.

    Returns:
        `(chains,)`, float64; NaN, with a warning, for a chain whose energy is constant.

    Raises:
        ValueError: the trace has no energy, NaN or infinite energies, or another shape.

    Reference: Betancourt (2016), *Diagnosing suboptimal cotangent disintegrations in Hamiltonian
    Monte Carlo*.

    >>> g = torch.Generator().manual_seed(0)
    >>> independent = torch.randn(1, 10_000, generator=g)
    >>> diffusing = torch.randn(1, 10_000, generator=g).cumsum(1)
    >>> print(e_bfmi(torch.cat([independent, diffusing])).round(decimals=1))
    tensor([2., 0.], dtype=torch.float64)
    """
    if isinstance(energy, Trace):
        if "energy" not in energy.stats:
            raise ValueError(
                "this trace has no energy: its kernel is not a Hamiltonian one, or does not tell "
                f"it (it tells {sorted(energy.stats) or 'nothing'})"
            )
        energy = energy.stats["energy"].reshape(energy.accept_prob.numel(), -1)
    if isinstance(energy, Tensor) and energy.ndim != 2:
        raise ValueError(f"expected energies (chains, draws), got shape {tuple(energy.shape)}")
    energy = checked_draws(energy)
    constant = is_constant(energy)
    if constant.any():
        warnings.warn(
            f"the energy of {int(constant.sum())} of {len(constant)} chains is constant, first of "
            f"chain {int(constant.nonzero()[0])}: they have no E-BFMI",
            stacklevel=2,
        )
    spread = (energy - energy.mean(1, keepdim=True)).square().sum(1)
    return (energy.diff(dim=1).square().sum(1) / spread).masked_fill(constant, torch.nan)


class Divergences(NamedTuple):
    """Divergent steps of a trace; `print` tells them in a sentence."""

    num: Tensor
    """Divergent steps of each chain after the warm-up, kept or not, `(*chains)`."""
    x: Tensor
    """The kept draws that a divergent step led to, `(k, *event)`: they gather near the trouble."""

    def __str__(self) -> str:
        num = self.num
        if not num.any():
            return "no divergent step"
        return (
            f"{int(num.sum())} divergent steps in {int((num > 0).sum())} of {num.numel()} "
            f"chains, at most {int(num.max())} in one: the step size is too large there, and the "
            "draws are biased away from it"
        )


def divergences(trace: Trace) -> Divergences:
    """How many steps of a Hamiltonian sampler diverged, and where.

    Args:
        trace: a `Trace` of a kernel that tells `is_divergent`.

    Returns:
        `Divergences`.

    Raises:
        ValueError: the kernel does not tell. A `cycle` or `mixture` always tells: those of its
            kernels that cannot diverge count as never divergent.

    >>> from companion.core import sample
    >>> from companion.hmc import hmc
    >>> unstable = hmc(lambda x: -0.5 * x.square().sum(-1), step_size=2.5, num_steps=6)
    >>> g = torch.Generator().manual_seed(0)
    >>> found = divergences(sample(unstable, torch.zeros(2, 1), 50, generator=g))
    >>> print(found)
    97 divergent steps in 2 of 2 chains, at most 49 in one: the step size is too large there, and
    the draws are biased away from it
    >>> found.x.shape
    torch.Size([97, 1])
    """
    if not isinstance(trace, Trace):
        raise TypeError(f"expected a Trace, got {type(trace).__name__}")
    if "is_divergent" not in trace.stats:
        raise ValueError(
            "this trace cannot tell of divergences: its kernel has no is_divergent (it tells "
            f"{sorted(trace.stats) or 'nothing'})"
        )
    return Divergences(trace.num_divergent, trace.x[trace.stats["is_divergent"]])


# ---------------------------------------------------------------- the table


@dataclass(frozen=True, eq=False, repr=False)
class Summary:
    """Estimates of every coordinate with their errors; `print` shows them as a table.

    Attributes:
        mean: of all draws, `(*event)`, float64, as everything here.
        mcse_mean: its Monte Carlo standard error.
        sd: standard deviation of all draws.
        mcse_sd: its error.
        quantiles: the 5 %, 50 % and 95 % quantiles, `(3, *event)`.
        mcse_quantiles: their errors.
        ess_bulk: effective sample size of the bulk.
        ess_tail: effective sample size of the tails.
        rhat: R-hat of the rank-normalised split chains.
        notes: what is wrong, a sentence each; empty if nothing was found.
    """

    mean: Tensor
    mcse_mean: Tensor
    sd: Tensor
    mcse_sd: Tensor
    quantiles: Tensor
    mcse_quantiles: Tensor
    ess_bulk: Tensor
    ess_tail: Tensor
    rhat: Tensor
    notes: tuple[str, ...]

    def __str__(self) -> str:
        rows = [["", "mean", "sd", "5 %", "50 %", "95 %", "ESS bulk", "ESS tail", "R-hat"]]
        quantiles, errors = (t.reshape(3, -1) for t in (self.quantiles, self.mcse_quantiles))
        num = self.mean.numel()
        estimates = (self.mean, self.mcse_mean, self.sd, self.mcse_sd)
        for i in range(min(num, _MAX_ROWS)):
            mean, mcse_mean, sd, mcse_sd, bulk, tail, r = (
                float(t.reshape(-1)[i])
                for t in (*estimates, self.ess_bulk, self.ess_tail, self.rhat)
            )
            known = math.isfinite(mcse_mean)
            of_mean = format_estimate(mean, mcse_mean) if known else f"{mean:.3g} ± nan"
            shown = zip(quantiles[:, i].tolist(), errors[:, i].tolist(), strict=True)
            cells = [_name(i, self.mean), of_mean, _rounded(sd, mcse_sd)]
            cells += [_rounded(q, error) for q, error in shown]
            rows.append([*cells, f"{bulk:.0f}", f"{tail:.0f}", f"{r:.3f}"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        if num > _MAX_ROWS:
            lines.append(f"... and {num - _MAX_ROWS} more coordinates")
        return "\n".join(lines + [f"- {note}" for note in self.notes])

    __repr__ = __str__


def summary(x: Tensor | Trace, *, max_depth: int = 10) -> Summary:
    """Mean, spread and quantiles of every coordinate, their errors, and all that looks wrong.

    The notes tell of R-hat above 1.01 and effective sample sizes below 400 (less than that, and
    R-hat and the errors are too noisy themselves), constant chains and, of a trace, NaN proposals,
    divergences, E-BFMI below 0.3, trees that were cut off, and acceptance below 0.1. (E-BFMI is
    that of the draws kept: it needs a trace that was not thinned, `thin=1`; thinned energies look
    more independent than they are, and a low value goes unseen.)

    Args:
        x: draws, `(chains, draws, *event)`, or a `Trace`.
        max_depth: the deepest tree that the kernel `nuts` may build; deeper it was cut off.

    Returns:
        A `Summary`.

    Raises:
        ValueError: NaN or infinite draws, or fewer than 4.

    Reference: Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), *Rank-normalization, folding,
    and localization: an improved R-hat for assessing convergence of MCMC*.

    >>> x = torch.randn(4, 1_000, 2, generator=torch.Generator().manual_seed(0))
    >>> print(summary(x))
                    mean     sd     5 %    50 %   95 %  ESS bulk  ESS tail  R-hat
    x[0]  -0.012 ± 0.016  0.991  -1.584  -0.031  1.660      3895      3852  1.000
    x[1]  -0.002 ± 0.016  1.018  -1.698   0.006  1.656      3839      3801  1.000
    """
    check_count("max_depth", max_depth)
    draws = checked_draws(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = Summary(
            mean=draws.mean((0, 1)),
            mcse_mean=mcse_mean(draws),
            sd=draws.std((0, 1)),
            mcse_sd=mcse_sd(draws),
            quantiles=_quantiles(draws),
            mcse_quantiles=torch.stack([mcse_quantile(draws, level) for level in _LEVELS]),
            ess_bulk=ess_bulk(draws),
            ess_tail=ess_tail(draws),
            rhat=rhat(draws),
            notes=(),
        )
        of_steps = _about_steps(x, max_depth) if isinstance(x, Trace) else []
    warned = dict.fromkeys(str(warning.message) for warning in caught)  # each once, in order
    return replace(result, notes=(*warned, *_about_mixing(result), *of_steps))


def _about_mixing(result: Summary) -> list[str]:
    notes = []
    high = result.rhat > 1.01
    if high.any():
        worst = int(result.rhat.nan_to_num(0.0, posinf=math.inf).argmax())
        notes.append(
            f"R-hat is above 1.01 in {int(high.sum())} of {high.numel()} coordinates, worst "
            f"{float(result.rhat.reshape(-1)[worst]):.3f} at {_name(worst, high)}: the chains have "
            "not mixed"
        )
    ess = torch.fmin(result.ess_bulk, result.ess_tail)
    low = ess < 400
    if low.any():
        worst = int(ess.nan_to_num(math.inf).argmin())
        notes.append(
            f"an effective sample size is below 400 in {int(low.sum())} of {low.numel()} "
            f"coordinates, worst {float(ess.reshape(-1)[worst]):.0f} at {_name(worst, low)}: the "
            "errors above are rough"
        )
    return notes


def _about_steps(trace: Trace, max_depth: int) -> list[str]:
    notes = []
    if trace.num_nan.any():
        notes.append(f"{int(trace.num_nan.sum())} proposals had a NaN log-density")
    if trace.num_divergent.any():
        notes.append(str(Divergences(trace.num_divergent, trace.x)))
    if "energy" in trace.stats:
        low = e_bfmi(trace) < 0.3
        if low.any():
            notes.append(
                f"E-BFMI is below 0.3 in {int(low.sum())} of {low.numel()} chains: the energies "
                "mix slowly; heavy tails or a funnel?"
            )
    if "tree_depth" in trace.stats:
        cut = trace.stats["tree_depth"] >= max_depth
        if cut.any():
            notes.append(
                f"{float(cut.double().mean()):.1%} of the trees reached max_depth={max_depth} and "
                "were cut off: that is slow, not wrong"
            )
    rarely = trace.accept_prob < 0.1
    if rarely.any():
        notes.append(
            f"{int(rarely.sum())} of {rarely.numel()} chains accept fewer than 10 % of their "
            f"proposals, the lowest {float(trace.accept_prob.min()):.1%}: smaller steps may help"
        )
    return notes


def _quantiles(draws: Tensor) -> Tensor:
    """By sorting, for `torch.quantile` takes no more than 16 million draws; linear in between."""
    ordered = draws.flatten(0, 1).sort(0).values
    rows = []
    for level in _LEVELS:
        place = level * (len(ordered) - 1)
        below = math.floor(place)
        above = min(below + 1, len(ordered) - 1)
        rows.append(torch.lerp(ordered[below], ordered[above], place - below))
    return torch.stack(rows)


def _rounded(value: float, error: float) -> str:
    return round_to_error(value, error) if math.isfinite(error) else f"{value:.3g}"


def _name(i: int, like: Tensor) -> str:
    """How the i-th coordinate is written: x, x[3] or x[1, 2]."""
    index = [int(k) for k in torch.unravel_index(torch.tensor(i, device="cpu"), like.shape)]
    return f"x{index}" if index else "x"
