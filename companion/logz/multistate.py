"""MBAR: the partition functions of many densities at once, from draws of some or all of them.

The draws of all states, pooled, are draws of a mixture, in which a state of n_k draws has the
weight n_k. With `c_k = log Z_k` the estimates solve, for all states k at once,

    c_k = log sum_n p~_k(x_n) / D(x_n),        D(x) = sum_l n_l p~_l(x) exp(-c_l).

They make the likelihood of "which state did this draw come from?" stationary, which is concave:
there is one solution, up to a constant, if the draws link all states. State k is linked to l if
p~_l is positive at some draw of k, and links have to lead from every state to every other. With two
states the solution is the optimal bridge.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from companion.core import LogProb, LogZ
from companion.logz.bridge import bennett_terms, solve

__all__ = ["mbar"]

_WORST = 0.1  # relative variance: as if ten draws told the ratio
_TOLERANCE = 1e-10  # of the gradient, relative to the number of draws
_MAX_ITERATIONS = 100


@torch.no_grad()
def mbar(
    log_probs: Sequence[LogProb] | Callable[[Tensor], Tensor],
    draws: Sequence[Tensor],
    *,
    chains: bool = False,
) -> LogZ:
    """Estimate log Z_k - log Z_0 of K states from draws of them: the multistate BAR.

    Of all estimates that use the draws and the densities, none has a smaller asymptotic variance.
    The cost is K evaluations a draw, and some five passes over the K x N log-densities for the
    solution; of an annealing path, `lambda x: profile(path, x)(betas[:, None])` evaluates each
    draw once for all its betas.

    Args:
        log_probs: K unnormalised log-densities, each `(n, *event) -> (n,)`, or one function that
            gives all of them, `(n, *event) -> (K, n)`. Minus infinity is zero density.
        draws: for each state its draws, `(n_k, *event)`, independent. The numbers may differ; a
            state may have none, `(0, *event)`, and is then estimated from those of the others.
        chains: the draws are those of Markov chains, `(chains, n_k, *event)`, of the same chains
            for every state that has draws: chain c of all states together is independent of chain
            d. The covariance then comes from the spread of the chains, of which there should be
            twenty or more, and counts autocorrelation and exchanges between the states.

    Returns:
        A `LogZ` with entries (K,), `value[0]` being 0, their covariance, and

        - `log_weights`: (K, N), normalised log weights of all draws, in the order given, for
          expectations under each state: `exp(log_weights) @ f(x)`;
        - `ess`: Kish's effective sample size of these, (K,);
        - `converged`: the equations hold to 1e-10 of the number of draws, and have a solution: the
          draws link all states, both ways.

        A warning tells when effectively fewer than ten draws connect some states with the rest
        (then their ratio, and its standard error, may be far off), or represent a state.

    Raises:
        ValueError: a log-density of the wrong shape, NaN, plus infinity, a draw at which its own
            density is zero, fewer than two draws in all, or chains that differ in number.

    Reference: Shirts and Chodera (2008), *Statistically optimal analysis of samples from multiple
    equilibrium states*; Kong, McCullagh, Meng, Nicolae and Tan (2003), *A theory of statistical
    models for Monte Carlo integration*; Vardi (1985), *Empirical distributions in selection bias
    models*.

    >>> g = torch.Generator().manual_seed(0)
    >>> scales = torch.tensor([1.0, 0.5, 0.25])
    >>> draws = [s * torch.randn(1000, generator=g) for s in scales]
    >>> log_z = mbar(lambda x: -0.5 * (x / scales[:, None]).square(), draws)
    >>> for value, std_error in zip(log_z.value, log_z.std_error):   # 0, log(1/2) and log(1/4)
    ...     print(f"{value:.2f} +/- {std_error:.2f}")
    0.00 +/- 0.00
    -0.68 +/- 0.02
    -1.34 +/- 0.03
    """
    q, counts, num_chains = _log_densities(log_probs, draws, chains)
    sampled = counts.nonzero().squeeze(1)
    n = counts[sampled].double()
    c, log_d, found = _solve(q if len(n) == len(q) else q[sampled], n)
    value = torch.empty_like(q[:, 0])
    value[sampled] = c
    for k in (counts == 0).nonzero().flatten().tolist():
        value[k] = (q[k] - log_d).logsumexp(0)
    known = value > -math.inf
    log_weights = (q - torch.where(known, value, math.inf)[:, None]).sub_(log_d)

    # (K, K): all that the errors and diagnostics need
    gram = _gram(x.exp() for x in _blocks(log_weights))
    shared = gram[sampled][:, sampled]
    hessian = n.diag() - n.outer(n) * shared
    inverse, gap, slowest = _inverse(hessian, n)
    overlap = gram[:, sampled] * n  # of a draw of state k: the probability that it is one of l
    if num_chains is None:
        covariance = gram + overlap @ inverse @ overlap.T
    else:
        w = log_weights.exp()
        covariance = _between_chains(w + overlap @ (inverse * n) @ w[sampled], counts, num_chains)
    covariance = covariance - covariance[0]  # of the differences from state 0
    covariance = covariance - covariance[:, :1]
    variance = covariance.diagonal().clamp(min=0.0)
    ess = torch.where(known, 1.0 / gram.diagonal(), 0.0)
    connected = gap > 1e-13 and _linked(q[sampled], counts[sampled])
    if not found:
        warnings.warn(
            f"MBAR did not converge in {_MAX_ITERATIONS} iterations: its values mean nothing",
            stacklevel=3,  # this frame, and that of no_grad
        )
    _warn_of_gaps(n.outer(n) * shared, n, sampled, slowest, float(1.0 - gap))
    thin = (1.0 / ess - 1.0 / q.shape[1] > _WORST).nonzero().flatten().tolist()
    if thin:
        warnings.warn(
            f"of {q.shape[1]} draws effectively {float(ess[thin[0]]):.1f} represent state {thin[0]}"
            f" ({len(thin)} states of {len(q)} have as few): its log Z and expectations may be far "
            "off; draw from it, or from states closer to it",
            stacklevel=3,  # this frame, and that of no_grad
        )
    return LogZ(
        value - value[0],
        torch.where(known & (variance < 1e6), variance.sqrt(), math.inf),  # no draw in common
        log_weights,
        ess,
        found and bool(connected and known.all()),
        covariance,
    )


# ---------------------------------------------------------------- inside


def _linked(q: Tensor, counts: Tensor) -> bool:
    """Whether links lead from every state to every other. Else some log Z runs off to infinity,
    and the equations hold better and better on its way."""
    by_state = torch.split(q > -math.inf, counts.tolist(), 1)
    reach = torch.stack([positive.any(1) for positive in by_state]).double()  # from, to
    for _ in range(len(counts).bit_length()):  # paths of 2, 4, 8, ... links
        reach = (reach @ reach).clamp(max=1.0)
    return bool((reach > 0).all())


def _solve(q: Tensor, n: Tensor) -> tuple[Tensor, Tensor, bool]:
    """The log Z_k of states that all have draws, up to a constant, log D, and whether they were
    found.

    Minimises the convex `F(c) = sum_n log D(x_n) + sum_k n_k c_k` by Newton's method, with the last
    Hessian as long as the gradient shrinks by much. A pass needs no exponentials of log-densities:
    `p = p~_k(x) exp(-c_k)` is kept for c = `at`, but for a factor of each draw, and rescaled.
    """

    def mixture(c: Tensor) -> tuple[Tensor, Tensor]:
        d = (n * (at - c).exp()) @ p
        return d, d.log().sum() + n @ c

    c, at = _start(q, n), torch.full_like(n, math.inf)
    worst = math.inf
    for _ in range(_MAX_ITERATIONS):
        if not ((c - at).abs() < 10.0).all():  # closer by, nothing that counts is lost
            at = c
            p = q - at[:, None]
            largest = p.amax(0)
            p.sub_(largest).exp_()
            d, value = mixture(c)
        scale = n * (at - c).exp()
        share = scale * (p @ d.reciprocal())  # how many draws each state claims
        before, worst = worst, float((share / n - 1.0).abs().max())
        if before == math.inf or worst > 0.01 * before:
            ratios = (a / b for a, b in zip(_blocks(p), _blocks(d), strict=True))
            inverse, _, _ = _inverse(share.diag() - scale.outer(scale) * _gram(ratios), n)
        step = inverse @ (share - n)
        for _ in range(30):
            d, new = mixture(c + step)
            if new <= value + 1e-11 * q.shape[1]:  # room for round-off
                break
            step = 0.5 * step
        c, value = c + step, new
        if worst < _TOLERANCE:  # the last step was for the last digits
            break
    return c, d.log_().add_(largest), worst < _TOLERANCE


def _blocks(x: Tensor) -> Sequence[Tensor]:
    """Blocks of draws: a large temporary costs more than what is done with it."""
    return torch.split(x, 8192, -1)


def _gram(blocks: Iterable[Tensor]) -> Tensor:
    return torch.stack([x @ x.T for x in blocks]).sum(0)


def _inverse(hessian: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A generalised inverse of a matrix whose null vector is constant; and, but for that, the
    smallest eigenvalue of `hessian / sqrt(n_k n_l)` with its vector.

    At the solution that is 1 minus the second eigenvalue of the overlap matrix: 0 where the states
    fall into two groups that share no draw.
    """
    null = (n / n.sum()).sqrt()
    scaled = hessian / n.outer(n).sqrt() + null.outer(null)
    eigenvalues, vectors = torch.linalg.eigh(scaled)
    vectors = vectors / n.sqrt()[:, None]
    inverse = (vectors / eigenvalues.clamp(min=1e-15)) @ vectors.T
    return inverse, eigenvalues[0], vectors[:, 0]


def _start(q: Tensor, n: Tensor) -> Tensor:
    """A first guess: BAR between all pairs by some fifty draws of each state, then along the tree
    of those pairs that overlap most."""
    k = len(n)
    m = max(2, min(50, 1_000_000 // k**2))
    first = n.cumsum(0) - n
    spread = torch.linspace(0.0, 1.0, m, dtype=n.dtype, device=n.device)
    index = (first[:, None] + (n - 1.0)[:, None] * spread).long()
    at = q[:, index]  # (of state, at draws of state, m)
    log_w = (at - at.diagonal().T[None]).permute(2, 1, 0)  # (m, from, to)
    above = torch.triu_indices(k, k, 1, device=q.device)
    forward, reverse = log_w[:, above[0], above[1]], log_w[:, above[1], above[0]]
    ratio, _ = solve(forward, reverse)
    terms = bennett_terms(forward, reverse, ratio)
    overlap = (terms[0].exp().mean(0) + terms[1].exp().mean(0)).nan_to_num(0.0)
    overlaps, ratios = q.new_full((k, k), -1.0), q.new_zeros(k, k)
    overlaps[above[0], above[1]] = overlaps[above[1], above[0]] = overlap
    ratios[above[0], above[1]] = ratio.nan_to_num(0.0, 0.0, 0.0)
    ratios = ratios - ratios.T
    c, known = q.new_zeros(k), torch.zeros(k, dtype=torch.bool, device=q.device)
    known[0] = True
    for _ in range(k - 1):
        candidates = overlaps.masked_fill(~known[:, None] | known, -2.0)
        i, j = divmod(int(candidates.argmax()), k)
        c[j], known[j] = c[i] + ratios[i, j], True
    return c


def _warn_of_gaps(
    shared: Tensor, n: Tensor, sampled: Tensor, slowest: Tensor, second: float
) -> None:
    """Warn if some states are connected with the others by a few draws only.

    `shared[k, l]` sums, over draws, the probability of coming from k times that of l. The states
    are put in the order of the overlap matrix's second eigenvector and cut at each place: of two
    groups, this sum tells the variance of their ratio, as it does in the bridge of two states.
    """
    order = slowest.argsort()
    shared, n = shared[order][:, order], n[order]
    cuts = range(1, len(n))
    between = torch.stack([shared[:i, i:].sum() for i in cuts] or [n.sum()])
    left = n.cumsum(0)[:-1] if len(n) > 1 else n
    variance = 1.0 / between - 1.0 / left - 1.0 / (n.sum() - left)
    worst = int(variance.argmax()) if len(n) > 1 else 0
    if len(n) > 1 and variance[worst] > _WORST:
        groups = order[: worst + 1], order[worst + 1 :]
        few, rest = sorted(groups, key=lambda group: (len(group), -int(group.min())))
        warnings.warn(
            f"the states {sorted(sampled[few].tolist())} are connected with the {len(rest)} other "
            f"sampled ones by effectively {float(between[worst]):.2g} draws (the second eigenvalue "
            f"of the overlap matrix is {second:.6g}): their ratio and its standard error may be "
            "far off. Put states between them",
            stacklevel=4,  # this frame, that of mbar and that of no_grad
        )


def _between_chains(influence: Tensor, counts: Tensor, num_chains: int) -> Tensor:
    """The covariance from the spread of chains: influences (K, N) of the draws, summed by chain."""
    total = influence.new_zeros(len(influence), num_chains)
    for part in torch.split(influence, counts.tolist(), 1):
        by_chain = part.reshape(len(influence), num_chains, -1).sum(2)
        total += by_chain - by_chain.mean(1, keepdim=True)
    return total @ total.T * (num_chains / (num_chains - 1))


def _log_densities(
    log_probs: Sequence[LogProb] | Callable[[Tensor], Tensor],
    draws: Sequence[Tensor],
    chains: bool,
) -> tuple[Tensor, Tensor, int | None]:
    """All log-densities at all draws in float64 (K, N), how many draws each state has, chains."""
    if not len(draws):
        raise ValueError("draws must hold the draws of at least one state, got none")
    if chains:
        flat = [x.shape for x in draws if x.numel() and x.ndim < 2]
        if flat:
            raise ValueError(
                "with chains=True the draws of every state must be (chains, draws, *event), got "
                f"{tuple(flat[0])}"
            )
        numbers = {len(x) for x in draws if x.numel()}
        if len(numbers) != 1 or min(numbers) < 2:
            raise ValueError(
                "with chains=True the draws of every state must be (chains, draws, *event), of "
                f"the same two or more chains; got {sorted(numbers)} chains"
            )
        draws = [x.flatten(0, 1) if x.ndim > 1 else x for x in draws]  # of no draws: (0,), too
    counts = torch.tensor([len(x) for x in draws], device=draws[0].device)
    if counts.sum() < 2:
        raise ValueError(f"at least 2 draws are needed in all, got {int(counts.sum())}")
    x = torch.cat([x for x in draws if len(x)])
    q = log_probs(x) if callable(log_probs) else torch.stack([f(x) for f in log_probs])
    if q.shape != (len(draws), len(x)):
        raise ValueError(
            f"the log-densities of {len(x)} draws from {len(draws)} states must be "
            f"{(len(draws), len(x))}, one row a state; got {tuple(q.shape)}"
        )
    q = q.detach().double()
    if not (q < math.inf).all():  # one pass, where nothing is wrong
        wrong = q.isnan() | (q == math.inf)
        raise ValueError(
            f"{int(wrong.sum())} of {q.numel()} log-densities are NaN or plus infinity, the first "
            f"at (state, draw) = {tuple(wrong.nonzero()[0].tolist())}"
        )
    state = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    outside = q.gather(0, state[None])[0] == -math.inf
    if outside.any():
        raise ValueError(
            f"{int(outside.sum())} draws have density zero in their own state, the first is one of "
            f"state {int(state[outside][0])}: are they in the same order as log_probs?"
        )
    return q, counts, numbers.pop() if chains else None
