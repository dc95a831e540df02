"""Annealed importance sampling: independent chains walk the path and are weighed on the way.

A chain starts at a draw of the base. From one beta to the next its log weight grows by
`log p~_next(x) - log p~_beta(x)`, and then it makes one step that leaves `p~_next` invariant. With
Z_0, the base's constant, as a factor, the weight w of a chain has the mean Z exactly, however few
the betas and however badly the steps mix: this is importance sampling on the space of whole walks.
By Jensen's inequality `E[log w] <= log Z`, and the log of a mean weight is too low on average, too.

Walked the other way, from a draw of the target to the base, the same product w has
`E[1 / w] = 1 / Z`: so `-log mean(1 / w)` is too high on average. Both together are a sandwich.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from companion.annealing.walks import Walk, base_log_z, trial, warn_if_few_count
from companion.core import AnnealingPath, LogZ
from companion.importance import log_mean_weight
from companion.inputs import check_count, check_finite, check_generator
from companion.storage import Checkpoint, digest
from companion.tempering.routes import advance, check_path, gain, profile
from companion.tempering.schedules import check_betas

__all__ = ["Sandwich", "ais", "bidirectional", "reverse_ais"]

_SMALLEST_GAP = 0.1  # in nats: a smaller one is nothing to warn of


@torch.no_grad()
def ais(
    path: AnnealingPath,
    betas: Tensor | Sequence[float],
    num_chains: int,
    *,
    generator: torch.Generator | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int = 1000,
) -> LogZ:
    """Estimate log Z by annealed importance sampling: `log((1/n) sum_i w_i)`.

        log w = log Z_0 + sum_k log p~_{k+1}(x_k) - log p~_k(x_k),    x_{k+1} from a step at k + 1

    The mean weight is unbiased for Z; its logarithm is too low by about half its own variance. With
    chains that mix at every beta, the variance of a log weight, and twice the shortfall of its
    mean, fall as one over the number of betas. Chains that stay in the wrong mode are seen neither
    in the standard error nor in the effective sample size: see `bidirectional`.

    A beta costs each chain one `path.advance`, or a step and an evaluation of the density; for an
    RBM two products with W. Memory does not grow with the number of betas. With `checkpoint` the
    run is saved on its way: call `ais` again with the same arguments, in a new process or the same,
    and it goes on from there to the result, bit for bit, of a run that was never killed.

    Args:
        path: any `AnnealingPath`. Of a batch of machines, each gets chains and a log Z of its own.
        betas: the schedule, from 0 to 1; also tens of thousands (`companion.tempering` makes them;
            `adaptive_schedule` measures them).
        num_chains: n, at least 2.
        generator: source of randomness, on the device of the path.
        progress: show a progress bar.
        checkpoint: file that the run is saved to and resumed from; needs a generator.
        save_every: betas between two saves.

    Returns:
        A `LogZ` whose standard error is that of the delta method; from its `log_weights`,
        `(n, *machines)`, `companion.importance.bootstrap_std_error` finds another.

    Raises:
        ValueError: a count out of range, betas that do not ascend from 0 to 1, a generator on
            another device, a checkpoint of another run, log weights that are NaN or plus infinity,
            or all chains dead.
        TypeError: a path that is none, or a checkpoint without a generator.

    Warns:
        UserWarning: an effective sample size below about ten; or one below a fifth where normal
            log weights of the spread seen would have one below ten, since then the large weights
            have been missed; or one below a half with weights, at least 200, whose k-hat is above
            its limit (see `companion.importance.psis`). The estimate is too low by nobody knows
            how much.

    Reference: Neal (2001), *Annealed importance sampling*; Salakhutdinov and Murray (2008), *On the
    quantitative analysis of deep belief networks*.

    >>> from companion.models.rbm import RBM
    >>> from companion.tempering import linear_schedule
    >>> rbm = RBM(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> _ = rbm.W.data.mul_(100.0)
    >>> g = torch.Generator().manual_seed(1)
    >>> found = ais(rbm.annealing_path(), linear_schedule(100), 500, generator=g)
    >>> print(f"{found.value:.2f} +/- {found.std_error:.2f}; exact {rbm.log_z().value:.2f}")
    23.41 +/- 0.02; exact 23.38
    """
    check_path(path)
    check_count("num_chains", num_chains, minimum=2)
    check_count("save_every", save_every)
    schedule = check_betas(betas, torch.device("cpu"), from_zero=True)
    walk = Walk()
    saved = None
    if checkpoint is not None:
        if generator is None:
            raise TypeError("a checkpoint needs a generator: torch.Generator(device)")
        settings = {
            "num_chains": num_chains,
            "betas": f"{len(schedule)}, digest {digest('', {'betas': schedule})[:16]}",
            "generator": f"{generator.device.type}, seed {generator.initial_seed()}",
            "the path": trial(path, generator.device),
        }
        saved = Checkpoint(checkpoint, {"walk": walk, "generator": generator}, settings)
    if saved is None or not saved.resume():
        walk.begin(path.sample_base(num_chains, generator=generator), path)

    def move(x: Tensor, beta: float, next_beta: float) -> tuple[Tensor, Tensor]:
        return advance(path, x, beta, next_beta, generator=generator)

    log_weights = walk.run(schedule.tolist(), move, progress, saved, save_every)
    log_z = log_mean_weight(log_weights + base_log_z(path, log_weights))
    warn_if_few_count(log_z, 1, stacklevel=4)
    return log_z


@torch.no_grad()
def reverse_ais(
    path: AnnealingPath,
    betas: Tensor | Sequence[float],
    x: Tensor,
    *,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> LogZ:
    """Estimate log Z from draws of the target, by `-log((1/n) sum_i 1 / w_i)`.

    Each draw walks the path back to the base, by the reversals of the steps that `ais` makes, and w
    is the same product as there. For exact draws `E[1 / w] = 1 / Z`: the estimate is too high on
    average, by about half its variance. Draws of a long run will do as well as they stand for the
    target; draws of a mode alone give the Z of that mode, which is too low. The target must be
    positive wherever the base is.

    The 1 / w need a variance, or the standard error means nothing. In one step it is
    `E[1 / w^2] = int base^2 / target`, times constants: finite only if the target's tails are heavy
    enough, for normal laws if the base has less than twice the target's variance. Where each step
    forgets where it came from, the same holds of neighbouring betas, and close ones mend it. Where
    steps have a bounded length, as a random walk's, the far tail of 1 / w stays that of one step,
    however many the betas: take a narrower base, or longer moves.

    The cost is that of `ais`.

    Args:
        path: any `AnnealingPath`. If its `step` is not reversible it must have `reverse_step`, or
            the law of w is not that which `bar` expects.
        betas: the schedule, ascending from 0 to 1, as for `ais`.
        x: independent draws of the target, `(n, *event)`, at least 2; for a batch of machines
            `(*machines, n, *event)`.
        generator: source of randomness, on the device of `x`.
        progress: show a progress bar.

    Returns:
        A `LogZ`. Its `log_weights` are the log w, near log Z: `bar` takes them beside those of
        `ais`. Its `ess` is that of the 1 / w.

    Raises:
        ValueError, TypeError: as in `ais`; or draws of another shape or dtype than the base's.

    Warns:
        UserWarning: as in `ais`; the estimate is then too high by nobody knows how much.

    Reference: Grosse, Ghahramani and Adams (2015), *Sandwiching the marginal likelihood using
    bidirectional Monte Carlo*; Burda, Grosse and Salakhutdinov (2015), *Accurate and conservative
    estimates of MRF log-likelihood using reverse annealing*.

    >>> from companion.models.rbm import RBM
    >>> from companion.tempering import linear_schedule
    >>> rbm = RBM(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> _ = rbm.W.data.mul_(100.0)
    >>> g = torch.Generator().manual_seed(1)
    >>> x = rbm.gibbs(rbm.sample_base(500, generator=g), 200, generator=g)
    >>> found = reverse_ais(rbm.annealing_path(), linear_schedule(100), x, generator=g)
    >>> print(f"{found.value:.2f} +/- {found.std_error:.2f}; exact {rbm.log_z().value:.2f}")
    23.37 +/- 0.02; exact 23.38
    """
    check_path(path)
    schedule = check_betas(betas, torch.device("cpu"), from_zero=True).flip(0)
    check_finite("x", x)
    check_generator(generator, x.device)
    base = path.sample_base(1, generator=torch.Generator(x.device).manual_seed(0))
    axis = torch.as_tensor(path.base_log_z).ndim
    n = x.shape[axis] if x.ndim > axis else 0
    expected = (*base.shape[:axis], n, *base.shape[axis + 1 :])
    if x.shape != expected or n < 2:
        raise ValueError(
            f"x must be at least two draws of the target, of the shape of draws of the base, "
            f"{(*base.shape[:axis], 'n', *base.shape[axis + 1 :])}; got {tuple(x.shape)}"
        )
    if x.dtype != base.dtype:
        raise TypeError(f"x must be {base.dtype} as the draws of the base, got {x.dtype}")
    back = getattr(path, "reverse_step", None)

    def move(x: Tensor, beta: float, next_beta: float) -> tuple[Tensor, Tensor]:
        if back is None:  # a step is its own reversal
            return advance(path, x, beta, next_beta, generator=generator)
        at = profile(path, x)
        return back(x, next_beta, generator=generator), gain(at(beta), at(next_beta))

    walk = Walk()
    walk.begin(x.detach(), path)
    log_inverse = walk.run(schedule.tolist(), move, progress)
    log_inverse = log_inverse - base_log_z(path, log_inverse)
    inverse = log_mean_weight(log_inverse)
    log_z = LogZ(-inverse.value, inverse.std_error, -log_inverse, inverse.ess)
    warn_if_few_count(log_z, -1, stacklevel=4)
    return log_z


@dataclass(frozen=True, eq=False)
class Sandwich:
    """Two estimates of log Z, one too low on average and one too high.

    Attributes:
        lower: from the base to the target, by `ais`.
        upper: from the target to the base, by `reverse_ais`.
    """

    lower: LogZ
    upper: LogZ

    @property
    def gap(self) -> Tensor:
        """`upper - lower`, a float64 tensor: about half the sum of their variances if all is well.

        On average it bounds the error of either. By chance it may be negative.
        """
        return self.upper.value - self.lower.value


@torch.no_grad()
def bidirectional(
    path: AnnealingPath,
    betas: Tensor | Sequence[float],
    num_chains: int,
    x: Tensor,
    *,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Sandwich:
    """Both `ais` and `reverse_ais` on one schedule: log Z from below and from above.

    What the effective sample size of either cannot tell, that a mode is missing, the gap does: it
    does not close when chains are added. Both together, `bar(lower.log_weights,
    upper.log_weights)` of `companion.logz` gives one estimate that is better than either.

    Args:
        path: any `AnnealingPath`; so are the others as in `ais` and `reverse_ais`.
        betas: the schedule, from 0 to 1.
        num_chains: chains of `ais`.
        x: draws of the target, `(n, *event)`.
        generator: source of randomness, on the device of the path.
        progress: show progress bars.

    Returns:
        A `Sandwich`.

    Raises:
        ValueError, TypeError: as there.

    Warns:
        UserWarning: as there; and where the two are further apart than 4.5 of their standard
            errors and 0.1: at least one is wrong by more than its error tells. If the lower one
            lies above, the draws do not stand for the target.

    Reference: Grosse, Ghahramani and Adams (2015), *Sandwiching the marginal likelihood using
    bidirectional Monte Carlo*.

    >>> from companion.models.rbm import RBM
    >>> from companion.tempering import linear_schedule
    >>> rbm = RBM(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> _ = rbm.W.data.mul_(100.0)
    >>> g = torch.Generator().manual_seed(1)
    >>> x = rbm.gibbs(rbm.sample_base(500, generator=g), 200, generator=g)
    >>> found = bidirectional(rbm.annealing_path(), linear_schedule(100), 500, x, generator=g)
    >>> print(f"{found.lower.value:.1f} to {found.upper.value:.1f}, {rbm.log_z().value:.1f}")
    23.4 to 23.4, 23.4
    """
    both = {"generator": generator, "progress": progress}
    upper = reverse_ais(path, betas, x, **both)  # type: ignore[arg-type]
    lower = ais(path, betas, num_chains, **both)  # type: ignore[arg-type]
    found = Sandwich(lower, upper)
    error = (lower.std_error.square() + upper.std_error.square()).sqrt()
    apart = found.gap.abs() > (4.5 * error).clamp(min=_SMALLEST_GAP)
    if apart.any():
        worst = int(torch.where(apart, found.gap.abs(), 0.0).argmax())
        gap = float(found.gap.reshape(-1)[worst])
        advice = "take more betas, or a base nearer to the target"
        if gap < 0:
            advice = "the draws x do not stand for the target: some of its modes may be missing"
        warnings.warn(
            f"the gap between the upper and the lower estimate of log Z is {gap:.2f}, with a "
            f"standard error of {float(error.reshape(-1)[worst]):.2f}: at least one of them is "
            f"wrong by more than its own error tells; {advice}",
            stacklevel=3,  # this frame, and that of no_grad
        )
    return found
