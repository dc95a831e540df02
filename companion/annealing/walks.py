"""Chains on their way along a schedule, and whether what they bring can be trusted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from companion.core import AnnealingPath, LogZ
from companion.importance.weights import pareto_k, pareto_limit
from companion.storage import Checkpoint

__all__ = ["Walk", "base_log_z", "trial", "warn_if_few_count"]

_LARGEST_ERROR = 0.3  # of log Z: the effective sample size is then about ten
_TAIL = 200  # weights that tell a heavy tail
_MOST = 10**6  # weights looked at: quantiles of more than 2^24 are refused by PyTorch


class Walk:
    """Chains on their way along a schedule, and the sums of their increments so far."""

    def __init__(self) -> None:
        self.x = self.log_weights = torch.empty(0, device="cpu")
        self.steps = 0
        self._device: torch.device | None = None

    def begin(self, x: Tensor, path: AnnealingPath) -> None:
        self.x = x
        chains = x.shape[: torch.as_tensor(path.base_log_z).ndim + 1]
        self.log_weights = torch.zeros(chains, dtype=torch.float64, device=x.device)

    def run(
        self,
        betas: Sequence[float],
        move: Callable[[Tensor, float, float], tuple[Tensor, Tensor]],
        progress: bool,
        saved: Checkpoint | None = None,
        save_every: int = 1,
    ) -> Tensor:
        """The sums of the increments at the end, chains first."""
        from tqdm import tqdm

        last = len(betas) - 1
        with tqdm(total=last, initial=self.steps, disable=not progress) as bar:
            for k in range(self.steps, last):
                x, increment = move(self.x, betas[k], betas[k + 1])
                # Contiguous, as it comes back from a checkpoint: sums depend on the layout.
                self.x, self.log_weights = x.contiguous(), self.log_weights + increment
                self.steps = k + 1
                if saved is not None and (self.steps % save_every == 0 or self.steps == last):
                    saved.save()
                bar.update()
        return self.log_weights.movedim(-1, 0)

    def state_dict(self) -> dict[str, Any]:
        device = str(self.x.device)
        return {"x": self.x, "log_weights": self.log_weights, "steps": self.steps, "on": device}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.x, self.log_weights = (state[name].to(state["on"]) for name in ("x", "log_weights"))
        self.steps = state["steps"]


def base_log_z(path: AnnealingPath, like: Tensor) -> Tensor:
    """The path's constant at beta = 0, float64 on the device of `like`."""
    return torch.as_tensor(path.base_log_z, dtype=torch.float64, device=like.device)


def trial(path: AnnealingPath, device: torch.device) -> str:
    """What tells one path from another: where a step leads, and the densities there."""
    own = torch.Generator(device).manual_seed(0)
    x = path.step(path.sample_base(8, generator=own), 1.0, generator=own)
    sizes = [x.double(), path.log_prob(x, 0.0), path.log_prob(x, 1.0)]
    told = ", ".join(f"{float(size.double().abs().mean()):.6g}" for size in sizes)
    return f"{tuple(x.shape[1:])} of {x.dtype}, {told}"


def warn_if_few_count(log_z: LogZ, sign: int, *, stacklevel: int) -> None:
    """Warn if too few chains count: as the weights have it, or as their spread makes it likely.

    Where the largest weights have not been met, the effective sample size is too large. If it is
    below a fifth already, we look at the spread of the log weights in the middle, which is well
    known: normal ones of variance s^2 would have an effective sample size of `n exp(-s^2)`. If it
    is below a half, we look at the tail: above the limit of k-hat the weights may have no variance.
    """
    assert log_z.log_weights is not None and log_z.ess is not None
    n = len(log_z.log_weights)
    log_weights = sign * log_z.log_weights[:_MOST]
    alive = log_weights.where(log_weights > -torch.inf, torch.nan)
    quantiles = alive.new_tensor([0.5, 0.841])  # the mean and one s above, of a normal law
    middle, above = alive.nanquantile(quantiles, 0)
    of_normal = n * (-(above - middle).square()).exp()
    ess = torch.where(log_z.ess < 0.2 * n, torch.minimum(log_z.ess, of_normal), log_z.ess)
    few = 1.0 / ess - 1.0 / n > _LARGEST_ERROR**2
    limit = pareto_limit(len(log_weights))
    k = _tails(log_weights, log_z.ess < 0.5 * n)
    suspect = few | (k > limit)
    if suspect.any():
        several = ""
        if log_z.value.ndim:
            several = f"in {int(suspect.sum())} of {suspect.numel()} machines "
        found = (
            f"the effective sample size {several}is {float(ess.min()):.1g} of {n} chains, by their "
            "weights or by the spread of these"
        )
        if not few.any():
            found = (
                f"the tail of the weights {several}is too heavy: k-hat is up to "
                f"{float(k[k > limit].max()):.2f} (limit {limit:.2f}), and they may have no "
                "variance"
            )
        warnings.warn(
            f"{found}: log Z may be too {'low' if sign > 0 else 'high'} "
            "by far more than its standard error. Take more betas, or a base nearer to the target "
            "(for a trained RBM, annealing_path with the log-odds of the data's unit means)",
            stacklevel=stacklevel,
        )


def _tails(log_weights: Tensor, where: Tensor) -> Tensor:
    """k-hat of the problems asked for, `(*machines)`, and minus infinity elsewhere.

    From so many weights on that log-normal ones rarely look as if they had no variance.
    """
    k = torch.full_like(log_weights[0], -torch.inf)
    where = where & (log_weights > -torch.inf).any(0)
    if len(log_weights) >= _TAIL and where.any():
        k[where] = pareto_k(log_weights[:, where])
    return k
