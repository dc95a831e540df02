"""Annealing paths (contract 4): densities that lead from one you can draw from to the target.

Every method of this part takes a path and nothing else. `GeometricPath` makes one of any two
densities and any Markov kernel; models with exact conditionals have paths of their own
(`RBM.annealing_path`, `Ising.annealing_path`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributions import Distribution

from companion.core import Kernel, LogProb, LogZ, value_and_grad
from companion.inputs import Sampler, check_count, check_generator, draw
from companion.mcmc.base import expand

__all__ = ["GeometricPath", "likelihood_path"]


class GeometricPath:
    """The geometric path between two densities, and a kernel that moves along it.

        log p~_beta(x) = (1 - beta) log base(x) + beta log_prob(x),      0 <= beta <= 1

    At beta = 0 this is exactly the base and at beta = 1 exactly the target, also where the other
    one is zero. The base must be positive wherever the target is: what it leaves out is missing in
    every estimate of log Z by weights. Only the density is tempered: what a kernel proposes, and
    the momentum of a Hamiltonian one, stay as they are.

    A step makes `num_steps` steps of the kernel and costs one evaluation of both densities more
    than these. A point whose density is zero (log-density minus infinity) raises nothing: it
    wanders until it finds a place where the density is positive. One whose log-density is NaN
    raises a ValueError, by most kernels; a proposal with a NaN is rejected.

    Args:
        base: what can be drawn from: a `torch.distributions` object with one number a point
            (`Independent(Normal(...), 1)`), or an object with `sample(n, generator=)` and
            `log_prob`; if that has `log_z`, its log-density is taken to be unnormalised.
        log_prob: the target's unnormalised log-density, `(*chains, *event) -> (*chains)`. With
            methods `value_and_grad` here and in the base, gradients come from these.
        kernel: makes the kernel for one density, `kernel(log_prob)` or `kernel(log_prob, beta)`,
            where `beta` is a tensor that broadcasts over the chains: for a step size that is larger
            where the density is flatter, say.
        num_steps: steps of the kernel a step of the path.
        reverse_kernel: likewise, makes the reversal of a kernel that is not reversible (a
            `cycle`, a systematic Gibbs sweep). A kernel without one is taken to be reversible.

    Attributes:
        base_log_z: log of the base's normalising constant, a float64 tensor.

    Raises:
        TypeError: a base, density or kernel that is none.
        ValueError: a base with a batch shape, or whose log-density does not fit the target's.

    Reference: Gelman and Meng (1998), *Simulating normalizing constants: from importance sampling
    to bridge sampling to path sampling*.

    >>> from companion.mcmc import random_walk
    >>> from torch.distributions import Independent, Normal
    >>> base = Independent(Normal(torch.zeros(2), 3.0), 1)
    >>> def log_prob(x):
    ...     return -0.5 * (x - 1.0).square().sum(-1)
    >>> path = GeometricPath(base, log_prob, lambda density: random_walk(density, 1.0))
    >>> g = torch.Generator().manual_seed(0)
    >>> x = path.sample_base(5, generator=g)
    >>> ladder = torch.tensor([0.0, 0.5, 1.0])[:, None]            # every point at three betas
    >>> path.log_prob(x, ladder).shape, path.step(x, 0.5, generator=g).shape
    (torch.Size([3, 5]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        base: Distribution | Sampler,
        log_prob: LogProb,
        kernel: Callable[..., Kernel],
        *,
        num_steps: int = 1,
        reverse_kernel: Callable[..., Kernel] | None = None,
    ) -> None:
        for name, function in {"log_prob": log_prob, "kernel": kernel}.items():
            if not callable(function):
                raise TypeError(f"{name} must be a function, got {type(function).__name__}")
        self.base, self.target = base, log_prob
        self.num_steps = check_count("num_steps", num_steps)
        self._kernel = _accepting_beta("kernel", kernel)
        self._reverse = self._kernel
        if reverse_kernel is not None:
            self._reverse = _accepting_beta("reverse_kernel", reverse_kernel)
        self._base = _Base(base)
        self.base_log_z = self._base.log_z
        x = self._base.inside.expand(2, *self._base.inside.shape)
        shapes = [tuple(density(x).shape) for density in (self._base, log_prob)]
        if shapes != [(2,), (2,)]:
            raise ValueError(
                f"base and log_prob must give one number a point: for points {tuple(x.shape)} they "
                f"gave {shapes[0]} and {shapes[1]}, expected (2,). Wrap a distribution of "
                "independent coordinates in torch.distributions.Independent(base, 1)"
            )

    def sample_base(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` exact draws from the base, `(n, *event)`."""
        check_generator(generator, self._base.inside.device)
        return draw(self.base, n, generator=generator)

    def log_prob(self, x: Tensor, beta: Tensor | float) -> Tensor:
        """`log p~_beta(x)`, `(*chains, *event) -> (*chains)`.

        A tensor `beta` broadcasts over the chains, and may have further dimensions before them:
        both densities are evaluated once all the same.
        """
        if not isinstance(beta, Tensor) and beta in (0, 1):  # then the other density is not needed
            return self._base(x) if beta == 0 else self.target(x)
        return _mix(self._base(x), self.target(x), beta)

    def profile(self, x: Tensor) -> Callable[[Tensor | float], Tensor]:
        """The log-density at `x` as a function of beta, in float64: evaluates each density once."""
        base, target = self._base(x).double(), self.target(x).double()
        return lambda beta: _mix(base, target, beta)

    def step(
        self, x: Tensor, beta: Tensor | float, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """`num_steps` steps of the kernel for the density at `beta`, `(*chains, *event)`."""
        return self._run(self._kernel, x, beta, generator)

    def reverse_step(
        self, x: Tensor, beta: Tensor | float, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The reversal of `step`: the same, unless there is a `reverse_kernel`."""
        return self._run(self._reverse, x, beta, generator)

    @torch.no_grad()
    def _run(
        self,
        make: Callable[[LogProb, Tensor], Kernel],
        x: Tensor,
        beta: Tensor | float,
        generator: torch.Generator | None,
    ) -> Tensor:
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        kernel = make(_Tempered(self, beta), torch.as_tensor(beta, dtype=dtype, device=x.device))
        state = kernel.init(x)
        for _ in range(self.num_steps):
            state, _ = kernel.step(state, generator=generator)
        return cast(Tensor, state.x)


def likelihood_path(
    prior: Distribution | Sampler,
    log_likelihood: LogProb,
    kernel: Callable[..., Kernel],
    *,
    num_steps: int = 1,
    reverse_kernel: Callable[..., Kernel] | None = None,
) -> GeometricPath:
    """The path from a prior to the posterior: the likelihood to the power of beta.

        log p~_beta(x) = log prior(x) + beta log_likelihood(x)

    It is the geometric path from the prior to the posterior. With a normalised prior, log Z at
    beta = 1 is the log evidence (marginal likelihood).

    Args:
        prior: as the base of a `GeometricPath`.
        log_likelihood: `(*chains, *event) -> (*chains)`, with all its constants if log Z is wanted.
        kernel: as there; so are `num_steps` and `reverse_kernel`.

    Returns:
        A `GeometricPath`.

    Raises:
        TypeError, ValueError: as there.

    >>> from companion.mcmc import random_walk
    >>> prior = torch.distributions.Normal(0.0, 1.0)
    >>> path = likelihood_path(prior, lambda x: -0.5 * (x - 2.0).square(),
    ...                        lambda density: random_walk(density, 1.0))
    >>> path.log_prob(torch.tensor([2.0]), 0.5) == prior.log_prob(torch.tensor([2.0]))
    tensor([True])
    """
    density = _Base(prior)

    def posterior(x: Tensor) -> Tensor:
        return density(x) + log_likelihood(x)

    return GeometricPath(
        prior, posterior, kernel, num_steps=num_steps, reverse_kernel=reverse_kernel
    )


# ---------------------------------------------------------------- inside


class _Base:
    """The base's log-density, which is minus infinity outside of its support, and its log Z."""

    def __init__(self, base: Any) -> None:
        if not (hasattr(base, "log_prob") and hasattr(base, "sample")):
            raise TypeError(
                "base must be a torch.distributions object or have sample(n, generator=) and "
                f"log_prob, got {type(base).__name__}"
            )
        self.base = base
        self.support: Any = None
        log_z: Any = getattr(base, "log_z", 0.0)
        if isinstance(base, Distribution):
            if base.batch_shape:
                raise ValueError(
                    f"base has the batch shape {tuple(base.batch_shape)}: a path needs one density."
                    " Wrap it in torch.distributions.Independent"
                )
            log_z = 0.0
            if base.support is not torch.distributions.constraints.real:
                self.support = base.support
        log_z = log_z() if callable(log_z) else log_z
        self.log_z = torch.as_tensor(
            log_z.value if isinstance(log_z, LogZ) else log_z, dtype=torch.float64, device="cpu"
        )
        # A point of the support: torch.distributions raise on points outside of it. Which point and
        # on what device is the base's affair, and the global generators are left as they were.
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices=devices):
            self.inside = draw(base, 1)[0]

    def __call__(self, x: Tensor) -> Tensor:
        if self.support is None:
            return cast(Tensor, self.base.log_prob(x))
        inside = cast(Tensor, self.support.check(x))
        value = self.base.log_prob(torch.where(expand(inside, x), x, self.inside))
        return torch.where(inside, value, -torch.inf)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if hasattr(self.base, "value_and_grad"):
            return cast(tuple[Tensor, Tensor], self.base.value_and_grad(x))
        with torch.enable_grad():
            if not self(x.detach().requires_grad_()).requires_grad:  # it is flat: a uniform law
                return self(x), torch.zeros_like(x)
        return value_and_grad(self.__call__, x)


class _Tempered:
    """The density at one beta as the kernel sees it.

    Minus infinity becomes the lowest finite number: no kernel refuses to start there, every
    proposal of positive density is accepted from there, and none from elsewhere leads there.
    """

    def __init__(self, path: GeometricPath, beta: Tensor | float) -> None:
        self.path, self.beta = path, beta

    def __call__(self, x: Tensor) -> Tensor:
        value = self.path.log_prob(x, self.beta)
        return value.clamp(min=0.25 * torch.finfo(value.dtype).min)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        base, base_grad = value_and_grad(self.path._base, x)
        target, target_grad = value_and_grad(self.path.target, x)
        value = _mix(base, target, self.beta)
        beta = self.beta
        if isinstance(beta, Tensor):
            beta = expand(beta.to(value).expand(value.shape), x)
        grad = torch.where(expand(value > -torch.inf, x), _mix(base_grad, target_grad, beta), 0.0)
        return value.clamp(min=0.25 * torch.finfo(value.dtype).min), grad


def _mix(base: Tensor, target: Tensor, beta: Tensor | float) -> Tensor:
    """`(1 - beta) base + beta target`, exact at both ends: never 0 times infinity."""
    if not isinstance(beta, Tensor):
        if beta in (0, 1):
            return base if beta == 0 else target
        return (1.0 - beta) * base + beta * target
    beta = beta.to(base)
    mixed = (1.0 - beta) * base + beta * target
    # Where both are finite `mixed` is exact at the ends, too, and has the right derivative in beta.
    ends = torch.where(beta == 0.0, base, torch.where(beta == 1.0, target, mixed))
    return torch.where(mixed.isnan(), ends, mixed)


def _accepting_beta(name: str, make: Callable[..., Kernel]) -> Callable[[LogProb, Tensor], Kernel]:
    """The kernel constructor as a function of the density and beta."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [
        p.name
        for p in inspect.signature(make).parameters.values()
        if p.kind in kinds and p.default is inspect.Parameter.empty
    ]
    if len(required) == 1:
        return lambda log_prob, beta: make(log_prob)
    if len(required) == 2 and required[1] != "step_size":
        return make
    raise TypeError(
        f"{name} must be kernel(log_prob) or kernel(log_prob, beta), got a function of "
        f"({', '.join(required)}); for example: lambda log_prob: random_walk(log_prob, 0.5)"
    )
