"""The five contracts that hold the package together, and `sample`, which runs a kernel.

1. A *log-density* is any callable `(..., *event) -> (...)`, unnormalised allowed (`LogProb`).
2. A *kernel* is a pair of functions (`Kernel`): `state = kernel.init(x)` and
   `state, info = kernel.step(state, generator=g)`.
3. A *trace* is what `sample` returns (`Trace`): draws of shape `(chains, draws, *event)`.
4. An *annealing path* joins a tractable density to the target (`AnnealingPath`).
5. Every estimate of a partition function is a `LogZ`.

The input checks that all modules share are in `companion.inputs`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import Tensor

from companion.inputs import check_count, check_finite, check_generator, check_real

__all__ = [
    "AnnealingPath",
    "Info",
    "Kernel",
    "LogProb",
    "LogZ",
    "State",
    "Trace",
    "sample",
    "value_and_grad",
]

LogProb: TypeAlias = Callable[[Tensor], Tensor]
"""An unnormalised log-density, which maps `(..., *event)` to `(...)`."""


# ---------------------------------------------------------------- log-densities


def value_and_grad(log_prob: LogProb, x: Tensor) -> tuple[Tensor, Tensor]:
    """The log-density and its gradient at `x`, by the density's own method or by autograd.

    Args:
        log_prob: a `LogProb`; if it has a method `value_and_grad(x)`, that is used as it is.
        x: points, `(..., *event)`.

    Returns:
        `(log_prob(x), gradient)`, of shapes `(...)` and `(..., *event)`, both detached.

    >>> value_and_grad(lambda x: -0.5 * x.square().sum(-1), torch.tensor([[1.0, 2.0]]))
    (tensor([-2.5000]), tensor([[-1., -2.]]))
    """
    own = getattr(log_prob, "value_and_grad", None)
    if own is not None:
        value, grad = cast(tuple[Tensor, Tensor], own(x))
        return value.detach(), grad.detach()
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = log_prob(x)
        # Each chain's density depends on that chain alone, so the sum's gradient is every chain's.
        (grad,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), grad


# ---------------------------------------------------------------- kernels and traces


class State(Protocol):
    """Where the chains are. `.log_prob` is None for a kernel that never evaluates the density."""

    @property
    def x(self) -> Tensor:
        """The points, `(*chains, *event)`."""
        ...

    @property
    def log_prob(self) -> Tensor | None:
        """The log-density at `x`, `(*chains)`, or None."""
        ...


class Info(Protocol):
    """What a step did. Kernels may add fields; a boolean `is_nan` is counted by `sample`."""

    @property
    def accept_prob(self) -> Tensor:
        """The probability with which each chain's proposal was accepted, `(*chains)`."""
        ...

    @property
    def accepted(self) -> Tensor:
        """Whether each chain moved to its proposal, `(*chains)`, boolean."""
        ...


class Kernel(NamedTuple):
    """A Markov kernel: `state = init(x)`, then `state, info = step(state, generator=g)`."""

    init: Callable[[Tensor], Any]
    step: Callable[..., tuple[Any, Any]]


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


# ---------------------------------------------------------------- annealing paths and log Z


@runtime_checkable
class AnnealingPath(Protocol):
    """Unnormalised densities from a tractable base (beta = 0) to the target (beta = 1).

    `beta` is a number or a tensor that broadcasts over the leading dimensions. Betas ascend from 0
    to 1 and beta = 0 is exactly the base. A step never raises on a log-density of minus infinity.
    `step` is reversible with respect to its density, or the path also offers `reverse_step`. A path
    may offer `advance(x, beta, next_beta, *, generator) -> (x, log_weight_increment)`.
    """

    @property
    def base_log_z(self) -> Tensor | float:
        """Log of the base's normalising constant, known exactly."""
        ...

    def sample_base(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` exact draws from the base, `(n, *event)`."""
        ...

    def log_prob(self, x: Tensor, beta: Tensor | float) -> Tensor:
        """The unnormalised log-density at `beta`, `(..., *event) -> (...)`."""
        ...

    def step(
        self, x: Tensor, beta: Tensor | float, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """One Markov step that leaves the density at `beta` invariant."""
        ...


@dataclass(frozen=True, init=False, eq=False)
class LogZ:
    """An estimate of the logarithm of a partition function (or of a ratio of two).

    Attributes:
        value: log Z, a float64 tensor (a vector where a method gives several at once).
        std_error: standard error of `value`, a float64 tensor of its shape; 0 for exact methods.
        log_weights: log importance weights, float64, or None.
        ess: effective sample size, or None.
        converged: whether the method's own iteration converged.
        covariance: covariance of the entries of a vector `value`, or None.

    >>> LogZ(2.0, 0.1).interval()
    (tensor(1.8040, dtype=torch.float64), tensor(2.1960, dtype=torch.float64))
    """

    value: Tensor
    std_error: Tensor
    log_weights: Tensor | None = None
    ess: Tensor | None = None
    converged: bool = True
    covariance: Tensor | None = None

    def __init__(
        self,
        value: Tensor | float,
        std_error: Tensor | float,
        log_weights: Tensor | None = None,
        ess: Tensor | None = None,
        converged: bool = True,
        covariance: Tensor | None = None,
    ) -> None:
        as_float64 = {"value": value, "std_error": std_error, "log_weights": log_weights}
        as_float64 |= {"ess": ess, "covariance": covariance}
        like = value if isinstance(value, Tensor) else torch.zeros((), device="cpu")
        for name, given in as_float64.items():
            field = None
            if given is not None:
                field = torch.as_tensor(given, dtype=torch.float64, device=like.device)
            object.__setattr__(self, name, field)
        object.__setattr__(self, "std_error", self.std_error.expand(self.value.shape))
        object.__setattr__(self, "converged", converged)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """The normal confidence interval `value -/+ z std_error` of the given level."""
        check_real("level", level, minimum=0.0, maximum=1.0)
        half = NormalDist().inv_cdf(0.5 + level / 2.0) * self.std_error
        return self.value - half, self.value + half
