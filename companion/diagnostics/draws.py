"""The draws of chains, checked, and their way to arviz-stats and back."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from companion.core import Trace

__all__ = [
    "array_stats",
    "checked_draws",
    "columns_of",
    "event_of",
    "is_constant",
    "is_stuck",
    "stuck_note",
    "warn",
]

_FEWEST = 4  # draws a chain: two in each half


def checked_draws(x: Tensor | Trace) -> Tensor:
    """The draws in float64, `(chains, draws, *event)`, or raise a sentence."""
    if isinstance(x, Trace):
        chains = x.accept_prob.ndim
        x = x.x.reshape(-1, *x.x.shape[chains:])
    if not isinstance(x, Tensor):
        raise TypeError(f"expected draws as a tensor, or a Trace; got {type(x).__name__}")
    if x.is_complex():
        raise TypeError("complex draws; take the real and the imaginary part one at a time")
    if x.ndim < 2 or x.numel() == 0:
        hint = "; one chain of shape (draws,) is x[None]" if x.ndim == 1 else ""
        raise ValueError(
            "expected draws of shape (chains, draws, *event), with one or more of each; got "
            f"{tuple(x.shape)}{hint}"
        )
    if x.shape[1] < _FEWEST:
        raise ValueError(
            f"{x.shape[1]} draws a chain are too few, {_FEWEST} are the least; the shape must "
            f"be (chains, draws, *event), and is {tuple(x.shape)}"
        )
    wrong = ~x.isfinite()
    if wrong.any():
        chain, draw, *rest = wrong.nonzero()[0].tolist()
        where = f", coordinate {tuple(rest)}" if rest else ""
        raise ValueError(
            f"{int(wrong.sum())} of {x.numel()} draws are NaN or infinite, the first in chain "
            f"{chain}, draw {draw}{where}: find out why before you leave them out"
        )
    return x.detach().double()


def is_constant(draws: Tensor) -> Tensor:
    """Which chains never moved, `(chains, *event)`."""
    return draws.amax(1) == draws.amin(1)


def is_stuck(draws: Tensor) -> Tensor:
    """The coordinates in which some chain never moved, `(*event)`."""
    return is_constant(draws).any(0)


def stuck_note(draws: Tensor) -> str | None:
    """A sentence on the coordinates in which a chain never moved, or None."""
    stuck = is_stuck(draws)
    if not stuck.any():
        return None
    chain, *rest = is_constant(draws).nonzero()[0].tolist()
    first = f"chain {chain}" + (f" at coordinate {tuple(rest)}" if rest else "")
    return (
        f"in {int(stuck.sum())} of {stuck.numel()} coordinates a chain is constant (the first is "
        f"{first}): nothing can be said of its effective sample size or errors"
    )


def warn(note: str | None) -> None:
    """Warn, if there is a note, as seen from the caller of the function that calls this one."""
    if note is not None:
        warnings.warn(note, stacklevel=3)


# ---------------------------------------------------------------- to arviz-stats and back


def array_stats() -> Any:
    """What arviz-stats offers for plain arrays."""
    from arviz_stats.base.array import array_stats as stats  # slow to import

    return stats


def columns_of(draws: Tensor) -> Any:
    """The coordinates one after another, `(coordinates, chains, draws)`."""
    return draws.reshape(*draws.shape[:2], -1).movedim(-1, 0).cpu().numpy()


def event_of(values: Any, draws: Tensor) -> Tensor:
    """One number a coordinate, back in the event's shape, on the device of the draws."""
    values = torch.from_numpy(np.asarray(values, dtype=np.float64))
    return values.reshape(draws.shape[2:]).to(draws.device)
