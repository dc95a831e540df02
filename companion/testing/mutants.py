"""Ways to break a kernel from outside, as negative controls for your own tests.

A check of a sampler is worth something if it fails for a wrong one. Each function here takes a
kernel and returns another, with an error that is easily made. What cannot be planted from outside
is an error within the step (a sign, a missing Hastings correction): break a copy of the step for
that.

How small an error is found depends on the number of chains n: distribution functions must differ by
about `3.5 / sqrt(n)`, so that an error ten times smaller takes a hundred times the chains. Steps
help as far as the error adds up. Above all it depends on the target. A rejection that is handled
wrongly shows only where some places reject more than others: on a normal target, 5,000 random walks
with steps of two standard deviations miss `jump_back` and, mostly, `skip_rejections`. On a narrow
peak on a broad hill, the target of the examples, both are found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from companion.core import Kernel
from companion.inputs import check_count, check_real

__all__ = ["drift", "jump_back", "reuse_noise", "shrink", "skip_rejections", "stale_log_prob"]


class Memory(NamedTuple):
    """The state of a kernel that remembers what it should not."""

    x: Tensor
    log_prob: Tensor | None
    state: Any
    kept: Any


def _remember(state: Any, kept: Any) -> Memory:
    return Memory(state.x, getattr(state, "log_prob", None), state, kept)


def _where(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Chain by chain `a` or `b`; `mask` is `(*chains)`."""
    return torch.where(mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim)), a, b)


def _after_each_step(kernel: Kernel, change: Callable[[Tensor], Tensor]) -> Kernel:
    def step(state: Any, *, generator: torch.Generator | None = None) -> tuple[Any, Any]:
        state, info = kernel.step(state, generator=generator)
        return kernel.init(change(state.x)), info

    return Kernel(kernel.init, step)


# ---------------------------------------------------------------- points moved


def drift(kernel: Kernel, shift: float) -> Kernel:
    """After every step all coordinates move by `shift`: an integrator or a proposal with a bias.

    On a standard normal target, 5,000 random walks with steps of two standard deviations find a
    shift of 0.2 in a single step and of 0.07 in ten; 0.01 goes unseen.

    Args:
        kernel: a kernel in continuous space.
        shift: how far, in the units of x.

    Returns:
        The broken `Kernel`.

    >>> from companion.mcmc import random_walk
    >>> from companion.targets import GaussianMixture
    >>> from companion.testing import invariance_test
    >>> means, variances = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.01])
    >>> target = GaussianMixture(torch.ones(2), means.view(2, 1), variances.view(2, 1, 1))
    >>> kernel, g = random_walk(target, 0.5), torch.Generator().manual_seed(0)
    >>> run = {"num_chains": 10_000, "num_steps": 10, "generator": g}
    >>> invariance_test(kernel, target, **run).p_value > 1e-5
    True
    >>> invariance_test(drift(kernel, 0.1), target, **run).p_value < 1e-5
    True
    """
    check_real("shift", shift)
    return _after_each_step(kernel, lambda x: x + shift)


def shrink(kernel: Kernel, factor: float) -> Kernel:
    """After every step all coordinates are multiplied by `factor`: a wrong mass or temperature.

    No mean betrays it where the target has mean 0; the spread does. On a standard normal target,
    5,000 random walks with steps of two standard deviations find a factor of 0.8 in a single step
    and of 0.93 in ten; 0.99 goes unseen.

    Args:
        kernel: a kernel in continuous space.
        factor: positive; 1 would change nothing.

    Returns:
        The broken `Kernel`.

    >>> from companion.mcmc import random_walk
    >>> from companion.targets import GaussianMixture
    >>> from companion.testing import invariance_test
    >>> means, variances = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.01])
    >>> target = GaussianMixture(torch.ones(2), means.view(2, 1), variances.view(2, 1, 1))
    >>> kernel, g = random_walk(target, 0.5), torch.Generator().manual_seed(0)
    >>> run = {"num_chains": 10_000, "num_steps": 10, "generator": g}
    >>> invariance_test(shrink(kernel, 0.9), target, **run).p_value < 1e-5
    True
    """
    check_real("factor", factor, minimum=0.0)
    return _after_each_step(kernel, lambda x: x * factor)


# ---------------------------------------------------------------- rejections mistaken


def jump_back(kernel: Kernel) -> Kernel:
    """A chain whose proposal is rejected goes back to where it started, not to where it was.

    One step cannot show it: there the two are the same.

    Args:
        kernel: a kernel that rejects; its info has `accepted`.

    Returns:
        The broken `Kernel`.

    >>> from companion.mcmc import random_walk
    >>> from companion.targets import GaussianMixture
    >>> from companion.testing import invariance_test
    >>> means, variances = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.01])
    >>> target = GaussianMixture(torch.ones(2), means.view(2, 1), variances.view(2, 1, 1))
    >>> kernel, g = random_walk(target, 0.5), torch.Generator().manual_seed(0)
    >>> run = {"num_chains": 10_000, "num_steps": 10, "generator": g}
    >>> invariance_test(jump_back(kernel), target, **run).p_value < 1e-5
    True
    """

    def init(x: Tensor) -> Memory:
        return _remember(kernel.init(x), x)

    def step(memory: Memory, *, generator: torch.Generator | None = None) -> tuple[Memory, Any]:
        state, info = kernel.step(memory.state, generator=generator)
        state = kernel.init(_where(info.accepted, state.x, memory.kept))
        return _remember(state, memory.kept), info

    return Kernel(init, step)


def skip_rejections(kernel: Kernel, max_tries: int = 100) -> Kernel:
    """A step ends when a proposal is accepted: a rejection does not count the point once more.

    The chain of accepted points alone samples the target times the probability of acceptance.

    Args:
        kernel: a kernel that rejects; its info has `accepted`.
        max_tries: a chain gives up after so many.

    Returns:
        The broken `Kernel`.

    >>> from companion.mcmc import random_walk
    >>> from companion.targets import GaussianMixture
    >>> from companion.testing import invariance_test
    >>> means, variances = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.01])
    >>> target = GaussianMixture(torch.ones(2), means.view(2, 1), variances.view(2, 1, 1))
    >>> kernel, g = random_walk(target, 0.5), torch.Generator().manual_seed(0)
    >>> run = {"num_chains": 2000, "num_steps": 10, "generator": g}
    >>> invariance_test(skip_rejections(kernel), target, **run).p_value < 1e-5
    True
    """
    check_count("max_tries", max_tries)

    def step(state: Any, *, generator: torch.Generator | None = None) -> tuple[Any, Any]:
        state, first = kernel.step(state, generator=generator)
        accepted = first.accepted
        for _ in range(max_tries - 1):
            if accepted.all():
                break
            again, info = kernel.step(state, generator=generator)
            state = kernel.init(_where(accepted, state.x, again.x))
            accepted = accepted | info.accepted
        return state, first

    return Kernel(kernel.init, step)


def stale_log_prob(kernel: Kernel) -> Kernel:
    """The chain moves, but its state keeps the log-density of the start.

    One step cannot show it: the next one compares with the wrong density.

    Args:
        kernel: a kernel whose state is a NamedTuple with `log_prob`.

    Returns:
        The broken `Kernel`.

    Raises:
        ValueError: by a step, if the state has no log-density.

    >>> from companion.mcmc import random_walk
    >>> from companion.targets import GaussianMixture
    >>> from companion.testing import invariance_test
    >>> means, variances = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.01])
    >>> target = GaussianMixture(torch.ones(2), means.view(2, 1), variances.view(2, 1, 1))
    >>> kernel, g = random_walk(target, 0.5), torch.Generator().manual_seed(0)
    >>> run = {"num_chains": 10_000, "num_steps": 10, "generator": g}
    >>> invariance_test(stale_log_prob(kernel), target, **run).p_value < 1e-5
    True
    """

    def step(state: Any, *, generator: torch.Generator | None = None) -> tuple[Any, Any]:
        before = getattr(state, "log_prob", None)
        if before is None:
            raise ValueError("the kernel's state has no log_prob that could go stale")
        state, info = kernel.step(state, generator=generator)
        return state._replace(log_prob=before), info

    return Kernel(kernel.init, step)


# ---------------------------------------------------------------- randomness mistaken


def reuse_noise(kernel: Kernel) -> Kernel:
    """Every step uses the random numbers of the first: a seed set, or a key used, in the loop.

    Args:
        kernel: any kernel whose step depends on where the chain is.

    Returns:
        The broken `Kernel`.

    Raises:
        ValueError: by a step without a generator.

    >>> from companion.mcmc import random_walk
    >>> from companion.targets import GaussianMixture
    >>> from companion.testing import invariance_test
    >>> means, variances = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.01])
    >>> target = GaussianMixture(torch.ones(2), means.view(2, 1), variances.view(2, 1, 1))
    >>> kernel, g = random_walk(target, 0.5), torch.Generator().manual_seed(0)
    >>> run = {"num_chains": 10_000, "num_steps": 10, "generator": g}
    >>> invariance_test(reuse_noise(kernel), target, **run).p_value < 1e-5
    True
    """

    def init(x: Tensor) -> Memory:
        return _remember(kernel.init(x), None)

    def step(memory: Memory, *, generator: torch.Generator | None = None) -> tuple[Memory, Any]:
        if generator is None:
            raise ValueError("reuse_noise rewinds a generator: call the step with one")
        seed = generator.get_state() if memory.kept is None else memory.kept
        generator.set_state(seed)
        state, info = kernel.step(memory.state, generator=generator)
        return _remember(state, seed), info

    return Kernel(init, step)
