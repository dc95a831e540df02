"""Exact results for the Ising model on a finite square lattice with periodic boundaries.

The model is `log p~(x) = K sum_<ij> x_i x_j + h sum_i x_i` for spins x_i = -1 or +1 on `height`
rows and `width` columns, with coupling K and field h. Every site has one bond to its right
neighbour and one to the neighbour below, the last column and row to the first ones: always
`2 height width` bonds. So where a side is 2, two bonds join the same pair of sites, and where it is
1, a site is bound to itself and adds the constant K.

Two exact methods check one another: the transfer matrix, for narrow lattices and any field, and
Kaufman's formula, for any size without a field. The model to sample is in `companion.models.ising`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from companion.inputs import check_count, check_finite, check_real
from companion.testing import binary_states

__all__ = [
    "CRITICAL_COUPLING",
    "IsingMoments",
    "ising_log_z",
    "ising_magnetization",
    "ising_moments",
    "kaufman_log_z",
]

CRITICAL_COUPLING = 0.5 * math.log(1.0 + math.sqrt(2.0))
"""K_c = log(1 + sqrt 2) / 2 = 0.4407, where an infinite lattice begins to order (Onsager, 1944)."""

MAX_WIDTH = 12  # 4096 states a row, and about a second for 12 x 12


# ---------------------------------------------------------------- transfer matrix


def ising_log_z(
    height: int, width: int, coupling: Tensor | float, field: Tensor | float = 0.0
) -> Tensor:
    """The log partition function by transfer matrix, for lattices of which one side is short.

        Z = tr T^height,    T(s, s') = exp(K sum_c s_c s_{c+1} + h sum_c s_c + K sum_c s_c s'_c)

    for neighbouring rows s and s', of 2^width states each; the shorter side is taken as the width.
    The sum over s' is made half a row at a time, and rows that are rotations of one another count
    as one. All is in float64 and rescaled after each row. The result is differentiable: d/dK is the
    mean of the sum over bonds, d/dh that of the sum of spins.

    Args:
        height: number of rows.
        width: number of columns; the smaller of the two is at most 12.
        coupling: K, a number or a tensor, of either sign.
        field: h, a number or a tensor; K and h broadcast. It may be complex.

    Returns:
        log Z, of the broadcast shape, float64 (complex128 for a complex field), on the device of
        the tensors given, else on the CPU.

    Raises:
        ValueError: a side below 1, or both above 12; parameters that are not finite.

    Reference: Kramers and Wannier (1941), *Statistics of the two-dimensional ferromagnet*.

    >>> f"{ising_log_z(4, 4, 0.0):.6f}"                                  # 16 log 2
    '11.090355'
    >>> coupling = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    >>> torch.autograd.grad(ising_log_z(1, 2, coupling), coupling)       # 2 + 2 tanh(2 K)
    (tensor(3.0741, dtype=torch.float64),)
    """
    width, height = sorted((check_count("height", height), check_count("width", width)))
    if width > MAX_WIDTH:
        raise ValueError(
            f"the transfer matrix has 2^width states a row and stops at a shorter side of "
            f"{MAX_WIDTH}, got {width}; without a field use kaufman_log_z"
        )
    coupling, field = _parameters(coupling, field)
    device, left = coupling.device, width // 2
    rows = 2.0 * binary_states(width, device=device, dtype=torch.float64) - 1.0
    inner = coupling[..., None] * (rows * rows.roll(-1, 1)).sum(1) + field[..., None] * rows.sum(1)
    # Constants are taken out of each row, so that its largest factors are 1.
    scale = inner.detach().real.amax(-1)
    weight = (inner - scale[..., None]).exp()[..., None]
    # exp(K s.s') is a product over columns: a matrix for each half of a row replaces one for all.
    halves = (rows[:: 2 ** (width - left), :left], rows[: 2 ** (width - left), left:])
    most = coupling.detach().abs()
    left_half, right_half = (
        (coupling[..., None, None] * (half @ half.T) - (half.shape[1] * most)[..., None, None])
        .exp()
        .to(weight.dtype)
        for half in halves
    )
    log_scale = height * (scale + width * most)
    # total[s, i]: the sum over all lattices that begin with row i of `starts` and end with row s.
    starts, times = _rotations(width, device)
    column = torch.arange(len(starts), device=device)
    total = torch.zeros(2**width, len(starts), device=device, dtype=weight.dtype)
    total[starts, column] = 1.0
    for _ in range(height):
        total = left_half @ total.reshape(*total.shape[:-2], 2**left, -1)
        total = right_half[..., None, :, :] @ total.reshape(*total.shape[:-1], -1, len(starts))
        total = weight * total.flatten(-3, -2)
        largest = total.detach().abs().amax((-2, -1))
        largest = largest.clamp(min=torch.finfo(torch.float64).tiny)  # a complex sum may vanish
        total = total / largest[..., None, None]
        log_scale = log_scale + largest.log()
    return log_scale + (times * total[..., starts, column]).sum(-1).log()


def _rotations(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """One row, by its number, of each set of rows that are rotations, and the size of the set."""
    first = rotated = torch.arange(2**width, device=device)
    for _ in range(width - 1):
        rotated = (rotated << 1) % 2**width | rotated >> (width - 1)
        first = torch.minimum(first, rotated)
    times = first.bincount()
    starts = times.nonzero()[:, 0]
    return starts, times[starts].double()


def _parameters(*values: Tensor | float) -> list[Tensor]:
    """Numbers and tensors as tensors of one shape, float64 (or complex128), on one device."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    dtypes = [torch.complex128 if _is_complex(x) else torch.float64 for x in values]
    made = [torch.as_tensor(x, device=device, dtype=d) for x, d in zip(values, dtypes, strict=True)]
    for name, x in zip(("coupling", "field"), made, strict=False):
        check_finite(name, x)
    shape = (made[0] + made[-1]).shape
    return [x.expand(shape) for x in made]


def _is_complex(x: Tensor | complex) -> bool:
    return x.is_complex() if isinstance(x, Tensor) else isinstance(x, complex)


def ising_magnetization(
    height: int, width: int, coupling: float, field: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The exact law of the magnetisation, by transfer matrices with complex fields.

    The sum of all N spins, S, has the characteristic function
    `E exp(i t S) = Z(K, h + i t) / Z(K, h)`, and N + 1 values of it determine its N + 1
    probabilities by a discrete Fourier transform.

    Args:
        height: number of rows.
        width: number of columns; the smaller of the two is at most 12. 8 by 8 sites take a tenth of
            a second, 10 by 10 some ten seconds.
        coupling: K.
        field: h.

    Returns:
        The possible magnetisations S / N, `(N + 1,)`, from -1 to 1, and their probabilities,
        `(N + 1,)`, both float64 on the CPU; the probabilities are accurate to about 1e-14.

    Raises:
        ValueError: as in `ising_log_z`.

    >>> ising_magnetization(1, 2, 0.5 * math.log(2.0))                   # p~ = 2 or 1/2, twice each
    (tensor([-1.,  0.,  1.], dtype=torch.float64), tensor([0.4000, 0.2000, 0.4000],
    dtype=torch.float64))
    """
    check_real("coupling", coupling)
    check_real("field", field)
    num_sites = check_count("height", height) * check_count("width", width)
    k = torch.arange(num_sites + 1, device="cpu", dtype=torch.float64)
    angle = math.pi / (num_sites + 1) * k
    base = ising_log_z(height, width, coupling, field)
    # Half of the values are enough: the others are their conjugates, up to a phase.
    half = angle[: (num_sites + 1) // 2 + 1]
    fields = torch.complex(torch.full_like(half, field), half)
    log_z = torch.stack([ising_log_z(height, width, coupling, one) for one in fields])
    characteristic = (log_z - base + 1j * num_sites * half).exp()  # of (S + N) / 2, at 2 pi k/(N+1)
    probs = torch.fft.irfft(characteristic.conj(), n=num_sites + 1)
    return 2.0 * k / num_sites - 1.0, probs.clamp(min=0.0)


class IsingMoments(NamedTuple):
    """Exact means of an Ising model, each a float64 tensor of shape ()."""

    log_z: Tensor
    """The log partition function."""
    correlation: Tensor
    """E[x_i x_j] of neighbours, the mean over all bonds."""
    magnetization: Tensor
    """E[m], of the mean spin m."""
    abs_magnetization: Tensor
    """E|m|."""
    square_magnetization: Tensor
    """E[m^2]."""


def ising_moments(height: int, width: int, coupling: float, field: float = 0.0) -> IsingMoments:
    """Exact means: of neighbours' products (the derivative of log Z) and of the magnetisation.

    Args:
        height: number of rows.
        width: number of columns; see `ising_magnetization` for the sizes that it takes.
        coupling: K.
        field: h.

    Returns:
        An `IsingMoments`.

    Raises:
        ValueError: as in `ising_log_z`.

    >>> f"{ising_moments(4, 4, CRITICAL_COUPLING).abs_magnetization:.4f}"
    '0.8439'
    """
    m, probs = ising_magnetization(height, width, coupling, field)
    with torch.enable_grad():
        k = torch.tensor(coupling, device="cpu", dtype=torch.float64, requires_grad=True)
        log_z = ising_log_z(height, width, k, field)
        (bond_sum,) = torch.autograd.grad(log_z, k)
    means = (probs @ m, probs @ m.abs(), probs @ m.square())
    return IsingMoments(log_z.detach(), bond_sum / (2 * height * width), *means)


# ---------------------------------------------------------------- Kaufman's formula


def kaufman_log_z(height: int, width: int, coupling: Tensor | float) -> Tensor:
    """The log partition function without a field, for a lattice of any size.

        Z = (2 sinh 2K)^(m n / 2) / 2 (prod_r 2 cosh m g_{2r+1} + prod_r 2 sinh m g_{2r+1}
                                       + prod_r 2 cosh m g_{2r} + prod_r 2 sinh m g_{2r})

    for m rows and n columns, with r = 0 ... n - 1 in each product and `g_k > 0` from
    `sinh^2 g_k = (sinh 2K - 1)^2 / (2 sinh 2K) + sin^2(pi k / 2n)`, save that g_0 has the sign of
    `sinh 2K - 1`. (Kaufman's gamma_k is 2 g_k.) The result is differentiable.

    Args:
        height: m, number of rows.
        width: n, number of columns.
        coupling: K, a number or a tensor; not negative, unless both sides are even (then turning
            over every other spin shows that `Z(-K) = Z(K)`).

    Returns:
        log Z, of the shape of `coupling`, float64.

    Raises:
        ValueError: a side below 1, a coupling that is not finite, or a negative one on a lattice
            with an odd side (use `ising_log_z`).

    Reference: Kaufman (1949), *Crystal statistics. II. Partition function evaluated by spinor
    analysis*.

    >>> f"{kaufman_log_z(4, 4, 0.3) - ising_log_z(4, 4, 0.3):.6f}"
    '0.000000'
    >>> f"{kaufman_log_z(1000, 1000, CRITICAL_COUPLING) / 1000**2:.5f}"   # Onsager's limit: 0.92970
    '0.92970'
    """
    check_count("height", height)
    check_count("width", width)
    (coupling,) = _parameters(coupling)
    if (coupling < 0).any() and (height % 2 or width % 2):
        raise ValueError(
            f"Kaufman's formula is for couplings that are not negative, unless both sides are "
            f"even; got {float(coupling.min())} on {height} by {width}. Use ising_log_z"
        )
    if (coupling.abs() > 350).any():  # exp(700) is the largest that there is
        raise ValueError(
            f"the coupling must be at most 350 in size, got {float(coupling.abs().max())}; the "
            "lattice is then in one of its ground states"
        )
    coupling = coupling.abs().clamp(min=1e-30)  # at 0 the factors are 0 and infinite
    s = (2.0 * coupling).sinh()[..., None]
    k = torch.arange(2 * width, device=s.device, dtype=s.dtype)
    root = (s - 1.0) / (2.0 * s).sqrt()
    g0 = height * root.asinh()  # m g_0, with its sign
    sines = (math.pi / (2 * width) * k).sin()
    g = height * (root.square() + sines[1:].square()).sqrt().asinh()  # m g_1, m g_2, ...
    odd, even = g[..., ::2], g[..., 1::2]
    # Each product is exp(sum of |m g_k|) times the product of 1 + exp(-2 m g_k), or of 1 - ...
    log_odd = odd.sum(-1)
    log_even = even.sum(-1) + g0[..., 0].abs()
    plus_odd, minus_odd = (1 + (-2 * odd).exp()).prod(-1), (-(-2 * odd).expm1()).prod(-1)
    plus_even, minus_even = (1 + (-2 * even).exp()).prod(-1), (-(-2 * even).expm1()).prod(-1)
    up, down = ((g0 - g0.abs()).exp()[..., 0], (-g0 - g0.abs()).exp()[..., 0])  # exp(+/-m g_0)
    logs = torch.stack([log_odd, log_even])
    factors = torch.stack(
        [plus_odd + minus_odd, plus_even * (up + down) + minus_even * (up - down)]
    )
    largest = logs.detach().amax(0)
    total = ((logs - largest).exp() * factors).sum(0).log() + largest
    log_prefactor = 0.5 * height * width * (2.0 * s[..., 0]).log()
    return log_prefactor + total - math.log(2.0)
