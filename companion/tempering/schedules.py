"""Schedules: the betas at which an annealing path is visited, ascending from 0 to 1.

How finely, matters most; where, comes second: the steps should be short where neighbouring
densities differ most. With a base much wider than the target that is near beta = 0 (`geometric`),
with a model whose units start at random often at both ends (`sigmoid`). `tune_ladder` and the
adaptive schedule of `companion.annealing.smc` measure it instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from companion.inputs import check_count, check_finite, check_real

__all__ = ["check_betas", "geometric_schedule", "linear_schedule", "sigmoid_schedule"]


def linear_schedule(num: int, *, device: torch.device | str | None = None) -> Tensor:
    """`num` betas at equal distances, from 0 to 1.

    Args:
        num: number of betas, at least 2.
        device: where the betas are made.

    Returns:
        `(num,)`, float64.

    >>> linear_schedule(5)
    tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    check_count("num", num, minimum=2)
    return torch.linspace(0.0, 1.0, num, dtype=torch.float64, device=device)


def geometric_schedule(
    num: int, smallest: float, *, device: torch.device | str | None = None
) -> Tensor:
    """0, and then `num - 1` betas from `smallest` to 1, each the same multiple of the one before.

    This is even in the logarithm of the temperature 1 / beta. Of a normal law whose base is flat,
    it makes all swaps of parallel tempering equally probable.

    Args:
        num: number of betas, at least 3.
        smallest: the first beta after 0, between 0 and 1.
        device: where the betas are made.

    Returns:
        `(num,)`, float64.

    >>> geometric_schedule(5, 0.001)
    tensor([0.0000, 0.0010, 0.0100, 0.1000, 1.0000], dtype=torch.float64)
    """
    check_count("num", num, minimum=3)
    check_real("smallest", smallest, minimum=0.0, maximum=1.0)
    power = torch.linspace(1.0, 0.0, num - 1, dtype=torch.float64, device=device)
    return torch.cat([power.new_zeros(1), smallest**power])


def sigmoid_schedule(
    num: int, steepness: float = 4.0, *, device: torch.device | str | None = None
) -> Tensor:
    """`num` betas that are close to each other near 0 and near 1: a logistic curve, scaled.

    With u from -1 to 1 at equal distances, `beta = (sigmoid(s u) - sigmoid(-s)) / (sigmoid(s) -
    sigmoid(-s))`; the first step is about `2 s e^-s` times that of the linear schedule if s, the
    steepness, is large and the steps are many.

    Args:
        num: number of betas, at least 2.
        steepness: s, positive; towards 0 the schedule becomes linear.
        device: where the betas are made.

    Returns:
        `(num,)`, float64, symmetric: `beta_i + beta_{n-1-i} = 1`.

    >>> sigmoid_schedule(5)
    tensor([0.0000, 0.1050, 0.5000, 0.8950, 1.0000], dtype=torch.float64)
    """
    check_count("num", num, minimum=2)
    check_real("steepness", steepness, minimum=0.0)
    u = torch.linspace(-1.0, 1.0, num, dtype=torch.float64, device=device)
    # sigmoid(s u) - 1/2 = tanh(s u / 2) / 2
    return 0.5 * (1.0 + (0.5 * steepness * u).tanh() / (0.5 * steepness * u[-1]).tanh())


def check_betas(
    betas: Tensor | Sequence[float], device: torch.device, *, from_zero: bool = False
) -> Tensor:
    """Return betas as `(n,)`, float64 on `device`, or raise unless they ascend to 1.

    Args:
        betas: at least one, strictly ascending, the last one 1.
        device: where they are needed.
        from_zero: whether the first one must be 0, and there must be two.

    Raises:
        ValueError: betas that do not.
    """
    betas = torch.as_tensor(betas, dtype=torch.float64, device=device).detach()
    check_finite("betas", betas)
    start = "from 0" if from_zero else "from 0 or above"
    if betas.ndim != 1 or len(betas) < 1 + from_zero:
        raise ValueError(
            f"betas must be one row of numbers that ascend {start} to 1, got {tuple(betas.shape)}"
        )
    first = float(betas[0])
    if (first != 0.0 if from_zero else first < 0.0) or betas[-1] != 1.0:
        raise ValueError(f"betas must ascend {start} to 1, got {first:g} to {float(betas[-1]):g}")
    wrong = (betas.diff() <= 0.0).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(
            f"betas must ascend, each above the last; betas {i} and {i + 1} are "
            f"{float(betas[i]):g} and {float(betas[i + 1]):g}"
        )
    return betas
