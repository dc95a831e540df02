"""Exact draws by rejection, and what the acceptance rate says about log Z."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from companion.core import LogProb, LogZ
from companion.inputs import Sampler, check_count, check_generator, check_real, draw

__all__ = ["RejectionResult", "rejection_sampling"]


@dataclass(frozen=True, eq=False)
class RejectionResult:
    """What `rejection_sampling` returns.

    Attributes:
        x: independent exact draws, `(num_samples, *event)`.
        log_z: estimate of the target's log normaliser, unbiased (a `LogZ`).
        accept_rate: accepted share of the proposals.
        num_proposals: proposals made up to the last draw kept.
    """

    x: Tensor
    log_z: LogZ
    accept_rate: float
    num_proposals: int


_BLOCK = 16384  # proposals at a time, at most
_HOPELESS = 1e-4  # give up below this acceptance rate ...
_PATIENCE = 10**6  # ... after this many proposals


@torch.no_grad()
def rejection_sampling(
    log_prob: LogProb,
    proposal: Sampler,
    log_bound: float,
    num_samples: int,
    *,
    generator: torch.Generator | None = None,
) -> RejectionResult:
    """Draw exactly from an unnormalised density p~ that lies below `M q` for a density q.

    A draw x of q is accepted with probability `p~(x) / (M q(x))`. The accepted ones are independent
    draws from p = p~ / Z, and the acceptance probability is `Z / M`. With N proposals up to the
    k-th acceptance, `log M + digamma(k) - digamma(N)` is an unbiased estimate of log Z, and
    `trigamma(k) - trigamma(N)` an unbiased estimate of its variance; `log M + log(k / N)` would be
    too high by about `(1 - Z/M) / (2k)`.

    Args:
        log_prob: `log p~`, `(m, *event) -> (m,)`; minus infinity where the density is zero.
        proposal: q, a `torch.distributions` object, or one with `sample(m, *, generator)` and
            `log_prob`. Its density must be normalised; where it has a number `log_z` (as in
            `companion.targets`), that is subtracted.
        log_bound: log M, with `log p~(x) - log q(x) <= log M` for all x.
        num_samples: k, the number of draws wanted.
        generator: source of randomness, on the device of the draws.

    Returns:
        A `RejectionResult`.

    Raises:
        ValueError: a proposal where the bound is violated, or where a log-density is NaN;
            log-densities of another shape; fewer than one proposal in 10,000 accepted, after a
            million of them.

    Reference: von Neumann (1951), *Various techniques used in connection with random digits*; for
    log Z, DeGroot (1959), *Unbiased sequential estimation for binomial populations*.

    >>> half_normal = lambda x: torch.where(x > 0, -0.5 * x**2, -torch.inf)
    >>> q = torch.distributions.Exponential(1.0)              # p~ / q <= exp(1/2), at x = 1
    >>> g = torch.Generator().manual_seed(0)
    >>> r = rejection_sampling(half_normal, q, 0.5, 10_000, generator=g)
    >>> print(f"{r.log_z.value:.3f} +/- {r.log_z.std_error:.3f}")
    0.220 +/- 0.005
    >>> print(f"{math.log(math.pi / 2) / 2:.3f}")                                  # exact
    0.226
    """
    check_real("log_bound", log_bound)
    check_count("num_samples", num_samples)
    kept: list[Tensor] = []
    accepted = proposed = num_proposals = 0
    while accepted < num_samples:
        if proposed >= _PATIENCE and accepted < _HOPELESS * proposed:
            raise ValueError(
                f"only {accepted} of {proposed} proposals were accepted: find a proposal closer to "
                "the target, a smaller log_bound, or use a Markov chain"
            )
        needed = num_samples - accepted
        m = min(_BLOCK, math.ceil(needed * (proposed + 1) / (accepted + 1)))
        x = draw(proposal, m, generator=generator)
        check_generator(generator, x.device)
        log_accept = _log_accept(log_prob, proposal, log_bound, x)
        u = torch.rand(m, dtype=torch.float64, device=x.device, generator=generator)
        index = torch.nonzero(u.log() < log_accept).flatten()[:needed]
        kept.append(x[index])
        accepted += len(index)
        if accepted == num_samples:
            num_proposals = proposed + int(index[-1]) + 1
        proposed += m
    counts = torch.tensor([num_samples, num_proposals], dtype=torch.float64, device=x.device)
    digamma, trigamma = torch.polygamma(0, counts), torch.polygamma(1, counts)
    log_z = LogZ(log_bound + digamma[0] - digamma[1], (trigamma[0] - trigamma[1]).sqrt())
    return RejectionResult(torch.cat(kept), log_z, num_samples / num_proposals, num_proposals)


def _log_accept(log_prob: LogProb, proposal: Sampler, log_bound: float, x: Tensor) -> Tensor:
    """`log p~ - log q - log M` at the proposals `x`, `(m,)` in float64, checked to be at most 0."""
    log_p, log_q = log_prob(x), proposal.log_prob(x)
    for name, value in {"log_prob": log_p, "proposal.log_prob": log_q}.items():
        if value.shape != x.shape[:1]:
            raise ValueError(
                f"{name} must give one number a draw: for x of shape {tuple(x.shape)} it gave "
                f"{tuple(value.shape)}, expected ({len(x)},). torch.distributions.Independent "
                "turns batch dimensions into an event"
            )
        if value.isnan().any():
            i = int(torch.nonzero(value.isnan())[0])
            raise ValueError(f"{name} is NaN at {int(value.isnan().sum())} draws, first {x[i]}")
    # The bound is often attained: round-off there (of the coarser dtype) is no violation.
    # Whole numbers have none of their own.
    dtypes = [value.dtype for value in (log_p, log_q) if value.is_floating_point()]
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    slack = 16 * eps * (1.0 + log_p.abs() + log_q.abs())
    log_p, log_q = log_p.double(), log_q.double() - getattr(proposal, "log_z", 0.0)
    log_ratio = log_p - log_q
    violated = (log_ratio > log_bound + slack) | (log_ratio == math.inf)
    if violated.any():
        worst = int(torch.where(violated, log_ratio, -math.inf).argmax())
        raise ValueError(
            f"the bound does not hold: log_prob(x) - proposal.log_prob(x) = {log_ratio[worst]:.6g} "
            f"exceeds log_bound = {log_bound:.6g} at x = {x[worst].tolist()}; raise log_bound or "
            "use a proposal with heavier tails"
        )
    return log_ratio - log_bound
