"""Warm-up: find the step size and the mass, then freeze them.

A Hamiltonian sampler has two dials. The step size decides which share of the proposals is accepted:
`warmup` steers it to a target by dual averaging. The mass M is the covariance of the *momentum*,
and it works best when it is the inverse of the target's covariance: momenta are then large where
the target is narrow, velocities `M^-1 p` are large where it is wide, and all directions take
equally many steps. So M is estimated as the inverse of the covariance of the draws, not as that
covariance.

A kernel that goes on learning from its own chains does not leave its target invariant. What
`warmup` returns has stopped: its numbers are constants, and the draws of the warm-up are dropped.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from companion.core import Kernel, LogProb
from companion.hmc.static import hmc
from companion.inputs import check_count, check_finite, check_generator, check_real

__all__ = ["Tuned", "warmup"]

MakeKernel: TypeAlias = Callable[[LogProb, float, Tensor | None], Kernel]
"""`(log_prob, step_size, mass) -> Kernel`."""


class _Pair(NamedTuple):
    kernel: Kernel
    x: Tensor


class Tuned(_Pair):
    """What a warm-up found. It unpacks as `kernel, x = tuned`; the rest are attributes.

    Attributes:
        kernel: the kernel with its step size and mass fixed.
        x: where the chains are, `(*chains, *event)`.
        step_size: the kernel's step size.
        mass: the kernel's mass, of the event's shape or `(d, d)`, or None for the identity.
        trajectory_length: of a jittered kernel, the longest; else None.
        history: the course of the warm-up, for a plot: `"step_size"`, `"accept_prob"` (averaged
            over the chains) and so on, each `(num_steps,)`, float64 on the CPU.
    """

    step_size: float
    mass: Tensor | None
    trajectory_length: float | None
    history: dict[str, Tensor]

    def __new__(
        cls,
        kernel: Kernel,
        x: Tensor,
        step_size: float,
        mass: Tensor | None,
        history: dict[str, list[float]],
        trajectory_length: float | None = None,
    ) -> Tuned:
        tuned = super().__new__(cls, kernel, x)
        tuned.step_size, tuned.mass, tuned.trajectory_length = step_size, mass, trajectory_length
        tuned.history = {
            name: torch.tensor(values, dtype=torch.float64, device="cpu")
            for name, values in history.items()
        }
        return tuned


# ---------------------------------------------------------------- step size

# Hoffman and Gelman have 0.05, 10 and 10. An error then moves the next log step by up to 3.2 times
# its size, and where acceptance falls steeply with the step (MALA) the search overshoots for ever:
# asked for 0.6 it gives 0.74. Here the factor is at most 1.
GAMMA, DELAY, CENTRE = 0.1, 25.0, 2.0


class DualAveraging(NamedTuple):
    """Where dual averaging of the log step size is (see `update`)."""

    centre: float
    log_step: float
    log_average: float
    mean_error: float = 0.0
    num_updates: int = 0

    @classmethod
    def start(cls, step_size: float) -> DualAveraging:
        """Begin at a step size; what is tried later is drawn towards `CENTRE` times as much."""
        log_step = math.log(step_size)
        return cls(math.log(CENTRE) + log_step, log_step, log_step)

    def update(self, error: float) -> DualAveraging:
        """Take in `error = target - acceptance probability` of one step.

        With H_t the running mean of the errors and mu the centre,
        `log e_t = mu - sqrt(t) / gamma H_t`: a search that calms down. The answer is the average of
        the log e_t in which step t has the weight `t^-0.75`.

        Reference: Hoffman and Gelman (2014), *The No-U-Turn sampler*, section 3.2.1.
        """
        t = self.num_updates + 1
        rate, weight = 1.0 / (t + DELAY), t**-0.75
        mean_error = (1.0 - rate) * self.mean_error + rate * error
        log_step = self.centre - math.sqrt(t) / GAMMA * mean_error
        if log_step < math.log(_SMALLEST):
            raise RuntimeError(_collapsed(math.exp(log_step)))
        log_step = min(log_step, math.log(_LARGEST))
        log_average = (1.0 - weight) * self.log_average + weight * log_step
        return DualAveraging(self.centre, log_step, log_average, mean_error, t)


_SMALLEST, _LARGEST = 1e-12, 1e12


def _collapsed(step_size: float) -> str:
    return (
        f"warm-up failed: the step size fell to {step_size:.1g} and proposals are still rejected. "
        "Look for a gradient that does not belong to the log-density, for a density that is not "
        "continuous, for a start on the edge of its support, or for float32 where the log-density "
        "is large"
    )


def find_step_size(
    log_prob: LogProb, x: Tensor, mass: Tensor | None, guess: float, generator: Any
) -> float:
    """Double or halve `guess` until one leapfrog step is accepted with a probability of about 0.8.

    Each trial costs a gradient; the probability is averaged over the chains at `x`.
    """
    step_size, direction = guess, 0.0
    state = hmc(log_prob, step_size, 1, mass).init(x)
    while True:
        _, info = hmc(log_prob, step_size, 1, mass).step(state, generator=generator)
        towards = 1.0 if float(info.accept_prob.mean()) > 0.8 else -1.0
        if towards + direction == 0.0:  # crossed
            return step_size
        direction = towards
        step_size *= 2.0**direction
        if step_size < _SMALLEST:
            raise RuntimeError(_collapsed(step_size))
        if step_size > _LARGEST:
            raise RuntimeError(
                f"warm-up failed: steps of {step_size:.1g} are still accepted. The log-density "
                "seems to be flat, so that it has no normaliser; or scale its argument"
            )


# ---------------------------------------------------------------- mass


class Moments(NamedTuple):
    """Number, mean and scatter of the draws of all chains so far, in float64."""

    num_draws: int
    mean: Tensor
    scatter: Tensor
    """Sum of squares about the mean, of the event's shape, or of products, `(d, d)`."""


def add_draws(moments: Moments | None, x: Tensor, dense: bool) -> Moments:
    """The moments with one more draw of each chain, `x` `(chains, *event)`."""
    x = x.double()
    n, mean = len(x), x.mean(0)
    centred = x - mean
    scatter = centred.T @ centred if dense else centred.square().sum(0)
    if moments is None:
        return Moments(n, mean, scatter)
    total, shift = moments.num_draws + n, mean - moments.mean
    product = torch.outer(shift, shift) if dense else shift.square()
    return Moments(
        total,
        moments.mean + shift * (n / total),
        moments.scatter + scatter + product * (moments.num_draws * n / total),
    )


def mass_from(moments: Moments, like: Tensor, dense: bool) -> Tensor:
    """M, the inverse of the covariance of the draws, shrunk a little as Stan's is.

    `C = n / (n + 5) S + 0.001 * 5 / (n + 5) I` for the covariance S of n draws, then `M = C^-1`.
    """
    n = moments.num_draws
    covariance = moments.scatter / (n - 1) * (n / (n + 5.0))
    shrunk = 1e-3 * 5.0 / (n + 5.0)
    if not dense:
        return (covariance + shrunk).reciprocal().to(like)
    covariance.diagonal().add_(shrunk)
    return torch.cholesky_inverse(torch.linalg.cholesky(covariance)).to(like)


def windows(num_steps: int) -> list[int]:
    """Boundaries of the windows in which the draws are gathered; each is twice the one before.

    Before the first the chains only find the target, after the last only the step size is tuned.

    >>> windows(1000)                                                     # as Stan's
    [75, 100, 150, 250, 450, 950]
    >>> windows(100)
    [15, 75]
    """
    start, last, size = min(75, int(0.15 * num_steps)), num_steps - min(50, num_steps // 4), 25
    ends = [start]
    while ends[-1] < last:
        end = ends[-1] + size
        size *= 2
        ends.append(end if end + size <= last else last)  # the last one takes what is left
    return ends


# ---------------------------------------------------------------- warm-up


@torch.no_grad()
def warmup(
    make_kernel: MakeKernel,
    log_prob: LogProb,
    x0: Tensor,
    num_steps: int,
    *,
    target_accept: float = 0.8,
    dense: bool = False,
    generator: torch.Generator | None = None,
) -> Tuned:
    """Tune the step size and the mass of a kernel, with all chains together, and freeze both.

    The schedule is Stan's. First the chains find the target while dual averaging tunes the step
    size to the acceptance probability. Then, in windows that double, the mass becomes the inverse
    of the covariance of the window's draws, those of all chains pooled, and the step size is tuned
    afresh. At last only the step size is tuned. The last 10 to 25 steps run the frozen
    kernel: `history["accept_prob"]` ends with what it really accepts.

    Args:
        make_kernel: `(log_prob, step_size, mass) -> Kernel`, such as `nuts` or `mala`, or
            `lambda log_prob, step_size, mass: hmc(log_prob, step_size, 10, mass)`. A kernel is made
            for each step: leave `compile` to one that you make of the tuned numbers.
        log_prob: the log-density, `(*chains, *event) -> (*chains)`.
        x0: starting points, `(*chains, *event)`; one chain will do, more of them estimate better.
        num_steps: steps of the warm-up, at least 50; some hundreds are usual.
        target_accept: the mean acceptance probability to reach, between 0 and 1.
        dense: estimate a full mass matrix, `(d, d)`, instead of a diagonal one.
        generator: source of randomness, on the device of `x0`.

    Returns:
        A `Tuned`, which unpacks as `kernel, x`, and has `.step_size`, `.mass` and `.history`.

    Raises:
        ValueError: an argument out of range, a generator on another device, a dense mass for events
            that are not vectors, or a start where the density is not finite.
        RuntimeError: the step size collapsed, or the log-density is flat.

    Warns:
        UserWarning: the frozen kernel diverged, met NaN, accepted less than half of what was asked
            for, or left chains stuck.

    Reference: Hoffman and Gelman (2014), *The No-U-Turn sampler*; the windows and the shrinkage:
    the Stan reference manual, *HMC algorithm parameters*.

    >>> from companion.hmc import nuts
    >>> from companion.targets import Gaussian
    >>> target = Gaussian(torch.zeros(2), torch.diag(torch.tensor([1.0, 100.0])))
    >>> g = torch.Generator().manual_seed(0)
    >>> kernel, x = tuned = warmup(nuts, target, torch.zeros(50, 2), 100, generator=g)
    >>> x.shape, bool((tuned.mass * torch.tensor([1.0, 100.0]) - 1).abs().max() < 0.2)
    (torch.Size([50, 2]), True)
    """
    check_finite("x0", x0)
    check_generator(generator, x0.device)
    check_count("num_steps", num_steps, minimum=50)
    check_real("target_accept", target_accept, minimum=0.0, maximum=1.0)
    state = make_kernel(log_prob, 1.0, None).init(x0)
    event = x0.shape[state.log_prob.ndim :]
    if dense and len(event) != 1:
        raise ValueError(
            f"a dense mass needs events of one dimension, got {tuple(event)}: flatten them, or "
            "leave dense=False"
        )
    num_check = check_steps(num_steps)
    first, *ends = windows(num_steps - num_check)
    mass: Tensor | None = None
    moments: Moments | None = None
    averaging = DualAveraging.start(find_step_size(log_prob, state.x, mass, 1.0, generator))
    history: dict[str, list[float]] = {"step_size": [], "accept_prob": []}
    for i in range(num_steps - num_check):
        step_size = math.exp(averaging.log_step)
        state, info = make_kernel(log_prob, step_size, mass).step(state, generator=generator)
        accept_prob = float(info.accept_prob.mean())
        history["step_size"].append(step_size)
        history["accept_prob"].append(accept_prob)
        averaging = averaging.update(target_accept - accept_prob)
        if first <= i < ends[-1]:
            moments = add_draws(moments, state.x.reshape(-1, *event), dense)
        if moments is not None and i + 1 in ends:
            mass = mass_from(moments, state.x, dense)
            guess = find_step_size(log_prob, state.x, mass, step_size, generator)
            moments, averaging = None, DualAveraging.start(guess)
    step_size = math.exp(averaging.log_average)
    kernel = make_kernel(log_prob, step_size, mass)
    state, accept_probs = run_frozen(kernel, state, num_check, target_accept, generator)
    history["step_size"] += [step_size] * num_check
    history["accept_prob"] += accept_probs
    return Tuned(kernel, state.x, step_size, mass, history)


def check_steps(num_steps: int) -> int:
    """How many of the steps run the frozen kernel."""
    return min(25, max(10, num_steps // 10))


def run_frozen(
    kernel: Kernel, state: Any, num_steps: int, target_accept: float, generator: Any
) -> tuple[Any, list[float]]:
    """Run the tuned kernel for the last steps of a warm-up, and warn of what looks bad.

    Returns the state of the chains, and the mean acceptance probability of each step.
    """
    accept_probs, num_divergent = [], 0
    for _ in range(num_steps):
        state, info = kernel.step(state, generator=generator)
        accept_probs.append(info.accept_prob)
        flag = getattr(info, "is_divergent", getattr(info, "is_nan", None))
        num_divergent += 0 if flag is None else int(flag.sum())
    accept_prob = torch.stack(accept_probs)
    of_chain, mean = accept_prob.mean(0), float(accept_prob.mean())
    stuck = (of_chain < 0.01).nonzero().squeeze(-1).tolist()
    found = []
    if num_divergent:
        found.append(
            f"{num_divergent} of {accept_prob.numel()} trajectories diverged: parts of the target "
            "are too narrow for the step size; write it in other variables or raise target_accept"
        )
    if stuck:
        found.append(
            f"{len(stuck)} of {of_chain.numel()} chains hardly moved, the first {stuck[:3]}: start "
            "them elsewhere or warm up for longer"
        )
    if mean + 1.0 / math.sqrt(accept_prob.numel()) < 0.5 * target_accept:  # not by chance
        found.append(
            f"the acceptance probability is {mean:.2f} where {target_accept} was asked for: warm "
            "up for longer"
        )
    if found:
        where = f"in the last {num_steps} steps of the warm-up, with all numbers fixed, "
        warnings.warn(where + "; ".join(found), stacklevel=4)
    return state, accept_prob.reshape(num_steps, -1).mean(1).tolist()
