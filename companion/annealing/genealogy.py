"""Who descends from whom in a population that is resampled again and again."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["lineage", "num_ancestors"]


def lineage(ancestors: Tensor) -> Tensor:
    """The ancestors of the last generation in every generation before it.

    Args:
        ancestors: `(stages, n, *batch)`, integers: particle i of generation t + 1 descends from
            particle `ancestors[t, i]` of generation t.

    Returns:
        `(stages + 1, n, *batch)`: entry `[t, i]` is the ancestor in generation t of particle i of
        the last one. The last row is 0, 1, ..., n - 1; the first one tells the founder of each
        particle's family.

    Raises:
        ValueError: ancestors that are no integers from 0 to n - 1.

    >>> lineage(torch.tensor([[0, 0, 1], [1, 2, 2]]))
    tensor([[0, 1, 1],
            [1, 2, 2],
            [0, 1, 2]])
    """
    _check_integers("ancestors", ancestors)
    n = ancestors.shape[1]
    if ancestors.min() < 0 or ancestors.max() >= n:
        raise ValueError(
            f"ancestors must be from 0 to n - 1 = {n - 1}, got {int(ancestors.min())} to "
            f"{int(ancestors.max())}"
        )
    latest = torch.arange(n, device=ancestors.device)
    rows = [latest.reshape(n, *(1,) * (ancestors.ndim - 2)).expand(ancestors.shape[1:])]
    for stage in ancestors.long().flip(0):
        rows.append(stage.gather(0, rows[-1]))
    return torch.stack(rows[::-1])


def num_ancestors(lines: Tensor) -> Tensor:
    """How many particles of each generation have descendants in the last one.

    If weights never differ, n independent choices (multinomial resampling) leave on average
    `n (1 - (1 - 1/n)^n)` of n, about 63 per cent, with descendants in the next generation, and some
    2 n generations back all have one ancestor.

    Args:
        lines: `(stages + 1, n, *batch)`, from `lineage`.

    Returns:
        `(stages + 1, *batch)`, int64; it never falls from one generation to the next.

    Raises:
        ValueError: lines that are no integers of that shape.

    Reference: Kingman (1982), *The coalescent*.

    >>> num_ancestors(lineage(torch.tensor([[0, 0, 1], [1, 2, 2]])))
    tensor([2, 2, 3])
    """
    _check_integers("lines", lines)
    ordered = lines.sort(1).values
    return 1 + (ordered.diff(dim=1) != 0).sum(1)


def _check_integers(name: str, x: Tensor) -> None:
    if x.is_floating_point() or x.is_complex() or x.ndim < 2 or x.numel() == 0:
        raise ValueError(
            f"{name} must be integers (stages, n, *batch), got {tuple(x.shape)} of {x.dtype}"
        )
