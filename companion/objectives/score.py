"""Score matching: fit the gradient of the log-density, from which the partition function is gone.

The score is `s(x) = grad_x log p~(x)`. The squared distance of the model's score from the data's,
`E 1/2 |s - s_data|^2`, holds s_data, which nobody knows; by partial integration

    E 1/2 |s - s_data|^2 = E [ 1/2 |s|^2 + tr(ds/dx) ] + constant of the data.

Partial integration drops `p_data(x) s(x)` at the boundary, which must therefore vanish. It does at
infinity for the usual densities; it does not where data stop at a wall that the model knows nothing
of, such as zero for positive data, and the estimate is then biased, with any number of data
(Hyvärinen 2007 weighs positive data by their distance from zero). The log-density must have a
derivative that is continuous: a network of ReLUs has its curvature in the kinks, where no datum
lies, and the trace is lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from companion.inputs import check_count, check_generator
from companion.objectives.rows import check_rows

__all__ = ["score_matching", "sliced_score_matching"]


def score_matching(model: Any, v: Tensor) -> Tensor:
    """Score matching of continuous data (Hyvärinen 2005), with the exact trace.

        mean_v [ 1/2 |s(v)|^2 + sum_i d s_i / d v_i ],        s(v) = grad_v log p~(v)

    Minimal where the model's score is the data's. For a normal law it is the maximum likelihood.
    The second term is essential: without it a score of zero, a density that is flat, is best.

    Args:
        model: anything with `log_prob`, `(..., D) -> (...)`, twice differentiable; or with a
            method `score`, `(..., D) -> (..., D)`, which is used instead. No density need exist
            for it (a score network).
        v: data, `(..., n, D)`, floating; leading dimensions are those of the model.

    Returns:
        scalar loss, the sum over leading dimensions. Below zero where the model fits well: its
        minimum is `- E 1/2 |s_data|^2`. It costs D backward passes, done as one batch, whose memory
        is D times that of one.

    Raises:
        ValueError: `v` is a vector, is empty or not finite; the score does not depend on `v`.
        TypeError: `v` is not floating.

    Reference: Hyvärinen (2005), *Estimation of non-normalized statistical models by score
    matching*.

    >>> normal = torch.distributions.Normal(0.0, 1.0)
    >>> class StandardNormal:
    ...     log_prob = staticmethod(lambda x: normal.log_prob(x).sum(-1))
    >>> v = torch.tensor([[1.0, -1.0], [0.0, 2.0]])
    >>> score_matching(StandardNormal(), v).item()                   # 1/2 (2 + 4) / 2 - 2
    -0.5
    """
    return _exact_rows(model, v).mean(-1).sum()


def sliced_score_matching(
    model: Any, v: Tensor, num_projections: int = 1, *, generator: torch.Generator | None = None
) -> Tensor:
    """Score matching with the trace estimated along random directions (Song et al. 2019).

        mean_v [ 1/2 |s(v)|^2 + (1/m) sum_k w_k . (ds/dv) w_k ]

    Every row has its own m directions w of independent signs, so `E w w^T = I`: given the data,
    value and gradient are unbiased for `score_matching`. Only the entries of ds/dv off the diagonal
    add variance, so independent components are matched exactly. This is the paper's variant of
    reduced variance; the plain one projects the score as well, and has `1/2 (w . s)^2`.

    Args:
        model: as for `score_matching`.
        v: data, `(..., n, D)`, floating.
        num_projections: m, directions a row.
        generator: source of randomness for the directions.

    Returns:
        scalar loss, the sum over leading dimensions. It costs m backward passes, as one batch.

    Raises:
        ValueError, TypeError: as `score_matching`, or `num_projections` below 1.

    Reference: Song, Garg, Shi and Ermon (2019), *Sliced score matching: a scalable approach to
    density and score estimation*; the trace by random signs is Hutchinson's (1990), *A stochastic
    estimator of the trace of the influence matrix for Laplacian smoothing splines*.

    >>> normal = torch.distributions.Normal(0.0, 1.0)
    >>> class StandardNormal:
    ...     log_prob = staticmethod(lambda x: normal.log_prob(x).sum(-1))
    >>> v = torch.tensor([[1.0, -1.0], [0.0, 2.0]])
    >>> g = torch.Generator().manual_seed(0)
    >>> sliced_score_matching(StandardNormal(), v, generator=g).item()
    -0.5
    """
    check_count("num_projections", num_projections)
    check_rows(v, floating=True)
    check_generator(generator, v.device)
    shape = (num_projections, *v.shape)
    heads = torch.rand(shape, device=v.device, generator=generator) < 0.5
    return _sliced_rows(model, v, heads.to(v.dtype) * 2 - 1).mean(-1).sum()


def model_score(model: Any, x: Tensor, *sigma: Tensor) -> Tensor:
    """The score at `x`, `(..., D)`, by the model's own `score` or by autograd; it keeps its graph.

    Without an own `score`, `x` must require its gradient. `sigma` is handed on to the model.
    """
    if hasattr(model, "score"):
        own: Tensor = model.score(x, *sigma)
        if own.shape != x.shape:
            raise ValueError(
                f"score must keep the shape of x, {tuple(x.shape)}, got {tuple(own.shape)}"
            )
        return own
    log_prob = model.log_prob(x, *sigma)
    if log_prob.shape != x.shape[:-1]:
        raise ValueError(
            f"log_prob must give a number a row, {tuple(x.shape[:-1])}, got "
            f"{tuple(log_prob.shape)}; a batch of models needs data with its leading dimensions"
        )
    if not log_prob.requires_grad:
        raise ValueError("log_prob(x) has no gradient by x; look for a detach() or no_grad()")
    # Each row's density depends on that row alone, so the sum's gradient is every row's.
    (grad,) = torch.autograd.grad(log_prob.sum(), x, create_graph=True)
    return grad


def _exact_rows(model: Any, v: Tensor) -> Tensor:
    """The row's values, `(..., n)`."""
    check_rows(v, floating=True)
    units = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
    units = units.view(-1, *[1] * (v.ndim - 1), v.shape[-1])
    square, curvature = _square_and_curvature(model, v, units.expand(-1, *v.shape))
    return square + curvature.sum(0)


def _sliced_rows(model: Any, v: Tensor, directions: Tensor) -> Tensor:
    square, curvature = _square_and_curvature(model, v, directions)
    return square + curvature.mean(0)


def _square_and_curvature(model: Any, v: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """`|s|^2 / 2`, `(..., n)`, and `w . (ds/dv) w` for each of `directions`, `(m, ..., n)`."""
    learns = torch.is_grad_enabled()
    grads: tuple[Tensor | None, ...] = (None,)
    with torch.enable_grad():
        x = v.detach().requires_grad_()
        s = model_score(model, x)
        if s.requires_grad:
            grads = torch.autograd.grad(
                s, x, directions, create_graph=learns, is_grads_batched=True, allow_unused=True
            )
    if grads[0] is None:
        raise ValueError(
            "the score does not depend on v, so the trace has nothing to differentiate: the "
            "log-density must be differentiable twice, and no detach() or no_grad() on the way"
        )
    return s.square().sum(-1) / 2, (directions * grads[0]).sum(-1)
