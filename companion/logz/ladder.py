"""Draws at every beta of a ladder, and what is reckoned from them without keeping them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from companion.core import AnnealingPath
from companion.inputs import check_count
from companion.tempering import check_betas, parallel_tempering, profile
from companion.tempering.parallel import move
from companion.tempering.routes import check_single_path, start

__all__ = ["collect", "sample_ladder"]

_BLOCK = 2**15  # points evaluated at once


@torch.no_grad()
def sample_ladder(
    path: AnnealingPath,
    betas: Tensor | Sequence[float],
    num_draws: int,
    *,
    num_chains: int = 16,
    warmup: int = 100,
    thin: int = 1,
    swap: bool = True,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Draws at every beta of a ladder: for both methods here, and for `mbar`.

    All chains at all betas move as one batch, each from a draw of its own of the base. At beta = 0
    every draw is an exact, independent one of the base. An iteration costs a `path.step` of R - 1
    points a chain; swaps add an evaluation of the densities of R points.

    Args:
        path: any `AnnealingPath`.
        betas: the ladder, R of them, ascending to 1.
        num_draws: draws kept of each chain.
        num_chains: number of chains at each beta, independent of one another.
        warmup: iterations made and thrown away first.
        thin: iterations a kept draw.
        swap: let neighbouring betas swap their points (`parallel_tempering`, even and odd pairs in
            turn). Without, the chains at different betas are independent.
        generator: source of randomness, on the path's device.
        progress: show a progress bar.

    Returns:
        `(R, chains, draws, *event)`.

    Raises:
        ValueError: a count out of range, betas that do not ascend to 1.
        TypeError: a path that is none.

    >>> from companion.models.ising import Ising
    >>> path = Ising(4, 4, coupling=0.4).annealing_path()
    >>> g = torch.Generator().manual_seed(0)
    >>> sample_ladder(path, [0.0, 0.5, 1.0], 10, num_chains=2, generator=g).shape
    torch.Size([3, 2, 10, 4, 4])
    """
    kept: list[Tensor] = []

    def keep(i: int, x: Tensor) -> None:
        if i == 0:
            kept.append(x.new_empty(*x.shape[:2], num_draws, *x.shape[2:]))
        kept[0][:, :, i] = x

    betas = check_betas(betas, torch.device("cpu"))
    run: dict[str, Any] = {"num_chains": num_chains, "warmup": warmup, "thin": thin, "swap": swap}
    _run(path, betas, num_draws, keep, **run, generator=generator, progress=progress)
    return kept[0]


def _run(
    path: AnnealingPath,
    betas: Tensor,
    num_draws: int,
    visit: Callable[[int, Tensor], object],
    *,
    num_chains: int,
    warmup: int,
    thin: int,
    swap: bool,
    generator: torch.Generator | None,
    progress: bool,
) -> None:
    """Call `visit(i, x)` with the points of all rungs, `(R, chains, *event)`, for each draw i."""
    from tqdm import tqdm

    check_count("num_draws", num_draws)
    check_count("num_chains", num_chains)
    check_count("warmup", warmup, minimum=0)
    check_count("thin", thin)
    if swap and len(betas) > 1:
        run: dict[str, Any] = {"num_chains": num_chains, "warmup": warmup, "thin": thin}
        run |= {"generator": generator, "progress": progress, "callback": visit}
        parallel_tempering(path, betas, num_draws, **run)
        return
    x = start(path, (len(betas), num_chains), None, generator)
    rows, from_base = betas[:, None].to(x.device), float(betas[0]) == 0.0
    for i in tqdm(range(-warmup, num_draws * thin), disable=not progress):
        x = move(path, x, rows, from_base, generator)
        draw, remainder = divmod(i, thin)
        if i >= 0 and remainder == thin - 1:
            visit(draw, x)


def collect(
    path: AnnealingPath,
    betas: Tensor,
    draws: Tensor | int,
    of: Callable[[Callable[[Tensor], Tensor], Tensor, torch.Size], Tensor],
    run: dict[str, Any],
) -> Tensor:
    """What a function of the log-densities gives at all draws of a ladder.

    No more points are held at once than those of one iteration.

    Args:
        path: any `AnnealingPath`.
        betas: the ladder, checked, `(R,)`.
        draws: how many to make of each chain, or points `(R, chains, draws, *event)`.
        of: `of(at, rows, shape)`, where `at` is the log-density of the points as a function of
            beta, `rows` the betas `(R, 1, 1)` and `shape` the points' `(R, chains, m)`.
        run: the other arguments of `sample_ladder`.

    Returns:
        What it returns, joined along the last dimension, `(..., chains, draws)`.
    """
    parts: list[Tensor] = []

    def visit(x: Tensor) -> None:
        parts.append(of(profile(path, x), betas[:, None, None].to(x.device), x.shape[:3]))

    if not isinstance(draws, Tensor):
        _run(path, betas, draws, lambda i, x: visit(x.unsqueeze(2)), **run)
        return torch.cat(parts, -1)
    check_single_path(path)
    if draws.ndim < 3 or len(draws) != len(betas) or draws.numel() == 0:
        raise ValueError(
            f"draws must be a number of draws, or points (R, chains, draws, *event) with R = "
            f"{len(betas)} as there are betas; got {tuple(draws.shape)}"
        )
    for block in torch.split(draws, max(1, _BLOCK // (draws.shape[0] * draws.shape[1])), 2):
        visit(block)
    return torch.cat(parts, -1)
