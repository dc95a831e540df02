"""The third contract: `sample` runs a kernel and returns a `Trace`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from companion.core.contracts import Kernel
from companion.inputs import check_count, check_finite, check_generator

__all__ = ["Trace", "sample"]


@dataclass(frozen=True, eq=False)
class Trace:
    """The draws of `sample`.

    Attributes:
        x: draws, `(*chains, draws, *event)`, so `(chains, draws, *event)` for one batch of chains.
        log_prob: log-density of each draw, `(*chains, draws)`, or None.
        accept_prob: acceptance probability of each chain, averaged over all steps after warm-up,
            `(*chains)`.
        num_nan: number of proposals of each chain after warm-up whose log-density was NaN (they are
            rejected), `(*chains)`.
    """

    x: Tensor
    log_prob: Tensor | None
    accept_prob: Tensor
    num_nan: Tensor

    def to_arviz(self) -> Any:
        """The trace as an `xarray.DataTree` in ArviZ's layout (needs the package `arviz-base`).

        Returns:
            groups `posterior` (variable `x`) and `sample_stats` (`lp`, where known); several chain
            dimensions are flattened into one.
        """
        from arviz_base import from_dict  # slow to import

        ndim = self.accept_prob.ndim
        chains = (self.accept_prob.numel(),)
        groups = {"posterior": {"x": self.x.reshape(chains + self.x.shape[ndim:]).cpu().numpy()}}
        if self.log_prob is not None:
            log_prob = self.log_prob.reshape(chains + self.log_prob.shape[ndim:])
            groups["sample_stats"] = {"lp": log_prob.cpu().numpy()}
        # Hundreds of chains of few draws are meant: ArviZ takes them for swapped dimensions.
        return from_dict(groups, check_conventions=False)


@torch.no_grad()  # else a model's parameters would keep the graph of every step
def sample(
    kernel: Kernel,
    x0: Tensor,
    num_draws: int,
    *,
    warmup: int = 0,
    thin: int = 1,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Trace:
    """Run a batch of Markov chains and keep `num_draws` draws of each.

    Args:
        kernel: the Markov kernel.
        x0: starting points, `(*chains, *event)`.
        num_draws: draws kept of each chain.
        warmup: steps made and thrown away first.
        thin: steps a kept draw; `num_draws * thin` steps follow the warm-up.
        generator: source of randomness, on the device of `x0`.
        progress: show a progress bar.

    Returns:
        A `Trace`; `x` has shape `(*chains, draws, *event)`.

    Raises:
        ValueError: a count out of range, a NaN in `x0`, a generator on another device, or (from the
            kernel's `init`) a start where the log-density is not finite.

    >>> def step(state, *, generator):                    # an exact sampler is a kernel, too
    ...     x = torch.randn(state.x.shape, generator=generator)
    ...     one = torch.ones(x.shape)
    ...     return Point(x, None), Moved(one, one.bool())
    >>> from collections import namedtuple
    >>> Point = namedtuple("Point", "x log_prob")
    >>> Moved = namedtuple("Moved", "accept_prob accepted")
    >>> kernel = Kernel(lambda x: Point(x, None), step)
    >>> sample(kernel, torch.zeros(4), 10, generator=torch.Generator().manual_seed(0)).x.shape
    torch.Size([4, 10])
    """
    check_count("num_draws", num_draws)
    check_count("warmup", warmup, minimum=0)
    check_count("thin", thin)
    check_finite("x0", x0)
    check_generator(generator, x0.device)
    state = kernel.init(x0)
    bar = _progress_bar(warmup + num_draws * thin, progress)
    for _ in range(warmup):
        state, _ = kernel.step(state, generator=generator)
        bar.update()
    xs, log_probs = [], []
    accept_sum: Any = 0.0  # tensors from the first step on
    num_nan: Any = 0
    for i in range(num_draws * thin):
        state, info = kernel.step(state, generator=generator)
        accept_sum = accept_sum + info.accept_prob
        num_nan = num_nan + getattr(info, "is_nan", torch.zeros_like(info.accepted)).long()
        if (i + 1) % thin == 0:
            xs.append(state.x)
            log_probs.append(state.log_prob)
        bar.update()
    bar.close()
    accept_prob: Tensor = accept_sum / (num_draws * thin)
    chain_dims = accept_prob.ndim  # draws go right behind the chains
    if num_nan.any():
        warnings.warn(
            f"{int(num_nan.sum())} proposals had a NaN log-density and were rejected "
            f"(in {int((num_nan > 0).sum())} of {num_nan.numel()} chains)",
            stacklevel=2,
        )
    return Trace(
        x=torch.stack(xs, chain_dims),
        log_prob=None if log_probs[0] is None else torch.stack(log_probs, chain_dims),
        accept_prob=accept_prob,
        num_nan=num_nan,
    )


def _progress_bar(total: int, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, disable=not show)
