"""Exact-start invariance: chains that start from exact draws of the target still follow it.

Choose a target that is asymmetric and correlated, take several steps, and run the same check on a
kernel that you have broken on purpose: a check that cannot fail proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from companion.core import Kernel, LogProb
from companion.inputs import Sampler, check_count, check_finite, check_generator, check_real, draw
from companion.testing.enumeration import check_allowed, state_log_probs

__all__ = ["InvarianceResult", "assert_invariant", "discrete_invariance_test", "invariance_test"]

MIN_EXPECTED = 100  # chains in a cell of a chi-square test


@dataclass(frozen=True, eq=False)
class InvarianceResult:
    """What an invariance test found.

    Attributes:
        p_value: of all projections together (Bonferroni): a correct kernel gets a value below a
            with probability at most a.
        p_values: of each projection, `(k,)`, float64 on the CPU.
        statistics: Kolmogorov-Smirnov distance of each projection (discrete: Pearson's
            chi-square), `(k,)`, float64 on the CPU.
        names: what each projection looks at.
    """

    p_value: float
    p_values: Tensor
    statistics: Tensor
    names: tuple[str, ...]


@torch.no_grad()
def invariance_test(
    kernel: Kernel,
    target: Sampler,
    *,
    num_chains: int,
    num_steps: int,
    projections: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> InvarianceResult:
    """Test that a kernel leaves a target invariant, from exact starts.

    `num_chains` chains start from exact draws and make `num_steps` steps. If the kernel is correct,
    where they end is again a set of independent draws of the target. A two-sample
    Kolmogorov-Smirnov test compares it, projected to one dimension in several ways, with *fresh*
    exact draws. The starts would not do: starts and ends of the same chains are correlated, while
    the test takes its two samples for independent, so that its p-values would mean nothing.

    By default the projections are each coordinate, five fixed random directions (which see
    correlations, and which no symmetry of the target fits), and the log-density.

    Args:
        kernel: the Markov kernel; it is given all chains as one batch `(num_chains, *event)`.
        target: has `sample` and `log_prob` (`companion.targets`, `torch.distributions`).
        num_chains: number of chains, and of fresh draws; n of them show a shift of the distribution
            function by about `3.5 / sqrt(n)`.
        num_steps: steps of each chain. Several: errors add up, and a wrong state kept after a
            rejection shows only in the next step.
        projections: what to compare instead, `(m, *event) -> (m, k)`.
        generator: source of randomness, on the target's device.

    Returns:
        An `InvarianceResult`; hand it to `assert_invariant`.

    Raises:
        ValueError: a count out of range; final states or projections that are not finite or of the
            wrong shape.

    Reference: Gandy and Scott (2020), *Unit testing for MCMC and other Monte Carlo methods*.

    >>> from types import SimpleNamespace as State
    >>> def shrink(state, *, generator):                     # a sampler of nothing
    ...     return State(x=0.9 * state.x), None
    >>> kernel = Kernel(lambda x: State(x=x), shrink)
    >>> target, g = torch.distributions.Normal(0.0, 1.0), torch.Generator().manual_seed(0)
    >>> invariance_test(kernel, target, num_chains=5000, num_steps=3, generator=g).p_value < 1e-9
    True
    """
    check_count("num_chains", num_chains, minimum=2)
    check_count("num_steps", num_steps)
    start = draw(target, num_chains, generator=generator)
    fresh = draw(target, num_chains, generator=generator)
    end = _run(kernel, start, num_steps, generator)
    if projections is not None:
        return compare_samples(projections(end), projections(fresh), num_chains)
    both = torch.cat([end, fresh])
    flat = both.double().reshape(len(both), -1)
    names = [f"coordinate {i}" for i in range(flat.shape[1])]
    names, values = with_directions(names, flat)
    values = torch.cat([values, target.log_prob(both).double()[:, None]], 1)
    ends, draws = values[:num_chains], values[num_chains:]
    return compare_samples(ends, draws, num_chains, [*names, "log-density"])


@torch.no_grad()
def discrete_invariance_test(
    kernel: Kernel,
    log_prob: LogProb,
    states: Tensor,
    *,
    num_chains: int,
    num_steps: int,
    generator: torch.Generator | None = None,
) -> InvarianceResult:
    """Test that a kernel on a finite set of states leaves its target invariant, from exact starts.

    The probabilities are known by enumeration: chains start from exact draws, and where they end is
    counted and compared with the expected counts by Pearson's chi-square test. The rarest states,
    in which fewer than a hundred chains are expected, form one cell. (The usual five are enough for
    p-values of 1 %, but far out the counts of rare states have longer tails than the chi-square
    law: with five a correct kernel got a p-value below 1e-5 up to 22 times as often as it should,
    with a hundred twice as often at most.)

    Args:
        kernel: the Markov kernel; it is given all chains as one batch `(num_chains, *event)`.
        log_prob: the target's unnormalised log-density, `(m, *event) -> (m,)`.
        states: all states, each once, `(m, *event)`: `binary_states(n)`, or spins, or labels.
        num_chains: number of chains, some hundreds times the number of likely states.
        num_steps: steps of each chain, several.
        generator: source of randomness, on the device of `states`.

    Returns:
        An `InvarianceResult` of one entry; hand it to `assert_invariant`. A chain that ends in a
        state of probability zero makes the p-value zero.

    Raises:
        ValueError: a count out of range, a state listed twice, a final state that is not listed, a
            bad log-density, or so few chains that a single cell is left.

    Reference: Cochran (1954), *Some methods for strengthening the common chi-square tests*.

    >>> from types import SimpleNamespace as State
    >>> from companion.testing import binary_states
    >>> def flip(state, *, generator):                       # right for fair coins only
    ...     return State(x=1 - state.x), None
    >>> kernel, coins = Kernel(lambda x: State(x=x), flip), binary_states(3)
    >>> def p_value(log_odds):
    ...     return discrete_invariance_test(
    ...         kernel, lambda x: log_odds * x[:, 0], coins, num_chains=1000, num_steps=3,
    ...         generator=torch.Generator().manual_seed(0),
    ...     ).p_value
    >>> p_value(0.0) > 0.01, p_value(1.0) < 1e-9
    (True, True)
    """
    from scipy.stats import chisquare  # slow to import

    check_count("num_chains", num_chains, minimum=2)
    check_count("num_steps", num_steps)
    check_finite("states", states)
    check_generator(generator, states.device)
    p = check_allowed(state_log_probs(log_prob, states)).softmax(0)
    u = torch.rand(num_chains, dtype=p.dtype, device=p.device, generator=generator)
    start = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=len(p) - 1)
    end = _run(kernel, states[start], num_steps, generator)
    counts, p = _count(end, states).cpu(), p.cpu()
    if counts[p == 0].any():
        return _result([(torch.inf, 0.0)], ("the counts of the states",))
    expected, order = (num_chains * p).sort()
    rare = max(1, int((expected < MIN_EXPECTED).sum()))
    if expected[:rare].sum() < MIN_EXPECTED:
        rare += 1  # what is pooled must itself expect as many chains
    cell = (torch.arange(len(p), device="cpu") - rare + 1).clamp(min=0)
    expected, counts = cell.bincount(expected), cell.bincount(counts[order].double())
    if len(expected) < 2:
        raise ValueError(
            f"{num_chains} chains are too few for {len(p)} states: one cell that expects "
            f"{MIN_EXPECTED}"
        )
    test = chisquare(counts.numpy(), expected.numpy())
    return _result([(test.statistic, test.pvalue)], ("the counts of the states",))


def assert_invariant(result: InvarianceResult, *, false_alarm: float = 1e-5) -> None:
    """Raise an AssertionError that says what moved, if a test found the target not invariant.

    Args:
        result: from `invariance_test` or `discrete_invariance_test`.
        false_alarm: the probability with which a correct kernel may fail.

    Raises:
        AssertionError: `result.p_value` is below `false_alarm`.

    >>> assert_invariant(InvarianceResult(0.4, torch.tensor([0.4]), torch.tensor([0.01]), ("x",)))
    """
    check_real("false_alarm", false_alarm, minimum=0.0, maximum=1.0)
    if result.p_value >= false_alarm:
        return
    k = len(result.p_values)
    worst = int(result.p_values.argmin())
    moved = int((k * result.p_values < false_alarm).sum())
    raise AssertionError(
        "the kernel does not leave its target invariant: chains that started from exact draws no "
        f"longer follow the target. {moved} of {k} projections moved, most clearly "
        f"{result.names[worst]} (statistic {float(result.statistics[worst]):.3g}, p-value "
        f"{float(result.p_values[worst]):.2g}); a correct kernel fails with probability "
        f"{false_alarm:g}. Look at the sign of the acceptance ratio, at the Hastings correction of "
        "an asymmetric proposal, and at what the state keeps after a rejection."
    )


def _run(kernel: Kernel, x: Tensor, num_steps: int, generator: torch.Generator | None) -> Tensor:
    state = kernel.init(x)
    for _ in range(num_steps):
        state, _ = kernel.step(state, generator=generator)
    end: Tensor = state.x
    if end.shape != x.shape:
        raise ValueError(f"the kernel turned shape {tuple(x.shape)} into {tuple(end.shape)}")
    return check_finite("the chains' final states", end)


def with_directions(names: list[str], x: Tensor) -> tuple[list[str], Tensor]:
    """The columns of `x`, `(m, d)` float64, and (for d > 1) five fixed random combinations."""
    dim = x.shape[1]
    num_directions = 5 if dim > 1 else 0
    # A fixed seed of its own: the directions belong to the test, not to the run.
    fixed = torch.Generator("cpu").manual_seed(0)
    weights = torch.randn(dim, num_directions, device="cpu", generator=fixed).to(x)
    # Scaled, so that wide coordinates don't drown the others; one that is constant has no scale.
    scale = x.std(0).masked_fill((x == x[:1]).all(0), 1.0)
    weights = weights / scale[:, None]
    return names + [f"direction {i}" for i in range(num_directions)], torch.cat([x, x @ weights], 1)


def compare_samples(
    ends: Tensor, draws: Tensor, num_chains: int, names: Sequence[str] | None = None
) -> InvarianceResult:
    """A two-sample Kolmogorov-Smirnov test for each column of two samples, `(num_chains, k)`."""
    from scipy.stats import ks_2samp  # slow to import

    if ends.ndim != 2 or ends.shape != draws.shape or len(ends) != num_chains:
        raise ValueError(f"projections gave {tuple(ends.shape)}, expected ({num_chains}, k)")
    check_finite("the projected final states", ends)
    check_finite("the projected exact draws", draws)
    # The asymptotic law is accurate from some hundred chains on; the exact one takes long.
    tests = [
        ks_2samp(a.numpy(), b.numpy(), method="asymp")
        for a, b in zip(ends.double().cpu().T, draws.double().cpu().T, strict=True)
    ]
    if names is None:
        names = [f"projection {i}" for i in range(ends.shape[1])]
    return _result([(test.statistic, test.pvalue) for test in tests], tuple(names))


def _count(x: Tensor, states: Tensor) -> Tensor:
    """How many rows of `x` equal each of the `states`, `(len(states),)`."""
    both = torch.cat([states, x]).reshape(len(states) + len(x), -1)
    unique, index = torch.unique(both, dim=0, return_inverse=True)
    listed, found = index[: len(states)], index[len(states) :]
    if len(listed.unique()) < len(states):
        raise ValueError("states must list every state once; some are listed twice")
    if len(unique) > len(states):
        stray = torch.isin(found, listed, invert=True)
        raise ValueError(
            f"{int(stray.sum())} chains ended outside the states, the first at "
            f"{x[stray][0].tolist()}"
        )
    return found.bincount(minlength=len(states))[listed]


def _result(tests: list[tuple[float, float]], names: tuple[str, ...]) -> InvarianceResult:
    statistics, p_values = torch.tensor(tests, dtype=torch.float64, device="cpu").T
    p_value = min(1.0, len(tests) * float(p_values.min()))
    return InvarianceResult(p_value, p_values, statistics, names)
