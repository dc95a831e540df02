"""The model's annealing path: its coupling is turned on step by step.

    log p~_beta(x) = beta K sum_<ij> x_i x_j + h sum_i x_i

At beta = 0 the spins are independent. At every beta it is an Ising model of coupling beta K, so a
checkerboard sweep leaves it invariant; the sweep's reversal takes the colours the other way round.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from companion.inputs import check_generator
from companion.mcmc.base import GibbsState
from companion.models.ising.model import Ising, bond_sum, checkerboard, checkerboard_step, uniform

__all__ = ["IsingPath"]


class IsingPath:
    """The annealing path of an Ising model (`Ising.annealing_path`).

    Args:
        model: one model, both sides even, whose coupling and field are numbers.

    Raises:
        ValueError: an odd side (see `checkerboard`), or a batch of couplings or fields.

    >>> path = Ising(4, 4, coupling=0.5).annealing_path()
    >>> x = path.sample_base(3)
    >>> path.step(x, 0.5).shape, f"{path.base_log_z:.4f}"                      # 16 log 2
    (torch.Size([3, 4, 4]), '11.0904')
    """

    def __init__(self, model: Ising) -> None:
        checkerboard(model)  # for its check of the sides
        batch = (model.coupling + model.field).shape
        if batch:
            raise ValueError(
                f"a path leads to one model; coupling and field have the shape {tuple(batch)}. "
                "Make a path of each"
            )
        self.model = model

    @property
    def base_log_z(self) -> Tensor:
        """Log Z at beta = 0, `n log(2 cosh h)` for n sites, float64."""
        h = self.model.field.double()
        return self.model.height * self.model.width * torch.logaddexp(h, -h)

    def sample_base(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` draws of independent spins in the field, `(n, height, width)`."""
        return self.model.sample_base(n, generator=generator)

    def log_prob(self, x: Tensor, beta: Tensor | float) -> Tensor:
        """`log p~_beta(x)`, `(..., height, width) -> (...)`; `beta` broadcasts over `(...)`."""
        bonds, field = self._parts(x)
        return _times(beta, bonds) + field

    def profile(self, x: Tensor) -> Callable[[Tensor | float], Tensor]:
        """The log-density at `x` as a function of beta, in float64: one sum over the bonds."""
        bonds, field = (part.double() for part in self._parts(x))
        return lambda beta: _times(beta, bonds) + field

    @torch.no_grad()
    def step(
        self, x: Tensor, beta: Tensor | float, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """A checkerboard sweep at `beta`: the black sites, then the white ones."""
        check_generator(generator, self.model.coupling.device)
        x = self.model._check(x)
        half = (4, *x.shape[:-2], self.model.height // 2, self.model.width // 2)
        coupling = _times(beta, self.model.coupling)
        noise = uniform(half, x, generator)
        return checkerboard_step(coupling, self.model.field, GibbsState(x), noise)[0].x

    def reverse_step(
        self, x: Tensor, beta: Tensor | float, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The reversal of `step`: the white sites, then the black ones."""
        # Shifted by one column, black is white.
        return self.step(x.roll(1, -1), beta, generator=generator).roll(-1, -1)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.model._check(x)
        return self.model.coupling * bond_sum(x), self.model.field * x.sum((-2, -1))


def _times(beta: Tensor | float, x: Tensor) -> Tensor:
    return (beta.to(x) if isinstance(beta, Tensor) else beta) * x
