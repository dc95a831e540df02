"""Geweke's test: a posterior sampler and a simulator of the model must have one joint law.

Prior and likelihood say how parameter and data are drawn together, `(theta, y)`. A correct kernel
for the posterior `p(theta | y)` leaves that joint law as it is, and so does drawing the data anew
given the parameter. The posterior itself need not be known: any model that can be simulated can be
tested, and what is tested is the kernel together with the log-density that it was given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from companion.core import Kernel
from companion.inputs import check_count
from companion.testing.invariance import InvarianceResult, compare_samples, with_directions

__all__ = ["geweke_test"]


@torch.no_grad()
def geweke_test(
    sample_prior: Callable[..., Tensor],
    sample_data: Callable[..., Tensor],
    make_kernel: Callable[[Tensor], Kernel],
    *,
    num_chains: int,
    num_steps: int,
    functions: Callable[[Tensor, Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> InvarianceResult:
    """Test a posterior sampler against the simulator of its model.

    Each of `num_chains` chains starts from a draw of the joint law, `theta` from the prior and `y`
    given `theta`. Then kernel and simulator take turns: a step for `theta` given `y`, new data `y`
    given `theta`, and so on, `num_steps` steps. The last one moves `theta`, so that its dependence
    on `y` is tested, too. If all is right, the ends are draws of the joint law again: a two-sample
    Kolmogorov-Smirnov test compares them with *fresh* draws.

    Geweke ran one long chain and compared means, for which the autocorrelation has to be estimated.
    Many independent chains with exact starts need no such correction, nor does any chain have to
    mix: the p-values are right for any number of steps.

    The test finds a likelihood or a prior that is not that of the simulator, and a kernel that does
    not leave its posterior invariant. It passes, rightly, a kernel that never moves; and it cannot
    find the same mistake made in the simulator and in the log-density, or one that no compared
    function sees (the sign of a parameter, if all functions are even).

    Args:
        sample_prior: `sample_prior(n, *, generator) -> theta`, `(n, *event)`.
        sample_data: `sample_data(theta, *, generator) -> y`, `(n, *data)`, a data set a chain.
        make_kernel: `make_kernel(y) -> Kernel`, for chains `(n, *event)` of which each has its own
            data set.
        num_chains: number of chains, and of fresh draws: n of them show a shift of a distribution
            function by about `3.5 / sqrt(n)`.
        num_steps: steps of each chain. Many, since errors add up: what is wrong with a prior that
            the data outweigh shows only when parameter and data have dragged each other away.
        functions: what to compare, `(theta, y) -> (n, k)`. By default all coordinates of both and
            five fixed random directions.
        generator: source of randomness.

    Returns:
        An `InvarianceResult`; hand it to `assert_invariant`.

    Raises:
        ValueError: a count out of range, shapes that do not fit, values that are not finite.

    Reference: Geweke (2004), *Getting it right: joint distribution tests of posterior simulators*;
    Grosse and Duvenaud (2014), *Testing MCMC code*; Gandy and Scott (2020), *Unit testing for MCMC
    and other Monte Carlo methods*.

    >>> from types import SimpleNamespace as State
    >>> def sample_prior(n, *, generator):                            # theta ~ N(0, 2^2)
    ...     return 2.0 * torch.randn(n, generator=generator)
    >>> def sample_data(theta, *, generator):                         # y ~ N(theta, 1)
    ...     return theta + torch.randn(theta.shape, generator=generator)
    >>> def exact(prior_var):                                         # draws of the posterior
    ...     share = prior_var / (prior_var + 1.0)
    ...     def make_kernel(y):
    ...         def step(state, *, generator):
    ...             noise = torch.randn(y.shape, generator=generator)
    ...             return State(x=share * y + share**0.5 * noise), None
    ...         return Kernel(lambda x: State(x=x), step)
    ...     return make_kernel
    >>> def p_value(prior_var):
    ...     return geweke_test(
    ...         sample_prior, sample_data, exact(prior_var), num_chains=5000, num_steps=5,
    ...         generator=torch.Generator().manual_seed(0),
    ...     ).p_value
    >>> p_value(4.0) > 0.01, p_value(2.0) < 1e-9        # 2 taken for the variance of the prior
    (True, True)
    """
    check_count("num_chains", num_chains, minimum=2)
    check_count("num_steps", num_steps)

    def joint() -> tuple[Tensor, Tensor]:
        theta = sample_prior(num_chains, generator=generator)
        return theta, sample_data(theta, generator=generator)

    fresh = joint()
    theta, y = joint()
    for name, x in (("sample_prior", theta), ("sample_data", y)):
        if x.shape[:1] != (num_chains,):
            raise ValueError(f"{name} gave {tuple(x.shape)}, expected ({num_chains}, ...)")
    for i in range(num_steps):
        if i > 0:
            y = sample_data(theta, generator=generator)
        kernel = make_kernel(y)
        state, _ = kernel.step(kernel.init(theta), generator=generator)
        if state.x.shape != theta.shape:
            raise ValueError(
                f"the kernel turned shape {tuple(theta.shape)} into {tuple(state.x.shape)}"
            )
        theta = state.x
    if functions is not None:
        return compare_samples(functions(theta, y), functions(*fresh), num_chains)
    parameters, data = (
        torch.cat(pair).double().reshape(2 * num_chains, -1)
        for pair in zip((theta, y), fresh, strict=True)
    )
    names = [f"parameter {i}" for i in range(parameters.shape[1])]
    names += [f"datum {i}" for i in range(data.shape[1])]
    names, values = with_directions(names, torch.cat([parameters, data], 1))
    return compare_samples(values[:num_chains], values[num_chains:], num_chains, names)
