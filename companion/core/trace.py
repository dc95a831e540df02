"""The third contract: `sample` runs a kernel and returns a `Trace`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from companion.core.contracts import Kernel
from companion.core.runs import PROBABILITY_UNITS, Run, moves, open_checkpoint
from companion.inputs import check_count, check_finite, check_generator

__all__ = ["Trace", "sample"]


@dataclass(frozen=True, eq=False)
class Trace:
    """The draws of `sample`.

    Attributes:
        x: draws, `(*chains, draws, *event)`, so `(chains, draws, *event)` for one batch of chains.
        log_prob: log-density of each draw, `(*chains, draws)`, or None.
        accept_prob: acceptance probability of each chain, averaged over all steps after warm-up,
            `(*chains)`, float64.
        num_nan: number of proposals of each chain after warm-up whose log-density was NaN (they are
            rejected), `(*chains)`.
        num_divergent: number of steps of each chain after warm-up whose trajectory diverged,
            `(*chains)`; 0 for kernels that do not know.
        stats: what else the kernel tells of the step that led to each draw, by name, such as
            `energy`, `num_steps`, `tree_depth`, `is_divergent`, `(*chains, draws)`.
    """

    x: Tensor
    log_prob: Tensor | None
    accept_prob: Tensor
    num_nan: Tensor
    num_divergent: Tensor
    stats: dict[str, Tensor]

    def to_arviz(self) -> Any:
        """The trace as an `xarray.DataTree` in ArviZ's layout (needs the package `arviz-base`).

        Several chain dimensions are flattened into one.

        Returns:
            groups `posterior` (variable `x`) and `sample_stats`, under the names that ArviZ knows:
            `lp`, `diverging`, `energy`, `n_steps`, `tree_depth`, and `acceptance_rate`, which is
            one number a chain.
        """
        from arviz_base import from_dict  # slow to import
        from xarray import DataArray

        known = {"log_prob": "lp", "is_divergent": "diverging", "num_steps": "n_steps"}
        stats = self.stats if self.log_prob is None else {"log_prob": self.log_prob, **self.stats}
        groups = {"posterior": {"x": self._flat(self.x)}}
        if stats:
            groups["sample_stats"] = {known.get(k, k): self._flat(s) for k, s in stats.items()}
        # Hundreds of chains of few draws are meant: ArviZ takes them for swapped dimensions.
        tree = from_dict(groups, check_conventions=False)
        if stats:
            rate = self.accept_prob.reshape(-1).cpu().numpy()
            tree["sample_stats/acceptance_rate"] = DataArray(rate, dims="chain")
        return tree

    def _flat(self, x: Tensor) -> Any:
        """As an array with one chain dimension."""
        ndim = self.accept_prob.ndim
        return x.reshape(self.accept_prob.numel(), *x.shape[ndim:]).cpu().numpy()


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
    callback: Callable[[int, Any, Any], object] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int = 1000,
) -> Trace:
    """Run a batch of Markov chains and keep `num_draws` draws of each.

    With `checkpoint`, the run is saved every so many steps and at its end. Call `sample` again with
    the same arguments, in a new process or the same, and it goes on from there: the trace is bit
    for bit that of a run that was never killed. A finished run returns at once; a larger
    `num_draws` prolongs it. The file `checkpoint` holds the chains' and the generator's state; the
    draws lie beside it, in files `checkpoint.draws-00000` and so on, each written once.

    Args:
        kernel: the Markov kernel.
        x0: starting points, `(*chains, *event)`.
        num_draws: draws kept of each chain.
        warmup: steps made and thrown away first.
        thin: steps a kept draw; `num_draws * thin` steps follow the warm-up.
        generator: source of randomness, on the device of `x0`.
        progress: show a progress bar.
        callback: `callback(i, state, info)` is called after draw i (from 0), without gradients.
            What it returns is ignored; what it raises ends the run. After a resume it sees again
            the draws since the last save.
        checkpoint: file that the run is saved to and resumed from; needs a generator.
        save_every: steps between two saves, warm-up included.

    Returns:
        A `Trace`; `x` has shape `(*chains, draws, *event)`.

    Raises:
        ValueError: a count out of range, a NaN in `x0`, a generator on another device, a checkpoint
            of another run (as far as the arguments and, to four digits, a step from `x0` tell), or
            (from the kernel's `init`) a start where the log-density is not finite.
        TypeError: an argument of the wrong type, or a checkpoint without a generator.

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
    from tqdm import tqdm

    check_count("num_draws", num_draws)
    check_count("warmup", warmup, minimum=0)
    check_count("thin", thin)
    check_count("save_every", save_every)
    check_finite("x0", x0)
    check_generator(generator, x0.device)
    num_steps = warmup + num_draws * thin
    path = None if checkpoint is None else Path(checkpoint)
    run = Run(kernel.init(x0), num_draws, num_steps, path)
    saved = None
    if path is not None:
        if generator is None:
            raise TypeError("a checkpoint needs a generator: torch.Generator(device)")
        settings = {"warmup": warmup, "thin": thin}
        saved = open_checkpoint(path, run, kernel, x0, generator, settings)
        saved.resume()

    first, every = run.steps, save_every if saved else num_steps
    with tqdm(total=num_steps, initial=first, disable=not progress) as bar:
        walk = moves(kernel, run.state, range(first, num_steps), every, generator)
        for step, (state, info) in enumerate(walk, first + 1):
            if step > warmup:
                draw, remainder = divmod(step - warmup, thin)
                run.add(state, info, keep=remainder == 0)
                if callback is not None and remainder == 0:
                    callback(draw - 1, state, info)
            if saved is not None and (step % save_every == 0 or step == num_steps):
                run.write_block()
                run.state, run.steps = state, step
                run.save_draws()
                saved.save()
            bar.update()
    run.write_block()

    counts = run.counts
    none = torch.zeros_like(counts["accept_prob"])
    # They were written draw by draw; as a view, the draws go right behind the chains.
    draws = {name: column.movedim(0, none.ndim) for name, column in run.draws.items()}
    num_nan = counts.get("is_nan", none)
    if num_nan.any():
        warnings.warn(
            f"{int(num_nan.sum())} proposals had a NaN log-density (or an infinite one) and were "
            f"rejected (in {int((num_nan > 0).sum())} of {num_nan.numel()} chains)",
            stacklevel=3,  # seen from the caller of the decorated function
        )
    return Trace(
        x=draws.pop("x"),
        log_prob=draws.pop("log_prob", None),
        accept_prob=counts["accept_prob"].double() / (PROBABILITY_UNITS * num_draws * thin),
        num_nan=num_nan,
        num_divergent=counts.get("is_divergent", none.clone()),
        stats=draws,
    )
