"""The model, and the sampler that draws all sites of one colour at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from companion.core import Kernel, LogZ
from companion.inputs import check_count, check_finite, check_generator
from companion.mcmc.base import GibbsState, MoveInfo
from companion.targets.ising import MAX_WIDTH, ising_log_z, kaufman_log_z

if TYPE_CHECKING:
    from companion.models.ising.annealing import IsingPath

__all__ = ["Ising", "bond_sum", "checkerboard", "checkerboard_step", "uniform"]


class Ising:
    """An Ising model: spins -1 and +1 in the model's dtype, `(..., height, width)`.

    Args:
        height: number of rows.
        width: number of columns.
        coupling: K, a number or a tensor that broadcasts over the chains (several temperatures in
            one batch); positive favours equal neighbours, negative unequal ones.
        field: h, likewise; positive favours +1.
        device: where the model is, by default that of a tensor given, or PyTorch's default.
        dtype: its dtype, likewise.

    Raises:
        ValueError: a side below 1, or parameters that are not finite.

    >>> model = Ising(4, 4, coupling=0.3, field=0.1)
    >>> x = torch.ones(2, 4, 4)
    >>> model.log_prob(x), model.magnetization(x)          # 32 bonds and 16 sites: 9.6 + 1.6
    (tensor([11.2000, 11.2000]), tensor([1., 1.]))
    >>> f"{model.log_z().value:.4f}"
    '13.2065'
    """

    def __init__(
        self,
        height: int,
        width: int,
        coupling: Tensor | float,
        field: Tensor | float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.height, self.width = check_count("height", height), check_count("width", width)
        for given in (coupling, field):
            if isinstance(given, Tensor) and given.is_floating_point():
                device, dtype = device or given.device, dtype or given.dtype
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating dtype, got {dtype}")
        self.coupling = torch.as_tensor(coupling, device=device, dtype=dtype)
        self.field = torch.as_tensor(field, device=self.coupling.device, dtype=dtype)
        check_finite("coupling", self.coupling)
        check_finite("field", self.field)

    def __call__(self, x: Tensor) -> Tensor:
        """`log_prob(x)`."""
        return self.log_prob(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """`log p~(x)`, `(..., height, width) -> (...)`."""
        x = self._check(x)
        return self.coupling * bond_sum(x) + self.field * x.sum((-2, -1))

    def energy(self, x: Tensor) -> Tensor:
        """`-log p~(x)`, `(..., height, width) -> (...)`: low energy is likely."""
        return -self.log_prob(x)

    def correlation(self, x: Tensor) -> Tensor:
        """The mean of `x_i x_j` over all bonds, `(..., height, width) -> (...)`."""
        return bond_sum(self._check(x)) / (2 * self.height * self.width)

    def magnetization(self, x: Tensor) -> Tensor:
        """The mean spin, `(..., height, width) -> (...)`."""
        return self._check(x).mean((-2, -1))

    def log_z(self) -> LogZ:
        """The exact log partition function, of the shape of `coupling` and `field`.

        By Kaufman's formula where there is no field, else by transfer matrix.

        Raises:
            ValueError: neither can do it: a field (or a negative coupling and an odd side) on a
                lattice of which both sides are above 12.
        """
        even = self.height % 2 == self.width % 2 == 0
        if not self.field.any() and (even or (self.coupling >= 0).all()):
            shape = (self.coupling + self.field).shape
            return LogZ(kaufman_log_z(self.height, self.width, self.coupling).expand(shape), 0.0)
        if min(self.height, self.width) > MAX_WIDTH:
            raise ValueError(
                f"log_z is exact without a field (and with a negative coupling only on even sides),"
                f" or where a side is at most {MAX_WIDTH}; this lattice is {self.height} by "
                f"{self.width}. Estimate log Z by annealed importance sampling (AIS) instead."
            )
        return LogZ(ising_log_z(self.height, self.width, self.coupling, self.field), 0.0)

    @torch.no_grad()
    def gibbs(
        self, x: Tensor, num_steps: int = 1, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """`num_steps` checkerboard sweeps, each of which draws every spin once.

        Args:
            x: current spins, `(..., height, width)`.
            num_steps: number of sweeps, at least 1.
            generator: source of randomness, on the model's device.

        Returns:
            new spins, `(..., height, width)`; `x` is left as it is.

        Raises:
            ValueError, TypeError: `x` is no batch of spins, a count is out of range, or a side is
                odd (see `checkerboard`).
        """
        check_count("num_steps", num_steps)
        kernel = checkerboard(self)
        state = kernel.init(x)
        for _ in range(num_steps):
            state, _ = kernel.step(state, generator=generator)
        return state.x

    def annealing_path(self) -> IsingPath:
        """The path from independent spins in the field to this model, with exact conditionals.

        Returns:
            An `IsingPath`: the coupling is multiplied by beta.

        Raises:
            ValueError: an odd side (see `checkerboard`), or a batch of couplings or fields.
        """
        from companion.models.ising.annealing import IsingPath  # which imports this module

        return IsingPath(self)

    @torch.no_grad()
    def sample_base(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` draws from independent spins in the field: the model's law if K were 0.

        Returns:
            spins, `(n, height, width)`, or `(n, *batch, height, width)` for a batch of fields.
        """
        check_count("n", n)
        shape = (n, *self.field.shape, self.height, self.width)
        probs = torch.sigmoid(2.0 * self.field)[..., None, None]
        return _spins(uniform(shape, probs, generator) < probs, probs)

    def _check(self, x: Tensor) -> Tensor:
        """Return `x` in the model's dtype, or say why it is no batch of spins."""
        shape = (self.height, self.width)
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if x.shape[-2:] != shape or x.numel() == 0:
            raise ValueError(f"x must be (..., {shape[0]}, {shape[1]}), got {tuple(x.shape)}")
        batch, chains = (self.coupling + self.field).shape, x.shape[:-2]
        sizes = zip(reversed(batch), reversed(chains), strict=False)
        if len(batch) > len(chains) or any(size not in (1, n) for size, n in sizes):
            raise ValueError(
                f"coupling and field, of shape {tuple(batch)}, must broadcast over the chains of "
                f"x, {tuple(chains)}"
            )
        if x.device != self.coupling.device:
            raise ValueError(f"x is on {x.device} but the model is on {self.coupling.device}")
        if x.is_floating_point() and x.dtype != self.coupling.dtype:
            raise TypeError(
                f"x is {x.dtype} but the model is {self.coupling.dtype}; convert one of them"
            )
        x = x.to(self.coupling.dtype)
        wrong = x.abs() != 1
        if wrong.any():
            first = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(
                f"x must hold spins -1 and +1 only; at index {first} it holds {float(x[first]):g}. "
                "Bits become spins by 2 x - 1."
            )
        return x


# ---------------------------------------------------------------- single sites


def checkerboard_step(
    coupling: Tensor, field: Tensor, state: GibbsState, noise: Tensor
) -> tuple[GibbsState, MoveInfo]:
    """A sweep as a pure function: the black sites given the white ones, then the reverse.

        P(x_i = 1 | the others) = sigmoid(2 (K (sum of the four neighbours) + h))

    Sites of one colour are no neighbours of each other, so all of them are drawn at once.

    Args:
        coupling: K, `()` or broadcasting over the chains.
        field: h, likewise.
        state: the spins, `(*chains, height, width)`, both sides even.
        noise: uniform on [0, 1), `(4, *chains, height / 2, width / 2)`.

    Returns:
        The next state, and a `MoveInfo`: every draw is accepted.
    """
    x = state.x
    k, h = coupling[..., None, None], field[..., None, None]
    # Four sublattices, by the parities of row and column: a and d are black, b and c white.
    b, c = x[..., ::2, 1::2], x[..., 1::2, ::2]

    def draw(neighbours: Tensor, u: Tensor) -> Tensor:
        return _spins(u < torch.sigmoid(2.0 * (k * neighbours + h)), x)

    a = draw(b + b.roll(1, -1) + c + c.roll(1, -2), noise[0])
    d = draw(c + c.roll(-1, -1) + b + b.roll(-1, -2), noise[1])
    b = draw(a + a.roll(-1, -1) + d + d.roll(1, -2), noise[2])
    c = draw(d + d.roll(1, -1) + a + a.roll(-1, -2), noise[3])
    x = torch.stack([torch.stack([a, b], -1), torch.stack([c, d], -1)], -3).reshape(x.shape)
    always = x.new_ones(x.shape[:-2])
    return GibbsState(x), MoveInfo(always, always.bool(), ~always.bool())


def checkerboard(model: Ising) -> Kernel:
    """Gibbs sampling of all black, then of all white sites of the checkerboard.

    A step is one sweep: every spin is drawn once. It leaves the model invariant but is not
    reversible: its reverse begins with the white sites.

    Args:
        model: an `Ising` model, both sides even.

    Returns:
        A `Kernel` whose state is a `GibbsState` (without log-density), its info a `MoveInfo`.

    Raises:
        ValueError: an odd side. Around a ring of odd length colours cannot alternate, so two
            neighbours would be of one colour and be drawn as if they did not interact.

    >>> from companion.core import sample
    >>> model = Ising(8, 8, coupling=0.4)
    >>> g = torch.Generator().manual_seed(0)
    >>> sample(checkerboard(model), model.sample_base(5, generator=g), 10, generator=g).x.shape
    torch.Size([5, 10, 8, 8])
    """
    if model.height % 2 or model.width % 2:
        raise ValueError(
            f"a checkerboard needs even sides, got {model.height} by {model.width}: around a ring "
            "of odd length two neighbours have the same colour, and drawing them at once ignores "
            "their bond. Use swendsen_wang or wolff"
        )

    def step(
        state: GibbsState, *, generator: torch.Generator | None = None
    ) -> tuple[GibbsState, MoveInfo]:
        x = state.x
        half = (4, *x.shape[:-2], model.height // 2, model.width // 2)
        return checkerboard_step(model.coupling, model.field, state, uniform(half, x, generator))

    return Kernel(lambda x: GibbsState(model._check(x)), step)


# ---------------------------------------------------------------- helpers


def bond_sum(x: Tensor) -> Tensor:
    return (x * (x.roll(-1, -1) + x.roll(-1, -2))).sum((-2, -1))


def _spins(up: Tensor, like: Tensor) -> Tensor:
    return 2.0 * up.to(like.dtype) - 1.0


def uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers on [0, 1) of the given shape, with the dtype and device of `like`."""
    check_generator(generator, like.device)
    return torch.rand(shape, dtype=like.dtype, device=like.device, generator=generator)
