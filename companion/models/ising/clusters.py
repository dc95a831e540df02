"""Swendsen and Wang's and Wolff's samplers, which turn over whole clusters of spins."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from companion.core import Kernel
from companion.mcmc.base import GibbsState, metropolis_accept
from companion.models.ising.model import Ising, uniform

__all__ = [
    "ClusterInfo",
    "ClusterNoise",
    "WolffNoise",
    "swendsen_wang",
    "swendsen_wang_step",
    "wolff",
    "wolff_step",
]


class ClusterNoise(NamedTuple):
    """The random numbers of a Swendsen-Wang step."""

    bond: Tensor
    """Uniform on [0, 1), of the bonds to the right and below, `(2, *chains, height, width)`."""
    flip: Tensor
    """Uniform on [0, 1), `(*chains, height, width)`; a cluster uses that of its first site."""


class WolffNoise(NamedTuple):
    """The random numbers of a Wolff step."""

    bond: Tensor
    """Uniform on [0, 1), of the bonds to the right and below, `(2, *chains, height, width)`."""
    seed: Tensor
    """The number of the site whose cluster is to flip, `(*chains)`, integer."""
    uniform: Tensor
    """Uniform on [0, 1), for acceptance, `(*chains)`."""


class ClusterInfo(NamedTuple):
    """What a cluster step did; every field is `(*chains)`."""

    accept_prob: Tensor
    """The probability with which the flip was accepted: 1, save for Wolff's with a field."""
    accepted: Tensor
    """Whether it was, boolean."""
    is_nan: Tensor
    """Never."""
    cluster_size: Tensor
    """Sites of the cluster of a site drawn at random (Swendsen-Wang: the mean over all sites). For
    K > 0 without a field its mean is `N E[m^2]`, an estimate of less variance than m^2's own."""


def swendsen_wang_step(
    coupling: Tensor, field: Tensor, state: GibbsState, noise: ClusterNoise
) -> tuple[GibbsState, ClusterInfo]:
    """A Swendsen-Wang step as a pure function.

    A bond whose energy is low (`K x_i x_j > 0`) is set with probability `1 - exp(-2 |K|)`. Given
    the bonds set, sites that they join turn over together or not at all: a cluster with the sum of
    spins S turns over with probability `sigmoid(-2 h S)`, one half without a field.

    Args:
        coupling: K, `()` or broadcasting over the chains.
        field: h, likewise.
        state: the spins, `(*chains, height, width)`.
        noise: a `ClusterNoise`.

    Returns:
        The next state, and a `ClusterInfo`.
    """
    x = state.x
    root = _clusters(coupling, x, noise.bond)
    spin_sum = _sum_by(root, x)
    flip = noise.flip < torch.sigmoid(-2.0 * field[..., None, None] * spin_sum)
    flip = flip.reshape(-1).index_select(0, root).reshape(x.shape)
    size = _sum_by(root, torch.ones_like(x)).square().mean((-2, -1))
    always = torch.ones_like(size)
    info = ClusterInfo(always, always.bool(), ~always.bool(), size)
    return GibbsState(torch.where(flip, -x, x)), info


def swendsen_wang(model: Ising) -> Kernel:
    """Swendsen and Wang's sampler: bonds at random given the spins, then spins given the bonds.

    Spins and bonds have a joint law of which both are exact conditionals, so that every step is
    accepted; it is reversible with respect to the model. Any sizes, either sign of K, with or
    without a field (a strong field, or bonds that cannot all be satisfied, take away its
    advantage). On a CPU a step costs two to six checkerboard sweeps, the more the larger the
    lattice and the batch.

    Args:
        model: an `Ising` model.

    Returns:
        A `Kernel` whose state is a `GibbsState`, its info a `ClusterInfo`.

    Reference: Swendsen and Wang (1987), *Nonuniversal critical dynamics in Monte Carlo
    simulations*; Edwards and Sokal (1988), *Generalization of the
    Fortuin-Kasteleyn-Swendsen-Wang representation and Monte Carlo algorithm*.

    >>> model = Ising(5, 5, coupling=0.4, field=0.1)
    >>> kernel, g = swendsen_wang(model), torch.Generator().manual_seed(0)
    >>> state, info = kernel.step(kernel.init(model.sample_base(3, generator=g)), generator=g)
    >>> state.x.shape, info.cluster_size.shape
    (torch.Size([3, 5, 5]), torch.Size([3]))
    """

    def step(
        state: GibbsState, *, generator: torch.Generator | None = None
    ) -> tuple[GibbsState, ClusterInfo]:
        x = state.x
        bond = uniform((2, *x.shape), x, generator)
        noise = ClusterNoise(bond, uniform(x.shape, x, generator))
        return swendsen_wang_step(model.coupling, model.field, state, noise)

    return Kernel(lambda x: GibbsState(model._check(x)), step)


def wolff_step(
    coupling: Tensor, field: Tensor, state: GibbsState, noise: WolffNoise
) -> tuple[GibbsState, ClusterInfo]:
    """A Wolff step as a pure function: the cluster of one site turns over.

    Bonds are set as in `swendsen_wang_step`. Without a field the cluster of the seed always turns
    over; with one, that is a proposal, accepted with probability `min(1, exp(-2 h S))`.

    Args:
        coupling: K, `()` or broadcasting over the chains.
        field: h, likewise.
        state: the spins, `(*chains, height, width)`.
        noise: a `WolffNoise`.

    Returns:
        The next state, and a `ClusterInfo`.
    """
    x = state.x
    root = _clusters(coupling, x, noise.bond).reshape(*x.shape[:-2], -1)
    inside = (root == root.gather(-1, noise.seed[..., None])).reshape(x.shape)
    log_ratio = -2.0 * field * (x * inside).sum((-2, -1))
    info = metropolis_accept(log_ratio, noise.uniform)
    flip = inside & info.accepted[..., None, None]
    size = inside.sum((-2, -1)).to(x.dtype)
    return GibbsState(torch.where(flip, -x, x)), ClusterInfo(*info, cluster_size=size)


def wolff(model: Ising) -> Kernel:
    """Wolff's sampler: one cluster turns over, that of a site drawn at random.

    The site is likely to lie in a large cluster, so a flip moves more than one of Swendsen and
    Wang's. Here bonds are drawn for the whole lattice, so that all chains move in one batch: a step
    costs as much as one of theirs, however small its cluster. Count its work in sites turned over
    (`cluster_size`) to compare it with programs that grow one cluster. The step is reversible.

    Args:
        model: an `Ising` model.

    Returns:
        A `Kernel` whose state is a `GibbsState`, its info a `ClusterInfo`.

    Reference: Wolff (1989), *Collective Monte Carlo updating for spin systems*.

    >>> model = Ising(5, 5, coupling=3.0)                      # so strong that all is one cluster
    >>> kernel, g = wolff(model), torch.Generator().manual_seed(0)
    >>> state, info = kernel.step(kernel.init(torch.ones(2, 5, 5)), generator=g)
    >>> model.magnetization(state.x), info.cluster_size
    (tensor([-1., -1.]), tensor([25., 25.]))
    """

    def step(
        state: GibbsState, *, generator: torch.Generator | None = None
    ) -> tuple[GibbsState, ClusterInfo]:
        x = state.x
        chains, num_sites = x.shape[:-2], model.height * model.width
        bond = uniform((2, *x.shape), x, generator)
        seed = torch.randint(num_sites, chains, generator=generator, device=x.device)
        noise = WolffNoise(bond, seed, uniform(chains, x, generator))
        return wolff_step(model.coupling, model.field, state, noise)

    return Kernel(lambda x: GibbsState(model._check(x)), step)


def _clusters(coupling: Tensor, x: Tensor, bond: Tensor) -> Tensor:
    """The cluster of every site of every chain, named by its first site, `(number of sites)`."""
    k = coupling[..., None, None]
    pairs = torch.stack([x * x.roll(-1, -1), x * x.roll(-1, -2)])
    is_set = (k * pairs > 0) & (bond < -(-2.0 * k.abs()).expm1())
    site = torch.arange(x.numel(), device=x.device)
    lattice = site.reshape(x.shape)
    other = torch.stack([lattice.roll(-1, -1), lattice.roll(-1, -2)]).reshape(-1)
    chosen = is_set.reshape(-1).nonzero()[:, 0]
    return _connected(chosen % x.numel(), other.index_select(0, chosen), site)


def _connected(a: Tensor, b: Tensor, root: Tensor) -> Tensor:
    """The connected components of a graph with the edges `a[i] - b[i]`; `root` numbers its sites.

    Each site points to one with a smaller number, or to itself, a root. Every edge between two
    trees hooks the root with the larger number below the other (of several edges any may win), then
    all pointers jump to their roots, and the edges within a tree are dropped: the number of trees
    falls by half or more each time.
    """
    while len(a):
        root = root.index_put((torch.maximum(a, b),), torch.minimum(a, b))
        while not torch.equal(root, above := root.index_select(0, root)):
            root = above
        a, b = root.index_select(0, a), root.index_select(0, b)
        keep = (a != b).nonzero()[:, 0]
        a, b = a.index_select(0, keep), b.index_select(0, keep)
    return root


def _sum_by(root: Tensor, x: Tensor) -> Tensor:
    """At each root the sum of `x` over its cluster, 0 elsewhere; of the shape of `x`."""
    return x.new_zeros(x.numel()).index_add(0, root, x.reshape(-1)).reshape(x.shape)
