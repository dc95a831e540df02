"""Input checks that all modules share, and `draw`: any distribution, from an explicit generator.

A check returns what it was given, or raises a sentence that says what was expected, what came and
what to do.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Sampler", "check_count", "check_finite", "check_generator", "check_real", "draw"]


def check_count(name: str, value: int, minimum: int = 1) -> int:
    """Return `value`, or raise if it is not an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):  # NumPy's count, too
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def check_real(
    name: str, value: float, *, minimum: float = -math.inf, maximum: float = math.inf
) -> float:
    """Return `value` as a float, or raise unless it lies strictly between the limits."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not (math.isfinite(value) and minimum < value < maximum):
        raise ValueError(
            f"{name} must be a finite number above {minimum} and below {maximum}, got {value}"
        )
    return float(value)


def check_finite(name: str, x: Tensor) -> Tensor:
    """Return the tensor `x`, or raise if it is empty, not a tensor, or holds NaN or infinity."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.numel() == 0:
        raise ValueError(f"{name} is empty: its shape is {tuple(x.shape)}")
    finite = torch.isfinite(x)
    if not finite.all():
        first = tuple(torch.nonzero(~finite)[0].tolist())
        bad = int((~finite).sum())
        raise ValueError(
            f"{name} has {bad} NaN or infinite entries of {x.numel()}; the first is at index "
            f"{first}. Remove or mend them first."
        )
    return x


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """Raise unless `generator` is None or a generator on the same kind of device as `device`."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}; "
            "make one with torch.Generator(device).manual_seed(seed)"
        )
    if generator.device.type != device.type:
        raise ValueError(
            f"the generator is on {generator.device} but the tensors are on {device}; "
            f"make one with torch.Generator('{device}')"
        )


@runtime_checkable
class Sampler(Protocol):
    """A density that can be drawn from exactly; `torch.distributions` count (see `draw`)."""

    def log_prob(self, x: Tensor, /) -> Tensor:
        """The log-density at `x`, `(..., *event) -> (...)`."""
        ...

    def sample(self, n: Any, /) -> Tensor:
        """`n` independent draws, `(n, *event)`; accepts `generator=`, keyword-only."""
        ...


class _DrawWith(TorchFunctionMode):
    """Hands a generator to every random function that PyTorch code calls inside the block."""

    _random = frozenset(
        {"normal", "normal_", "rand", "randn", "randint", "bernoulli", "bernoulli_", "multinomial"}
        | {"uniform_", "exponential_", "cauchy_", "geometric_", "log_normal_", "poisson"}
        | {"binomial", "_standard_gamma", "_sample_dirichlet"}
    )

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in self._random:
            kwargs.setdefault("generator", self.generator)
        return func(*args, **kwargs)


def draw(
    distribution: Any,
    n: int,
    *,
    generator: torch.Generator | None = None,
    reparameterized: bool = False,
) -> Tensor:
    """Draw `n` independent points from a distribution, from an explicit generator.

    `torch.distributions` samplers take no generator; here the generator is handed to the random
    functions that they call, so the global generator is left alone. Any other object draws by its
    own `sample(n, generator=generator)`, or `rsample` likewise.

    Args:
        distribution: a `torch.distributions.Distribution`, or an object with `sample`.
        n: number of draws, at least 1.
        generator: source of randomness; None is PyTorch's global generator.
        reparameterized: draw by `rsample`, so that the draws are differentiable functions of the
            distribution's parameters. The same generator gives the same draws.

    Returns:
        `(n, *batch, *event)`, without gradient unless `reparameterized`.

    Raises:
        TypeError: the distribution has no `sample` (or no `rsample`, if that is what was asked
            for), or drew from the global generator all the same (then wrap it in an object whose
            `sample` takes `generator`).

    >>> normal = torch.distributions.Normal(0.0, 1.0)
    >>> a = draw(normal, 3, generator=torch.Generator().manual_seed(1))
    >>> b = draw(normal, 3, generator=torch.Generator().manual_seed(1))
    >>> a.shape, bool((a == b).all())
    (torch.Size([3]), True)
    """
    check_count("n", n)
    method = "rsample" if reparameterized else "sample"
    if not hasattr(distribution, method):
        raise TypeError(
            f"expected a torch.distributions object or one with {method}(n, generator=), "
            f"got {type(distribution).__name__}"
        )
    sampler = getattr(distribution, method)
    if not isinstance(distribution, torch.distributions.Distribution):
        x = sampler(n, generator=generator)
        return x if reparameterized else x.detach()
    if reparameterized and not distribution.has_rsample:
        raise TypeError(
            f"{type(distribution).__name__} has no reparameterised draws: its has_rsample is False"
        )
    if generator is None:
        return sampler(torch.Size((n,)))
    sources: list[Any] = [torch, torch.cuda] if generator.device.type == "cuda" else [torch]
    before = [source.get_rng_state() for source in sources]
    with _DrawWith(generator):
        x = sampler(torch.Size((n,)))
    if not all(map(torch.equal, before, [source.get_rng_state() for source in sources])):
        for source, state in zip(sources, before, strict=True):
            source.set_rng_state(state)
        raise TypeError(
            f"{type(distribution).__name__} draws from the global generator and cannot be given "
            "one; wrap it in an object with sample(n, generator=) and log_prob"
        )
    return x
