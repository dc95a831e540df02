"""Gradients of expectations, by Monte Carlo: score function, pathwise, Gumbel-softmax.

All estimate `d/dtheta E[f(X)]`, where X has the density `p_theta`: theta moves the draws, so
differentiating `f` at fixed draws gives nothing. There are two ways out.

- *Score function*: `E[(f(X) - b) d/dtheta log p_theta(X)]`. It needs no derivative of f, and X may
  be discrete. The score has mean zero, so a baseline b that does not depend on the draw that it is
  used for changes the variance alone.
- *Pathwise*: with `X = g(theta, noise)` it is `E[f'(X) dX/dtheta]`. Its variance is often much
  smaller, but f must be continuous, and differentiable at almost every X.

Both are unbiased. The gradient through `gumbel_softmax` is not: it belongs to a relaxed problem.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution

from companion.inputs import check_count, check_finite, check_generator, check_real, draw
from companion.monte_carlo import Estimate, estimate

__all__ = ["gumbel_softmax", "pathwise_gradient", "score_function_gradient"]


@torch.enable_grad()
def score_function_gradient(
    f: Callable[[Tensor], Tensor],
    distribution: Callable[[Tensor], Distribution],
    theta: Tensor,
    num_samples: int,
    *,
    baseline: Literal["leave_one_out", "optimal"] | Tensor | float | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Estimate `d/dtheta E[f(X)]` from the score of the density, for any f (REINFORCE).

    `(1/n) sum_i (f(x_i) - b_i) s_i`, with the score `s_i = d/dtheta log p_theta(x_i)`. Unbiased for
    each of these baselines b:

    - None: `b_i = 0`;
    - a number or a tensor, fixed before the draws were made. The variance of a component of the
      gradient is smallest at `E[s^2 f] / E[s^2]`, with s that component of the score;
    - "leave_one_out": `b_i` is the mean of f over the other draws. The estimate is then the sample
      covariance of f and the score. (With the mean over all draws, `x_i` among them, it would be
      too small by the factor `(n - 1) / n`.)
    - "optimal": `b_i` is the minimiser above, estimated from the other draws. Few draws estimate it
      badly: they do better with "leave_one_out".

    With the last two the n terms share draws. The standard error takes them for independent, which
    is right to first order in 1/n, but too small when n is small.

    Args:
        f: the integrand, `(n, *batch, *event) -> (n, *batch)`; it is not differentiated, and must
            not depend on theta.
        distribution: makes the distribution of X from theta, with batch shape `(*batch)`. It is
            called on many copies of theta at once, so it must index theta from the end: `lambda t:
            Normal(t[..., 0], t[..., 1].exp())`. Its support must not move with theta, as that of
            `Uniform(0, theta)` does.
        theta: where the gradient is taken, `(*batch, *param)`. Its leading dimensions `(*batch)`
            are separate problems: `Normal(theta, 1.0)` with theta of shape `(5,)` is five problems,
            `Independent(Normal(theta, 1.0), 1)` one problem in five dimensions.
        num_samples: n, at least 2. Memory grows as n times the size of theta.
        baseline: b; a tensor broadcasts to the shape of theta.
        generator: source of randomness, on the device of theta.

    Returns:
        An `Estimate` of the shape of theta.

    Raises:
        TypeError: a distribution, theta or baseline that is none of the above.
        ValueError: a shape that does not fit; NaN or infinity in theta, f(x) or the score; a
            distribution that does not depend on theta, or whose support does; fewer than 2 samples.

    Reference: Glynn (1990), *Likelihood ratio gradient estimation for stochastic systems*; Williams
    (1992), *Simple statistical gradient-following algorithms for connectionist reinforcement
    learning*; for the baselines, Greensmith, Bartlett and Baxter (2004), *Variance reduction
    techniques for gradient estimates in reinforcement learning*, and Kool, van Hoof and Welling
    (2019), *Buy 4 REINFORCE samples, get a baseline for free!*

    >>> from torch.distributions import Normal
    >>> f = lambda x: x**2 + 2 * x + 1                # E[f] = (theta + 1)^2 + 1
    >>> normal = lambda t: Normal(t, 1.0)
    >>> theta, g = torch.tensor(0.5), torch.Generator().manual_seed(0)
    >>> found = score_function_gradient(f, normal, theta, 10**4, generator=g)
    >>> print(f"{found.value:.2f} +/- {found.std_error:.2f}")                    # exact: 3
    3.00 +/- 0.08
    """
    copies, law = _copies(distribution, theta, num_samples, generator)
    baseline = _check_baseline(baseline, theta.shape)
    if _support_moves(law):
        raise ValueError(
            f"the support of {type(law).__name__} moves with theta: use pathwise_gradient"
        )
    x = draw(law, 1, generator=generator)[0].detach()
    with torch.no_grad():
        values = _values(f, x, law.batch_shape)
    hint = "build the distribution from the argument that it is given, without detach()"
    scores = _gradients("log p_theta(x)", law.log_prob(x), copies, hint).double()
    values = values.double()[(...,) + (None,) * (scores.ndim - values.ndim)]
    if isinstance(baseline, str):
        baseline = _baseline_from_others(baseline, values, scores)
    return estimate((values - baseline) * scores)


@torch.enable_grad()
def pathwise_gradient(
    f: Callable[[Tensor], Tensor],
    distribution: Callable[[Tensor], Distribution],
    theta: Tensor,
    num_samples: int,
    *,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Estimate `d/dtheta E[f(X)]` by differentiating f along reparameterised draws of X.

    `(1/n) sum_i d/dtheta f(g(theta, noise_i))`, where `g(theta, noise)` has the density `p_theta`.
    Unbiased if f is continuous and, but for a set of probability zero, differentiable. At a jump of
    f it is wrong without any sign: the gradient of an indicator is estimated as zero.

    Two distributions of PyTorch give a biased gradient for a categorical variable:
    `RelaxedOneHotCategorical` (see `gumbel_softmax`) and `OneHotCategoricalStraightThrough`.

    Args:
        f: the integrand, `(n, *batch, *event) -> (n, *batch)`, differentiable by autograd. If it
            depends on theta directly, that part of the gradient is not included.
        distribution: makes the distribution of X from theta, as for `score_function_gradient`; it
            must have `rsample`.
        theta: where the gradient is taken, `(*batch, *param)`; leading dimensions are separate
            problems.
        num_samples: n, at least 2. Memory grows as n times the size of theta.
        generator: source of randomness, on the device of theta.

    Returns:
        An `Estimate` of the shape of theta.

    Raises:
        TypeError: a distribution without `rsample`, or what `score_function_gradient` refuses.
        ValueError: an f without gradient, a gradient that is not finite, or what
            `score_function_gradient` refuses.

    Reference: Kingma and Welling (2014), *Auto-encoding variational Bayes*; Rezende, Mohamed and
    Wierstra (2014), *Stochastic backpropagation and approximate inference in deep generative
    models*; Mohamed, Rosca, Figurnov and Mnih (2020), *Monte Carlo gradient estimation in machine
    learning*.

    >>> from torch.distributions import Normal
    >>> f = lambda x: x**2 + 2 * x + 1                # E[f] = (theta + 1)^2 + 1
    >>> normal = lambda t: Normal(t, 1.0)
    >>> theta, g = torch.tensor(0.5), torch.Generator().manual_seed(0)
    >>> found = pathwise_gradient(f, normal, theta, 10**4, generator=g)
    >>> print(f"{found.value:.2f} +/- {found.std_error:.2f}")                    # exact: 3
    2.98 +/- 0.02
    """
    copies, law = _copies(distribution, theta, num_samples, generator)
    if not law.has_rsample:
        raise TypeError(
            f"{type(law).__name__} has no reparameterised draws (its has_rsample is False): use "
            "score_function_gradient"
        )
    x = draw(law, 1, generator=generator, reparameterized=True)[0]
    values = _values(f, x, law.batch_shape)
    hint = "if f is no smooth function, use score_function_gradient; else look for a detach()"
    return estimate(_gradients("f(x)", values, copies, hint))


def gumbel_softmax(
    logits: Tensor,
    temperature: float,
    *,
    hard: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a relaxed one-hot vector that is a differentiable function of the logits.

    `softmax((logits + G) / temperature)` with independent standard Gumbel variables G. Its largest
    entry is at k with probability `softmax(logits)_k` exactly (the Gumbel-max trick), but only in
    the limit of temperature 0 is it one-hot. A gradient through it is therefore biased for the
    categorical variable: near 0 the bias is of the order of the temperature and the variance of its
    inverse; far from 0 the bias may have any size and sign. With `hard` the value is the one-hot
    vector, the gradient still that of the relaxed one (straight-through), and biased as well.

    Args:
        logits: unnormalised log-probabilities, `(..., k)`; minus infinity is a state never drawn.
        temperature: above 0.
        hard: whether the values are exactly one-hot.
        generator: source of randomness, on the device of the logits.

    Returns:
        `(..., k)`; each vector sums to 1.

    Raises:
        TypeError: logits that are not a floating-point tensor.
        ValueError: logits that are NaN, plus infinity or all minus infinity; a bad temperature.

    Reference: Jang, Gu and Poole (2017), *Categorical reparameterization with Gumbel-softmax*;
    Maddison, Mnih and Teh (2017), *The Concrete distribution: a continuous relaxation of discrete
    random variables*; for straight-through, Bengio, Leonard and Courville (2013), *Estimating or
    propagating gradients through stochastic neurons for conditional computation*.

    >>> logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(10**5, 3)
    >>> y = gumbel_softmax(logits, 0.5, hard=True, generator=torch.Generator().manual_seed(0))
    >>> [round(share, 2) for share in y.mean(0).tolist()]
    [0.5, 0.3, 0.2]
    """
    _check_floating("logits", logits)
    check_real("temperature", temperature, minimum=0.0)
    check_generator(generator, logits.device)
    if logits.ndim == 0:
        raise ValueError("logits must have shape (..., k), got a number")
    check_finite("the log-sum-exp of the logits", logits.detach().logsumexp(-1))
    exponential = torch.empty_like(logits, requires_grad=False).exponential_(generator=generator)
    soft = ((logits - exponential.log()) / temperature).softmax(-1)
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
    return one_hot + (soft - soft.detach())  # the bracket is exactly zero, its gradient is not


# ---------------------------------------------------------------- one gradient for each sample

_MAKE_EVENT = "join dimensions that belong to one draw by torch.distributions.Independent"


def _copies(
    distribution: Callable[[Tensor], Distribution],
    theta: Tensor,
    num_samples: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Distribution]:
    """`n` copies of theta, `(n, *batch, *param)`, and their distribution.

    Each sample is drawn from a copy of its own, so one backward pass of a sum over the samples
    leaves the gradient of each of them in its copy.
    """
    _check_floating("theta", theta)
    check_finite("theta", theta)
    check_count("num_samples", num_samples, minimum=2)
    check_generator(generator, theta.device)
    theta = theta.detach()
    batch = _law(distribution, theta).batch_shape
    if theta.shape[: len(batch)] != batch:
        raise ValueError(
            f"theta must begin with the batch shape of the distribution: that is {tuple(batch)}, "
            f"theta has {tuple(theta.shape)}. Expand theta, or " + _MAKE_EVENT
        )
    # Two dimensions of a length not in theta: no coincidence of sizes can hide a wrong index.
    k = next(k for k in itertools.count(2) if k not in theta.shape)
    try:
        copied = tuple(_law(distribution, theta.expand(k, k, *theta.shape)).batch_shape)
    except IndexError:
        copied = None
    if copied != (k, k, *batch):
        raise ValueError(
            f"distribution must accept copies of theta: {k} by {k} of them, of shape "
            f"{tuple(theta.shape)} each, gave {copied or 'an IndexError'} as batch shape, expected "
            f"{(k, k, *batch)}. Index theta from the end: theta[..., 0], not theta[0]"
        )
    copies = theta.expand(num_samples, *theta.shape).requires_grad_()
    return copies, _law(distribution, copies)


def _law(distribution: Callable[[Tensor], Distribution], theta: Tensor) -> Distribution:
    """`distribution(theta)`, if that is what it is meant to be."""
    made = distribution(theta) if callable(distribution) else None
    if not isinstance(made, Distribution):
        got = distribution if made is None else made
        raise TypeError(
            "distribution must be a function that makes a torch.distributions object from theta, "
            f"such as lambda theta: Normal(theta, 1.0); got {type(got).__name__}"
        )
    return made


def _support_moves(law: Distribution) -> bool:
    """Whether a bound of the support is a function of theta, where PyTorch tells."""
    try:
        support: Any = law.support
    except NotImplementedError:
        return False
    while hasattr(support, "base_constraint"):  # of Independent and of mixtures
        support = support.base_constraint
    return any(isinstance(b, Tensor) and b.requires_grad for b in vars(support).values())


def _gradients(name: str, per_sample: Tensor, copies: Tensor, hint: str) -> Tensor:
    """The gradient of each sample's number with respect to its copy of theta."""
    gradients = None
    if per_sample.requires_grad:
        (gradients,) = torch.autograd.grad(per_sample.sum(), copies, allow_unused=True)
    if gradients is None:
        raise ValueError(f"{name} has no gradient with respect to theta: {hint}")
    return check_finite(f"the gradient of {name}", gradients)


def _values(f: Callable[[Tensor], Tensor], x: Tensor, shape: torch.Size) -> Tensor:
    """`f(x)`, checked: one finite number for each draw of each problem, `(n, *batch)`."""
    values = check_finite("f(x)", f(x))
    if values.shape != shape:
        raise ValueError(
            f"f must give one number for each draw of each problem: for draws of shape "
            f"{tuple(x.shape)} it gave {tuple(values.shape)}, expected {tuple(shape)}. Mend f, or "
            + _MAKE_EVENT
        )
    return values


def _check_baseline(baseline: Any, shape: torch.Size) -> Any:
    """The baseline, None made 0 and a tensor expanded to `shape`, or a sentence."""
    if baseline is None:
        return 0.0
    if isinstance(baseline, str):
        if baseline not in (names := ("leave_one_out", "optimal")):
            raise ValueError(f"baseline must be a number or one of {names}, got '{baseline}'")
        return baseline
    if not isinstance(baseline, Tensor):
        return check_real("baseline", baseline)
    try:
        return check_finite("baseline", baseline.detach()).double().expand(shape)
    except RuntimeError:
        raise ValueError(
            f"baseline must broadcast to {tuple(shape)}, as theta; got {tuple(baseline.shape)}"
        ) from None


def _baseline_from_others(kind: str, values: Tensor, scores: Tensor) -> Tensor:
    """A baseline for each draw, made from the other draws, `(n, *batch, *param or 1...)`."""
    weights = scores.square() if kind == "optimal" else torch.ones_like(values)
    total = _sum_of_others(weights)
    # Where all the other scores are zero, any baseline will do.
    return torch.where(total > 0, _sum_of_others(weights * values) / total, 0.0)


def _sum_of_others(x: Tensor) -> Tensor:
    """`sum_{j != i} x_j` for each i, `(n, ...)`; `total - x_i` would cancel where x_i is large."""
    none = torch.zeros_like(x[:1])
    before = torch.cat([none, x[:-1].cumsum(0)])
    after = torch.cat([none, x[1:].flip(0).cumsum(0)]).flip(0)
    return before + after


def _check_floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        what = f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {what}")
