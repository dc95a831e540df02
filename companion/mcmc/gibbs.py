"""Gibbs sampling: redraw one block of variables at a time, given all the others.

Each such draw leaves the target invariant, so any order of them does. The order decides how fast
the chain forgets, and whether it is reversible: a fixed sweep is not its own reverse; a random
choice of the block, or a sweep there and back, is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from companion.core import Kernel, LogProb
from companion.inputs import check_count, check_generator
from companion.mcmc.base import GibbsState, MoveInfo, expand, init_chains

__all__ = ["gibbs"]

Scan = Literal["systematic", "random", "palindromic"]


def gibbs(
    conditionals: Sequence[Callable[..., Tensor]],
    scan: Scan = "systematic",
    *,
    log_prob: LogProb | None = None,
    event_ndim: int = 1,
) -> Kernel:
    """Gibbs sampling from full conditionals, in one of three orders.

    Nothing is rejected. If the conditionals are those of no joint distribution (incompatible), the
    chain still runs, and what it samples depends on the order.

    Args:
        conditionals: one a block: `conditional(x, *, generator) -> x` redraws its block given the
            rest and returns the new x, `(*chains, *event)`. It gets a copy of its own, which it may
            change in place.
        scan: "systematic", a step redraws every block once, in the given order; "random", a step
            redraws one block, and each chain chooses its own (all chains sharing one choice would
            be dependent; so blocks are redrawn for all chains, and a step costs up to as much as a
            sweep); "palindromic", a sweep and back, the last block once: it is its own reverse.
        log_prob: the log-density, `(*chains, *event) -> (*chains)`, if the state is to carry it
            (one evaluation a step); needed in a `mixture`.
        event_ndim: number of event dimensions of x, where there is no `log_prob` to tell.

    Returns:
        A `Kernel` with a `GibbsState` and a `MoveInfo`. A chain that a sweep would bring to NaN or
        infinity stays where it is, and `is_nan` is set.

    Raises:
        ValueError: no conditional, an unknown scan; by `init`, a start that is not finite or has
            too few dimensions; by a step, a conditional that changes shape or dtype.

    Reference: Geman and Geman (1984), *Stochastic relaxation, Gibbs distributions, and the Bayesian
    restoration of images*; Liu, Wong and Kong (1995), *Covariance structure and convergence rate of
    the Gibbs sampler with various scans*.

    >>> from companion.core import sample
    >>> def redraw(i):                                   # precision [[1, -a], [-a, 1]], a = 0.5
    ...     def conditional(x, *, generator):
    ...         x[..., i] = 0.5 * x[..., 1 - i] + torch.randn(x.shape[:-1], generator=generator)
    ...         return x
    ...     return conditional
    >>> kernel, g = gibbs([redraw(0), redraw(1)]), torch.Generator().manual_seed(0)
    >>> x = sample(kernel, torch.zeros(2000, 2), 500, warmup=20, generator=g).x
    >>> print([f"{v:.2f}" for v in x.reshape(-1, 2).T.cov().flatten()])      # 4/3 and 2/3
    ['1.33', '0.67', '0.67', '1.33']
    """
    conditionals = list(conditionals)
    if not conditionals:
        raise ValueError("conditionals is empty: give one function a block")
    if scan not in get_args(Scan):
        raise ValueError(f"scan must be one of {get_args(Scan)}, got {scan!r}")
    check_count("event_ndim", event_ndim, minimum=0)
    order = list(range(len(conditionals)))
    if scan == "palindromic":
        order += order[-2::-1]

    def redraw(i: int, x: Tensor, generator: torch.Generator | None) -> Tensor:
        shape, dtype = x.shape, x.dtype
        x = conditionals[i](x, generator=generator)
        if x.shape != shape or x.dtype != dtype:
            raise ValueError(
                f"conditional {i} must return x whole, {tuple(shape)} of {dtype}; it gave "
                f"{tuple(x.shape)} of {x.dtype}"
            )
        return x

    def init(x: Tensor) -> GibbsState:
        if log_prob is not None:
            return GibbsState(*init_chains(log_prob, x))
        if x.ndim < event_ndim or not x.isfinite().all():
            raise ValueError(
                f"x must be finite, and have {event_ndim} event dimensions behind those of the "
                f"chains; got shape {tuple(x.shape)}, {int((~x.isfinite()).sum())} entries NaN or "
                "infinite"
            )
        return GibbsState(x.detach())

    @torch.no_grad()
    def step(
        state: GibbsState, *, generator: torch.Generator | None = None
    ) -> tuple[GibbsState, MoveInfo]:
        old = state.x
        check_generator(generator, old.device)
        num_chain_dims = old.ndim - event_ndim if state.log_prob is None else state.log_prob.ndim
        chains = old.shape[:num_chain_dims]
        if scan == "random":
            choice = torch.randint(len(order), chains, device=old.device, generator=generator)
            x = old
            for i in order:
                mine = choice == i
                if mine.any():
                    x = torch.where(expand(mine, x), redraw(i, old.clone(), generator), x)
        else:
            x = old.clone()
            for i in order:
                x = redraw(i, x, generator)
        finite = x.isfinite().reshape(*chains, -1).all(-1)
        x = torch.where(expand(finite, x), x, old)
        value = None if log_prob is None else log_prob(x)
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        return GibbsState(x, value), MoveInfo(finite.to(dtype), finite, ~finite)

    return Kernel(init, step)
