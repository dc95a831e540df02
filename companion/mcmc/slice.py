"""Slice sampling: a uniform draw under the graph of the density, with no step size to get wrong.

A point under the graph of p~ is a pair (x, height) with `0 < height < p~(x)`. Given x the height is
uniform; given the height x is uniform on the slice `{x : p~(x) > height}`. Alternating the two is a
Gibbs sampler whose x has density p. The slice along a line is found by an interval around x that
is widened until both ends are outside (stepping out), and drawn from by throwing points at the
interval and cutting it at those that miss (shrinkage). Both are done in a way that leaves the
uniform law on the slice invariant.

All chains do this in one batch; those that have finished wait for the last one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from companion.core import Kernel, LogProb
from companion.inputs import check_count, check_generator
from companion.mcmc.base import (
    ChainState,
    check_floating,
    check_step_size,
    expand,
    init_chains,
    per_chain,
)

__all__ = ["SliceInfo", "slice_sampler", "slice_update"]

Directions = Literal["coordinates", "random"]
MAX_SHRINKS = 1000  # each halves the interval, more or less: far beyond what round-off leaves


class SliceInfo(NamedTuple):
    """What a step did to each chain; every field is `(*chains)`."""

    accept_prob: Tensor
    """1: a slice sampler rejects nothing."""
    accepted: Tensor
    """True."""
    is_nan: Tensor
    """Whether the log-density was NaN or plus infinity somewhere that was tried (such a point is
    outside)."""
    num_evals: Tensor
    """Log-densities that this chain needed (the batch made as many as its slowest chain)."""
    at_limit: Tensor
    """Whether an interval reached its greatest length, `max_widths` widths."""


def slice_update(
    log_prob: LogProb,
    width: Tensor | float,
    max_widths: int,
    state: ChainState,
    direction: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> tuple[ChainState, SliceInfo]:
    """One slice update along the line `x + t direction`; see `slice_sampler`.

    Unlike other kernels' pure steps it draws as it goes: how many numbers it needs is random.

    Args:
        log_prob: the log-density.
        width: first length of the interval, in units of `direction`.
        max_widths: the interval is at most that many widths long.
        state: where the chains are.
        direction: broadcasts against x; chosen independently of x.
        generator: source of randomness.

    Returns:
        The new state, and a `SliceInfo`.

    Raises:
        RuntimeError: shrinking did not end, because `log_prob` does not give the same value twice.
    """
    x, here = state
    if isinstance(width, Tensor):
        width = width.to(x)

    def uniform() -> Tensor:
        return torch.rand(here.shape, dtype=x.dtype, device=x.device, generator=generator)

    # log(u p~(x)); 1 - u is uniform on (0, 1], so that the slice is never the whole space.
    log_height = here + torch.log1p(-uniform())
    num_evals = torch.zeros_like(here, dtype=torch.long)
    is_nan = torch.zeros_like(here, dtype=torch.bool)

    def try_at(t: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """The log-density at `x + t direction`, and whether an active chain finds the slice."""
        nonlocal num_evals, is_nan
        value = log_prob(x + expand(t, x) * direction)
        num_evals = num_evals + active
        usable = value < torch.inf  # not for a NaN, nor for a point that no chain would leave
        is_nan = is_nan | (active & ~usable)
        return value, active & usable & (value >= log_height)  # the others are outside

    # Stepping out. The limit is split at random between the two sides: otherwise the way back from
    # where the chain arrives would not be as probable as the way there.
    low = -width * uniform()
    ends = [low, low + width]
    spare = [(max_widths * uniform()).floor()]
    spare.append(max_widths - 1 - spare[0])
    for side, stride in enumerate((-width, width)):
        active = spare[side] > 0
        while active.any():
            _, inside = try_at(ends[side], active)
            ends[side] = torch.where(inside, ends[side] + stride, ends[side])
            spare[side] = spare[side] - inside.to(x.dtype)
            active = inside & (spare[side] > 0)
    at_limit = (spare[0] + spare[1]) <= 0

    # Shrinkage.
    low, high = ends
    t_new, here_new, active = torch.zeros_like(low), here, torch.ones_like(is_nan)
    for _ in range(MAX_SHRINKS):
        t = low + uniform() * (high - low)
        value, inside = try_at(t, active)
        t_new, here_new = torch.where(inside, t, t_new), torch.where(inside, value, here_new)
        active = active & ~inside
        if not active.any():
            break
        low = torch.where(active & (t < 0), t, low)
        high = torch.where(active & (t >= 0), t, high)
    else:
        stuck = active.nonzero()
        raise RuntimeError(
            f"{len(stuck)} of {active.numel()} chains found no point of their slice, not even the "
            f"one that they stand on (the first is chain {tuple(stuck[0].tolist())}). log_prob has "
            "to give the same value every time it is asked"
        )
    accepted = torch.ones_like(active)
    info = SliceInfo(torch.ones_like(here), accepted, is_nan, num_evals, at_limit)
    return ChainState(x + expand(t_new, x) * direction, here_new), info


def slice_sampler(
    log_prob: LogProb,
    width: Tensor | float,
    *,
    directions: Directions = "coordinates",
    max_widths: int = 1000,
) -> Kernel:
    """Slice sampling with stepping out and shrinkage, along coordinates or random directions.

    Any width is right. One that is too small costs log-densities in stepping out, one too large
    costs a few in shrinkage, about one more each time it doubles. Many log-densities a step are
    needed, some five for a line: see `SliceInfo.num_evals`.

    Args:
        log_prob: the log-density, `(*chains, *event) -> (*chains)`; minus infinity is outside.
        width: first guess of the length of a slice, positive: a number, or a tensor that broadcasts
            over the chains.
        directions: "coordinates", a step updates each coordinate in turn (the sweep leaves the
            target invariant, but is not its own reverse); "random", a step is one update along a
            direction that is uniform on the sphere (reversible).
        max_widths: an interval is at most that many widths long. With a limit, too, the target is
            left invariant. `SliceInfo.at_limit` tells when it is reached.

    Returns:
        A `Kernel` with a `ChainState` and a `SliceInfo`.

    Raises:
        ValueError: an argument that is not as said; by `init`, a start where the log-density is not
            finite.
        TypeError: by `init`, points that are not floating.
        RuntimeError: by a step, if `log_prob` does not give the same value twice.

    Reference: Neal (2003), *Slice sampling*.

    >>> from companion.core import sample
    >>> from companion.targets import SkewedProduct
    >>> target = SkewedProduct(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    >>> kernel, g = slice_sampler(target, 3.0), torch.Generator().manual_seed(0)
    >>> trace = sample(kernel, torch.zeros(1000, 2), 20, warmup=10, generator=g)
    >>> print([f"{m:.1f}" for m in trace.x.mean((0, 1))], [f"{m:.1f}" for m in target.mean])
    ['0.6', '1.7'] ['0.6', '1.7']
    """
    width = check_step_size("width", width)
    check_count("max_widths", max_widths)
    if directions not in get_args(Directions):
        raise ValueError(f"directions must be one of {get_args(Directions)}, got {directions!r}")

    def init(x: Tensor) -> ChainState:
        state = init_chains(log_prob, check_floating(x))
        per_chain(width, state)
        return state

    @torch.no_grad()
    def step(
        state: ChainState, *, generator: torch.Generator | None = None
    ) -> tuple[ChainState, SliceInfo]:
        x, chains = state.x, state.log_prob.shape
        check_generator(generator, x.device)
        if directions == "random":
            z = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            lines = [z / expand(z.reshape(*chains, -1).norm(dim=-1), z)]
        else:
            event = x.shape[len(chains) :]
            unit = torch.eye(event.numel(), dtype=x.dtype, device=x.device)
            lines = [line.reshape(event) for line in unit]
        infos = []
        for line in lines:
            state, info = slice_update(
                log_prob, width, max_widths, state, line, generator=generator
            )
            infos.append(info)
        _, _, is_nan, num_evals, at_limit = (
            torch.stack(field) for field in zip(*infos, strict=True)
        )
        return state, info._replace(
            is_nan=is_nan.any(0), num_evals=num_evals.sum(0), at_limit=at_limit.any(0)
        )

    return Kernel(init, step)
