"""Contracts 1, 2 and 4: log-densities, kernels and annealing paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "AnnealingPath",
    "BlockKernel",
    "Info",
    "Kernel",
    "LogProb",
    "State",
    "gradient",
    "value_and_grad",
    "with_gradients",
]

LogProb: TypeAlias = Callable[[Tensor], Tensor]
"""An unnormalised log-density, which maps `(..., *event)` to `(...)`.

Samplers ask for it everywhere, also at points that they then reject: outside its support it must be
minus infinity, and it must not raise, not for NaN either. The `log_prob` of a `torch.distributions`
object plugs in where the support is all of space; with `validate_args=False` it does not raise when
a trajectory diverges. Where the support is bounded, sample a transformed variable (a logarithm,
say), or set the density to minus infinity by `torch.where`.
"""


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
    # Each chain's density depends on that chain alone, so the sum's gradient is every chain's.
    if torch.compiler.is_compiling():  # autograd.grad would break the compiled graph

        def total(x: Tensor) -> tuple[Tensor, Tensor]:
            value = log_prob(x)
            return value.sum(), value

        grad, (_, value) = torch.func.grad_and_value(total, has_aux=True)(x.detach())
        return value.detach(), grad.detach()
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = log_prob(x)
        (grad,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), grad


def gradient(log_prob: LogProb, x: Tensor) -> Tensor:
    """The gradient of the log-density at `x`, where nobody asks for the value: inside trajectories.

    Args:
        log_prob: a `LogProb`; if it has a method `gradient(x)`, that is used as it is. It is worth
            writing where the value costs something of its own.
        x: points, `(..., *event)`.

    Returns:
        `(..., *event)`, detached: the second of what `value_and_grad` returns.

    >>> gradient(lambda x: -0.5 * x.square().sum(-1), torch.tensor([[1.0, 2.0]]))
    tensor([[-1., -2.]])
    """
    own = getattr(log_prob, "gradient", None)
    return value_and_grad(log_prob, x)[1] if own is None else cast(Tensor, own(x)).detach()


def with_gradients(
    value: Tensor,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor] | Callable[..., Sequence[Tensor]],
    *,
    saved: Sequence[Tensor] = (),
) -> Tensor:
    """A scalar whose `backward()` hands known gradients to the parameters.

    For losses whose gradient is computed by a shorter way than autograd would take, or is no
    derivative of the value at all.

    Args:
        value: the number that the loss shows, a scalar.
        parameters: tensors that the gradients belong to.
        gradients: one for each parameter, of its shape; or a function `gradients(scale, *saved)`
            that `backward` calls for them, times the scalar `scale`. Where they are products, to
            scale a factor spares a pass over the largest matrix.
        saved: the tensors that such a function needs. `backward` notices if they were changed in
            place since.

    Returns:
        The value, as a loss. It can be added to other losses and scaled.

    Raises:
        ValueError: a gradient of another shape than its parameter, or one too few.

    >>> w = torch.zeros(2, requires_grad=True)
    >>> loss = with_gradients(torch.tensor(7.0), [w], [torch.tensor([1.0, -2.0])])
    >>> (0.5 * loss).backward()
    >>> w.grad
    tensor([ 0.5000, -1.0000])
    """
    if callable(gradients):
        make = gradients
    else:
        make, saved = _scaled, gradients
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient.shape != parameter.shape:
                raise ValueError(
                    f"a gradient of shape {tuple(gradient.shape)} was given for a parameter of "
                    f"shape {tuple(parameter.shape)}"
                )
    loss = _KnownGradients.apply(value, make, len(saved), *saved, *parameters)  # type: ignore[no-untyped-call]
    return cast(Tensor, loss)


def _scaled(scale: Tensor, *gradients: Tensor) -> list[Tensor]:
    return [scale.to(g) * g for g in gradients]


class _KnownGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, make: Any, num_saved: int, *tensors: Tensor) -> Tensor:
        ctx.make = make
        ctx.save_for_backward(*tensors[:num_saved])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return (None, None, None, *[None] * len(saved), *ctx.make(scale, *saved))


# ---------------------------------------------------------------- kernels


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
    """What a step did; a NamedTuple of tensors that begin with the dimensions of the chains.

    Kernels may add fields. Booleans `is_nan` and `is_divergent` are counted over all steps after
    the warm-up, and every further field but `is_nan` is kept draw by draw (`Trace.stats`).
    """

    @property
    def accept_prob(self) -> Tensor:
        """The probability with which each chain's proposal was accepted, `(*chains)`."""
        ...

    @property
    def accepted(self) -> Tensor:
        """Whether each chain moved to its proposal, `(*chains)`, boolean."""
        ...


class Kernel(NamedTuple):
    """A Markov kernel: `state = init(x)`, then `state, info = step(state, generator=g)`.

    Both are pure: a step leaves the state that it is given as it was.
    """

    init: Callable[[Tensor], Any]
    step: Callable[..., tuple[Any, Any]]


class BlockKernel(Kernel):
    """A kernel that can also make several steps in one call, `steps(state, n, generator=g)`.

    It gives a list of n pairs `(state, info)`, those of n calls of `step`, and leaves the generator
    where they would. `sample` uses it: with few chains a call of a compiled function takes longer
    than what it computes. A copy with another step (`_replace`) has no `steps`.
    """

    steps: Callable[..., list[tuple[Any, Any]]]

    def __new__(
        cls,
        init: Callable[[Tensor], Any],
        step: Callable[..., tuple[Any, Any]],
        steps: Callable[..., list[tuple[Any, Any]]],
    ) -> BlockKernel:
        kernel = super().__new__(cls, init, step)
        kernel.steps = steps
        return kernel


# ---------------------------------------------------------------- annealing paths


@runtime_checkable
class AnnealingPath(Protocol):
    """Unnormalised densities from a tractable base (beta = 0) to the target (beta = 1).

    `beta` is a number or a tensor that broadcasts over the leading dimensions. Betas ascend from 0
    to 1 and beta = 0 is exactly the base. A step never raises on a log-density of minus infinity.
    `step` is reversible with respect to its density, or the path also offers `reverse_step`. Two
    operations save work where a path offers them: `profile(x)`, the log-density at x as a function
    of beta, and `advance(x, beta, next_beta, *, generator) -> (x, log_weight_increment)`; the
    functions of these names in `companion.tempering` do without.
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
