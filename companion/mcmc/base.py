"""What the kernels of this part share: their states, what they report, and the accept step.

Chains are the leading dimensions, event dimensions are what is left: `log_prob(x)` has the shape of
the chains, `(*chains)`, and `x` is `(*chains, *event)`.

A kernel draws its noise first and hands it to a pure function of the state and the noise. That is
what can be compiled (a `torch.Generator` cannot be), and tested with noise of one's choice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from companion.core import BlockKernel, Kernel, LogProb, value_and_grad
from companion.inputs import check_finite, check_generator, check_real

__all__ = [
    "ChainState",
    "GibbsState",
    "GradientState",
    "MoveInfo",
    "MoveNoise",
    "check_floating",
    "check_start",
    "check_step_size",
    "compile_step",
    "expand",
    "init_chains",
    "init_gradient",
    "metropolis_accept",
    "move_kernel",
    "move_noise",
    "per_chain",
    "select",
    "uniform_noise",
]


class ChainState(NamedTuple):
    """Where the chains of a kernel without gradients are."""

    x: Tensor
    """The points, `(*chains, *event)`."""
    log_prob: Tensor
    """The log-density there, `(*chains)`."""


class GradientState(NamedTuple):
    """Where the chains are, with the gradient: it is kept, so that no step computes it again."""

    x: Tensor
    """The points, `(*chains, *event)`."""
    log_prob: Tensor
    """The log-density there, `(*chains)`."""
    grad: Tensor
    """Its gradient, `(*chains, *event)`."""


class GibbsState(NamedTuple):
    """Where the chains of a Gibbs sampler are."""

    x: Tensor
    """The points, `(*chains, *event)`."""
    log_prob: Tensor | None = None
    """The log-density there, `(*chains)`, if the kernel was given one."""


class MoveInfo(NamedTuple):
    """What a step did to each chain; every field is `(*chains)`."""

    accept_prob: Tensor
    """The probability with which the proposal was accepted."""
    accepted: Tensor
    """Whether it was, boolean."""
    is_nan: Tensor
    """Whether the acceptance ratio was NaN or infinite (the proposal is then rejected), boolean."""


class MoveNoise(NamedTuple):
    """The random numbers of a step that proposes by normal noise."""

    normal: Tensor
    """Standard normal, `(*chains, *event)`."""
    uniform: Tensor
    """Uniform on [0, 1), `(*chains)`; the proposal is accepted if it is below `accept_prob`."""


# ---------------------------------------------------------------- states


@torch.no_grad()
def init_chains(log_prob: LogProb, x: Tensor) -> ChainState:
    """The state of chains at `x`, checked.

    Args:
        log_prob: the log-density, `(*chains, *event) -> (*chains)`.
        x: starting points, `(*chains, *event)`, of any dtype (see `check_floating`).

    Returns:
        A `ChainState`.

    Raises:
        ValueError: a log-density that is not finite, naming the chains, or not one number a chain.

    >>> init_chains(lambda x: -x.square().sum(-1), torch.tensor([[1.0, 2.0], [0.0, 0.0]])).log_prob
    tensor([-5., -0.])
    >>> init_chains(lambda x: x.log(), torch.tensor([1.0, 0.0]))    # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: the log-density is not finite at the start of 1 of 2 chains: -inf at chain 1. ...
    """
    x = x.detach()
    value = check_start("log-density", log_prob(x), x)
    return ChainState(x, value)


@torch.no_grad()
def init_gradient(log_prob: LogProb, x: Tensor) -> GradientState:
    """The state of chains at `x` with the gradient, checked.

    Args:
        log_prob: the log-density, `(*chains, *event) -> (*chains)`.
        x: starting points, `(*chains, *event)`, floating.

    Returns:
        A `GradientState`.

    Raises:
        TypeError: integer or boolean points, which have no gradient.
        ValueError: a log-density or gradient that is not finite, naming the chains; shapes that do
            not fit.

    >>> init_gradient(lambda x: -x.square().sum(-1), torch.tensor([[1.0, 2.0]])).grad
    tensor([[-2., -4.]])
    """
    x = check_floating(x.detach())
    value, grad = value_and_grad(log_prob, x)
    check_start("log-density", value, x)
    if grad.shape != x.shape:
        raise ValueError(
            f"the gradient must have the shape of x, {tuple(x.shape)}, got {tuple(grad.shape)}"
        )
    check_start("gradient", grad.reshape(*value.shape, -1).sum(-1), x)
    return GradientState(x, value, grad)


def check_start(what: str, value: Tensor, x: Tensor) -> Tensor:
    """Return `value`, or raise unless it is one finite number a chain."""
    if not isinstance(value, Tensor) or value.shape != x.shape[: value.ndim]:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"log_prob must give one number a chain, that is a tensor of the leading dimensions of "
            f"x, {tuple(x.shape)}; got {got}"
        )
    finite = value.isfinite()
    if not finite.all():
        bad = (~finite).nonzero().tolist()
        first = ", ".join(
            f"{float(value[tuple(i)])} at chain {i[0] if len(i) == 1 else tuple(i)}"
            for i in bad[:3]
        )
        more = ", ..." if len(bad) > 3 else ""
        raise ValueError(
            f"the {what} is not finite at the start of {len(bad)} of {value.numel()} chains: "
            f"{first}{more}. Start every chain where the density is positive and finite"
        )
    return value


def check_floating(x: Tensor) -> Tensor:
    """Return `x`, or raise a TypeError unless it is of a floating dtype."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floating for a move in continuous space, got {x.dtype}")
    return x


S = TypeVar("S", bound=NamedTuple)


def select(accepted: Tensor, new: S, old: S) -> S:
    """Chain by chain the new state where `accepted`, else the old one.

    Args:
        accepted: boolean, `(*chains)`.
        new: state (any NamedTuple of tensors whose leading dimensions are the chains).
        old: state of the same kind.

    Returns:
        A state of that kind. A field that is None stays None.

    >>> new, old = GibbsState(torch.tensor([[1.0], [2.0]])), GibbsState(torch.zeros(2, 1))
    >>> select(torch.tensor([True, False]), new, old).x
    tensor([[1.],
            [0.]])
    """
    fields = (
        None if a is None else torch.where(expand(accepted, a), a, b)
        for a, b in zip(new, old, strict=True)
    )
    kind: Any = type(new)  # not new._make: PyTorch 2.11 cannot compile that
    return kind(*fields)


def expand(a: Tensor, like: Tensor) -> Tensor:
    """`a`, `(*chains)`, with singleton event dimensions appended to fit `like`.

    >>> expand(torch.ones(5), torch.ones(5, 3, 2)).shape
    torch.Size([5, 1, 1])
    """
    extra = like.ndim - a.ndim
    return a.reshape(a.shape + (1,) * extra) if extra else a


# ---------------------------------------------------------------- accepting


def metropolis_accept(log_ratio: Tensor, uniform: Tensor) -> MoveInfo:
    """Accept with probability `min(1, exp(log_ratio))`; NaN means reject, and is flagged.

    So does plus infinity. It comes from a density that is infinite where the proposal is, as no
    chain starts at a density of zero; a chain that went there would never leave.

    Args:
        log_ratio: log of the acceptance ratio, `(*chains)`.
        uniform: uniform on [0, 1), `(*chains)`.

    Returns:
        A `MoveInfo`.

    >>> log_ratio = torch.tensor([1.0, -1.0, -float("inf"), float("nan")])
    >>> metropolis_accept(log_ratio, torch.full((4,), 0.5))
    MoveInfo(accept_prob=tensor([1.0000, 0.3679, 0.0000, 0.0000]),
             accepted=tensor([ True, False, False, False]),
             is_nan=tensor([False, False, False,  True]))
    """
    is_nan = ~(log_ratio < torch.inf)  # true for NaN, too
    accept_prob = log_ratio.clamp(max=0.0).exp().masked_fill(is_nan, 0.0)
    return MoveInfo(accept_prob, uniform < accept_prob, is_nan)


def move_noise(state: ChainState | GradientState, generator: torch.Generator | None) -> MoveNoise:
    """The noise of a step: the normal numbers are drawn first, then the uniform ones."""
    x, log_prob = state.x, state.log_prob
    check_generator(generator, x.device)
    normal = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return MoveNoise(normal, uniform_noise(log_prob, generator))


def uniform_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers on [0, 1) of the shape and device of `like`, in single precision at least.

    In half precision they would be multiples of 1/2048, or of 1/256: zero, which accepts
    everything, would come up that often.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.rand(like.shape, dtype=dtype, device=like.device, generator=generator)


# ---------------------------------------------------------------- step sizes


def check_step_size(name: str, value: Tensor | float) -> Tensor | float:
    """Return a step size, or raise unless it is positive and finite, a number or a tensor."""
    if not isinstance(value, Tensor):
        return check_real(name, value, minimum=0.0)
    check_finite(name, value)
    if not (value > 0).all():
        raise ValueError(f"{name} must be positive, the smallest of its entries is {value.min()}")
    return value.detach()


def per_chain(value: Tensor | float, state: ChainState | GradientState) -> Tensor | float:
    """A number, or a tensor that broadcasts over the chains, made to broadcast over `state.x`.

    >>> state = ChainState(torch.zeros(4, 5, 3), torch.zeros(4, 5))
    >>> per_chain(torch.ones(5), state).shape
    torch.Size([4, 5, 1])
    """
    if not isinstance(value, Tensor):
        return value
    chains = state.log_prob.shape
    try:
        return expand(value.expand(chains), state.x).to(state.x)
    except RuntimeError:
        raise ValueError(
            f"a tensor of shape {tuple(value.shape)} does not broadcast to the chains, "
            f"{tuple(chains)}; give one number, or one a chain"
        ) from None


# ---------------------------------------------------------------- kernels

PureStep: TypeAlias = Callable[..., tuple[Any, Any]]
"""`(..., state, noise) -> (state, info)`."""
F = TypeVar("F", bound=Callable[..., Any])


def compile_step(step: F, compile: bool) -> F:
    """The pure step, compiled by `torch.compile` if asked for: its first call takes seconds.

    Each kernel keeps its own compiled code. By default all that come from one line of source share
    a store, which takes eight and then falls back to slow steps.
    """
    if not compile:
        return step
    # The overloads of PyTorch 2.13 do not know the last option.
    own: F = torch.compile(step, dynamic=False, isolate_recompiles=True)  # type: ignore[call-overload]
    return own


def move_kernel(
    init: Callable[[Tensor], Any],
    pure: PureStep,
    settings: Callable[[Any], Any],
    compile: bool,
) -> Kernel:
    """The kernel of a move by normal noise: `pure(settings(state), state, noise)`.

    Compiled, it makes blocks of steps as well. A call of a compiled function costs about a tenth of
    a millisecond, whatever it computes: with few chains that is most of the time. Where PyTorch
    cannot compile a block of this density, every step is a call.
    """
    run = compile_step(pure, compile)

    @torch.no_grad()
    def step(state: Any, *, generator: torch.Generator | None = None) -> tuple[Any, Any]:
        return run(settings(state), state, move_noise(state, generator))

    if not compile:
        return Kernel(init, step)

    def one_by_one(
        step: PureStep, given: Any, state: Any, noises: list[MoveNoise]
    ) -> list[tuple[Any, Any]]:
        made = []
        for noise in noises:
            state, info = step(given, state, noise)
            made.append((state, info))
        return made

    # As a region, the step is compiled once, and not once for each of its places in the block.
    region = torch.compiler.nested_compile_region(pure)
    block = compile_step(functools.partial(one_by_one, region), compile)
    can_block = True

    @torch.no_grad()
    def steps(
        state: Any, n: int, *, generator: torch.Generator | None = None
    ) -> list[tuple[Any, Any]]:
        nonlocal can_block
        noises = [move_noise(state, generator) for _ in range(n)]
        if can_block:
            try:
                return block(settings(state), state, noises)
            except Exception:  # no region holds a graph break, or A.T of some tensor A
                can_block = False  # an error of the density itself is raised again below
        return one_by_one(run, settings(state), state, noises)

    return BlockKernel(init, step, steps)
