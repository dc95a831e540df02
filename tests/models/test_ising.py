"""The Ising model and its samplers against enumeration, transfer matrix and slow definitions."""

import itertools
import math

import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from companion.core import Kernel, sample
from companion.logz import enumeration
from companion.mcmc.base import GibbsState
from companion.models.ising import (
    ClusterNoise,
    Ising,
    WolffNoise,
    checkerboard,
    checkerboard_step,
    swendsen_wang,
    swendsen_wang_step,
    wolff,
    wolff_step,
)
from companion.models.ising.clusters import _connected
from companion.monte_carlo import estimate
from companion.targets import CRITICAL_COUPLING, ising_log_z, ising_moments, kaufman_log_z
from companion.testing import (
    InvarianceResult,
    assert_invariant,
    binary_states,
    discrete_invariance_test,
)

F64 = torch.float64
KERNELS = pytest.mark.parametrize("kernel", [checkerboard, swendsen_wang, wolff])


def spins(height: int, width: int, dtype=F64, device="cpu") -> Tensor:
    """All lattices, `(2^(height width), height, width)`."""
    bits = binary_states(height * width, dtype=dtype, device=device)
    return (2 * bits - 1).reshape(-1, height, width)


def random_spins(rng, *shape, seed=0, dtype=F64, device="cpu") -> Tensor:
    return 2.0 * (torch.rand(shape, generator=rng(seed)) < 0.5).to(device, dtype) - 1.0


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("size", [(1, 3), (2, 2), (3, 4), (4, 6)], ids=str)
def test_log_density_agrees_with_its_definition(rng, size):
    height, width = size
    model = Ising(height, width, 0.3, -0.2, dtype=F64)
    x = random_spins(rng, 5, 7, height, width)
    bonds = torch.zeros(5, 7, dtype=F64)
    for r, c in itertools.product(range(height), range(width)):
        bonds += x[..., r, c] * (x[..., r, (c + 1) % width] + x[..., (r + 1) % height, c])
    expected = 0.3 * bonds - 0.2 * x.sum((-2, -1))
    torch.testing.assert_close(model.log_prob(x), expected)
    assert torch.equal(model(x), model.log_prob(x)) and torch.equal(model.energy(x), -model(x))
    torch.testing.assert_close(model.correlation(x), bonds / (2 * height * width))
    torch.testing.assert_close(model.magnetization(x), x.mean((-2, -1)))


@pytest.mark.parametrize("size", [(2, 3), (3, 3), (4, 4)], ids=str)
@pytest.mark.parametrize(("coupling", "field"), [(0.4, 0.0), (-0.4, 0.0), (0.4, 0.1), (-0.4, 0.1)])
def test_log_z_agrees_with_enumeration(size, coupling, field, ledger):
    model = Ising(*size, coupling, field, dtype=F64)
    exact = enumeration(
        lambda bits: model((2 * bits - 1).reshape(-1, *size)), size[0] * size[1], dtype=F64
    )
    found = model.log_z()
    assert found.std_error == 0 and found.value.dtype == F64
    name = f"Ising log Z, {size[0]} x {size[1]}, K = {coupling}, h = {field}"
    ledger(f"{name}: model, enumeration", exact=exact.value, estimate=found.value)


def test_log_z_of_any_size_without_a_field_and_of_narrow_lattices_with_one():
    assert Ising(50, 40, 0.4, dtype=F64).log_z().value == kaufman_log_z(50, 40, 0.4)
    assert Ising(50, 40, -0.4, dtype=F64).log_z().value == kaufman_log_z(50, 40, 0.4)
    assert Ising(3, 20, -0.4, dtype=F64).log_z().value == ising_log_z(20, 3, -0.4)
    assert Ising(20, 4, 0.4, 0.1, dtype=F64).log_z().value == ising_log_z(20, 4, 0.4, 0.1)
    for coupling, field in ((0.4, 0.1), (-0.4, 0.0)):
        with pytest.raises(ValueError, match=r"13 by 15.*annealed importance sampling"):
            Ising(13, 15, coupling, field).log_z()


def test_log_z_of_a_batch_of_temperatures():
    coupling = torch.tensor([[0.1], [0.3], [0.5]], dtype=F64)
    for field in (0.0, torch.tensor([0.0, 0.2], dtype=F64)):
        model = Ising(4, 4, coupling, field)
        found = model.log_z()
        fields = torch.as_tensor(field, dtype=F64)
        assert found.value.shape == (coupling + fields).shape == found.std_error.shape
        torch.testing.assert_close(found.value, ising_log_z(4, 4, coupling, field))


# ---------------------------------------------------------------- pure steps, slow definitions


def slow_sweep(model: Ising, x: Tensor, noise: Tensor) -> Tensor:
    """One site after the other, the black ones first, each with its own uniform number."""
    x = x.clone()
    for colour, r, c in itertools.product((0, 1), range(model.height), range(model.width)):
        if (r + c) % 2 == colour:
            around = x[(r + 1) % model.height, c] + x[r - 1, c]
            around = around + x[r, (c + 1) % model.width] + x[r, c - 1]
            # The four sublattices: black of even and of odd rows, white of even and of odd rows.
            u = noise[2 * colour + r % 2, r // 2, c // 2]
            up = u < torch.sigmoid(2 * (model.coupling * around + model.field))
            x[r, c] = 1.0 if up else -1.0
    return x


@pytest.mark.parametrize("size", [(2, 2), (2, 6), (4, 2), (6, 4)], ids=str)
def test_a_checkerboard_sweep_updates_one_site_after_the_other(rng, size):
    model = Ising(*size, 0.4, 0.1, dtype=F64)
    x = random_spins(rng, 20, *size)
    noise = torch.rand(4, 20, size[0] // 2, size[1] // 2, dtype=F64, generator=rng(1))
    state, info = checkerboard_step(model.coupling, model.field, GibbsState(x), noise)
    for i in range(20):
        assert torch.equal(state.x[i], slow_sweep(model, x[i], noise[:, i]))
    assert info.accepted.all() and info.accept_prob.shape == (20,)


def slow_clusters(model: Ising, x: Tensor, bond: Tensor) -> list[set[tuple[int, int]]]:
    """The clusters of one lattice, merged bond by bond."""
    height, width = x.shape
    clusters = [{(r, c)} for r in range(height) for c in range(width)]
    for direction, r, c in itertools.product((0, 1), range(height), range(width)):
        other = (r, (c + 1) % width) if direction == 0 else ((r + 1) % height, c)
        aligned = model.coupling * x[r, c] * x[other] > 0
        if aligned and bond[direction, r, c] < 1 - math.exp(-2 * abs(float(model.coupling))):
            a, b = (next(s for s in clusters if site in s) for site in ((r, c), other))
            if a is not b:
                clusters.remove(b)
                a |= b
    return clusters


@pytest.mark.parametrize("coupling", [0.4, -0.4, 0.8])
@pytest.mark.parametrize("size", [(1, 4), (2, 2), (5, 3), (8, 8)], ids=str)
def test_cluster_steps_turn_over_whole_clusters(rng, size, coupling):
    model = Ising(*size, coupling, 0.2, dtype=F64)
    x = random_spins(rng, 10, *size)
    if coupling > 0:
        x[:5] = 1.0  # large clusters
    g = rng(2)
    bond = torch.rand(2, *x.shape, dtype=F64, generator=g)
    flip = torch.rand(x.shape, dtype=F64, generator=g)
    seed = torch.randint(size[0] * size[1], (10,), generator=g)
    uniform = torch.rand(10, dtype=F64, generator=g)
    parameters = (model.coupling, model.field, GibbsState(x))
    all_at_once, info = swendsen_wang_step(*parameters, ClusterNoise(bond, flip))
    one, one_info = wolff_step(*parameters, WolffNoise(bond, seed, uniform))
    for i in range(10):
        clusters = slow_clusters(model, x[i], bond[:, i])
        expected, wolff_expected = x[i].clone(), x[i].clone()
        for cluster in clusters:
            s = sum(float(x[i][site]) for site in cluster)
            turned = float(flip[i][min(cluster)]) < 1 / (1 + math.exp(2 * 0.2 * s))
            seeded = divmod(int(seed[i]), size[1]) in cluster
            accepted = seeded and float(uniform[i]) < math.exp(min(0.0, -2 * 0.2 * s))
            if seeded:
                assert one_info.cluster_size[i] == len(cluster)
                assert bool(one_info.accepted[i]) == accepted
            for site in cluster:
                expected[site] *= -1 if turned else 1
                wolff_expected[site] *= -1 if accepted else 1
        assert torch.equal(all_at_once.x[i], expected)
        assert torch.equal(one.x[i], wolff_expected)
        mean_size = sum(len(c) ** 2 for c in clusters) / x[i].numel()
        assert float(info.cluster_size[i]) == pytest.approx(mean_size)


def test_connected_components_agree_with_scipy(rng):
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    for num_edges in (0, 1, 300, 600, 3000):
        a, b = torch.randint(1000, (2, num_edges), generator=rng(num_edges))
        root = _connected(a, b, torch.arange(1000))
        graph = coo_matrix(([1] * num_edges, (a.numpy(), b.numpy())), shape=(1000, 1000))
        count, label = connected_components(graph, directed=False)
        # The first site of each component names it.
        first = torch.full((count,), 1000).scatter_reduce(
            0, torch.from_numpy(label).long(), torch.arange(1000), "amin"
        )
        assert torch.equal(root, first[label])
    chain = torch.arange(999)
    assert not _connected(chain, chain + 1, torch.arange(1000)).any()


# ---------------------------------------------------------------- invariance


def invariance(kernel: Kernel, model: Ising, rng, seed=3) -> InvarianceResult:
    device, dtype = model.coupling.device, model.coupling.dtype
    return discrete_invariance_test(
        kernel,
        model,
        spins(model.height, model.width, dtype, device),
        num_chains=20_000,
        num_steps=2,
        generator=rng(seed, device),
    )


@KERNELS
@pytest.mark.parametrize(
    ("coupling", "field", "dtype"),
    [(0.4, 0.15, F64), (-0.3, 0.2, torch.float32), (0.4, 0.0, torch.float32)],
)
def test_kernels_leave_the_model_invariant(rng, device, kernel, coupling, field, dtype):
    size = (2, 4) if kernel is checkerboard else (3, 3)
    model = Ising(*size, coupling, field, device=device, dtype=dtype)
    assert_invariant(invariance(kernel(model), model, rng))


def altered(model: Ising, step, noise) -> Kernel:
    """A kernel of a pure step of the caller's."""

    def one(state, *, generator):
        return step(state, noise(state.x, generator)), None

    return Kernel(lambda x: GibbsState(x), one)


def cluster_noise(x: Tensor, g: torch.Generator) -> ClusterNoise:
    bond = torch.rand(2, *x.shape, dtype=x.dtype, generator=g)
    return ClusterNoise(bond, torch.rand(x.shape, dtype=x.dtype, generator=g))


def wolff_noise(x: Tensor, g: torch.Generator) -> WolffNoise:
    seed = torch.randint(x[0].numel(), x.shape[:1], generator=g)
    uniform = torch.rand(x.shape[:1], dtype=x.dtype, generator=g)
    return WolffNoise(torch.rand(2, *x.shape, dtype=x.dtype, generator=g), seed, uniform)


def test_wrong_kernels_are_rejected(rng):
    model = Ising(2, 4, 0.4, 0.15, dtype=F64)
    k, h = model.coupling, model.field

    def all_sites_at_once(state, u):
        x = state.x
        around = x.roll(1, -1) + x.roll(-1, -1) + x.roll(1, -2) + x.roll(-1, -2)
        return GibbsState(2.0 * (u < torch.sigmoid(2 * (k * around + h))).to(x) - 1.0)

    wrong = {
        "all sites at once": altered(
            model, all_sites_at_once, lambda x, g: torch.rand(x.shape, dtype=F64, generator=g)
        ),
        "conditionals without the factor 2": altered(
            model,
            lambda state, u: checkerboard_step(k / 2, h / 2, state, u)[0],
            lambda x, g: torch.rand(4, len(x), 1, 2, dtype=F64, generator=g),
        ),
        "bonds set with probability 1 - exp(-K)": altered(
            model, lambda state, u: swendsen_wang_step(k / 2, h, state, u)[0], cluster_noise
        ),
        "clusters that ignore the field": altered(
            model, lambda state, u: swendsen_wang_step(k, 0 * h, state, u)[0], cluster_noise
        ),
        "Wolff's bonds set with probability 1 - exp(-K)": altered(
            model, lambda state, u: wolff_step(k / 2, h, state, u)[0], wolff_noise
        ),
        "a Wolff cluster that ignores the field": altered(
            model, lambda state, u: wolff_step(k, 0 * h, state, u)[0], wolff_noise
        ),
    }
    for name, kernel in wrong.items():
        assert invariance(kernel, model, rng).p_value < 1e-5, name


def test_the_checkerboard_of_an_odd_lattice_is_refused_for_a_reason(rng):
    for size in ((3, 4), (4, 3)):
        with pytest.raises(ValueError, match="even sides, got .* ring of odd length"):
            checkerboard(Ising(*size, 0.4))
    # Colours by the parity of row + column, all the same: neighbours across the seam are wrong.
    model = Ising(3, 3, 0.4, 0.1, dtype=F64)
    black = (torch.arange(3)[:, None] + torch.arange(3)) % 2 == 0

    def step(state, u):
        x = state.x
        for colour, part in zip((black, ~black), u, strict=True):
            around = x.roll(1, -1) + x.roll(-1, -1) + x.roll(1, -2) + x.roll(-1, -2)
            up = part < torch.sigmoid(2 * (model.coupling * around + model.field))
            x = torch.where(colour, 2.0 * up.to(x) - 1.0, x)
        return GibbsState(x)

    kernel = altered(model, step, lambda x, g: torch.rand(2, *x.shape, dtype=F64, generator=g))
    assert invariance(kernel, model, rng).p_value < 1e-5


@pytest.mark.parametrize("kernel", [swendsen_wang, wolff])
def test_cluster_kernels_are_reversible(rng, kernel):
    """Flows between any two of the 16 states of 2 x 2 spins are the same both ways."""
    model = Ising(2, 2, 0.3, 0.2, dtype=F64)
    states, n = spins(2, 2), 400_000
    p = model(states).softmax(0)
    start = torch.multinomial(p, n, replacement=True, generator=rng(4))
    ours = kernel(model)
    end, _ = ours.step(ours.init(states[start]), generator=rng(5))
    index = ((end.x.reshape(-1, 4) > 0) * torch.tensor([8, 4, 2, 1])).sum(1)
    flow = (16 * start + index).bincount(minlength=256).reshape(16, 16).double()
    z = (flow - flow.T) / (flow + flow.T).clamp(min=1).sqrt()
    assert z.abs().max() < norm.isf(0.5e-5 / 120)
    assert flow.count_nonzero() > 100


# ---------------------------------------------------------------- exact means


def equilibrium(model: Ising, num_chains: int, g: torch.Generator) -> Tensor:
    """Chains that have forgotten their start: cluster steps do within some ten steps, where single
    sites (and Wolff's small clusters from a disordered start) need hundreds."""
    x = model.sample_base(num_chains, generator=g)
    return sample(swendsen_wang(model), x, 1, warmup=60, generator=g).x[:, 0]


@pytest.mark.parametrize("coupling", [0.3, CRITICAL_COUPLING, 0.55])
def test_means_of_8_x_8_spins_agree_with_the_transfer_matrix(rng, coupling, ledger):
    exact = ising_moments(8, 8, coupling)
    model = Ising(8, 8, coupling, dtype=F64)
    g = rng(6)
    x = equilibrium(model, 500, g)
    for kernel in (checkerboard, swendsen_wang, wolff):
        trace = sample(kernel(model), x, 10, thin=2, generator=g)
        name = f"Ising 8 x 8, K = {coupling:.4f}, {kernel.__name__}"
        for what, value, truth in [
            ("correlation of neighbours", model.correlation(trace.x), exact.correlation),
            ("E|m|", model.magnetization(trace.x).abs(), exact.abs_magnetization),
            ("E[m^2]", model.magnetization(trace.x).square(), exact.square_magnetization),
        ]:
            found = estimate(value.mean(1))  # chains are independent
            ledger(f"{name}: {what}", exact=truth, estimate=found.value, std_error=found.std_error)
        # A coupling ten per cent off is seen.
        off = ising_moments(8, 8, 1.1 * coupling).square_magnetization
        assert abs(found.value - off) > 4.5 * found.std_error


@pytest.mark.parametrize("kernel", [swendsen_wang, wolff])
def test_cluster_sizes_estimate_the_square_magnetisation(rng, kernel, ledger):
    """E[size of a random site's cluster] = N E[m^2] without a field, and with less variance."""
    model = Ising(8, 8, 0.3, dtype=F64)
    g = rng(7)
    ours = kernel(model)
    state = ours.init(equilibrium(model, 1000, g))
    sizes, squares = [], []
    for _ in range(20):
        squares.append(model.magnetization(state.x).square())
        state, info = ours.step(state, generator=g)
        sizes.append(info.cluster_size / 64)
    found = estimate(torch.stack(sizes).mean(0))
    ledger(
        f"Ising 8 x 8, K = 0.3: E[m^2] by cluster sizes, {kernel.__name__}",
        exact=ising_moments(8, 8, 0.3).square_magnetization,
        estimate=found.value,
        std_error=found.std_error,
    )
    if kernel is swendsen_wang:
        assert torch.stack(sizes).var() < 0.5 * torch.stack(squares).var()


def test_with_a_field_the_mean_spin_agrees_with_the_transfer_matrix(rng, ledger):
    exact = ising_moments(6, 8, 0.4, 0.02)
    model = Ising(6, 8, 0.4, 0.02, dtype=F64)
    g = rng(8)
    x = equilibrium(model, 400, g)
    for kernel in (checkerboard, swendsen_wang, wolff):
        trace = sample(kernel(model), x, 20, generator=g)
        found = estimate(model.magnetization(trace.x).mean(1))
        ledger(
            f"Ising 6 x 8, K = 0.4, h = 0.02, {kernel.__name__}: E[m]",
            exact=exact.magnetization,
            estimate=found.value,
            std_error=found.std_error,
        )


def test_clusters_forget_faster_than_sites_at_the_critical_coupling(rng):
    """The correlation of |m| over 20 steps, on 32 x 32 sites, from the same equilibrium."""
    model = Ising(32, 32, CRITICAL_COUPLING)
    g = rng(9)
    start = equilibrium(model, 100, g)

    def correlation(kernel) -> float:
        end = sample(kernel(model), start, 1, warmup=19, generator=g).x[:, 0]
        m = torch.stack([model.magnetization(start).abs(), model.magnetization(end).abs()])
        return float(torch.corrcoef(m)[0, 1])

    # Of 100 chains the correlations have standard errors of 0.1 at most.
    assert correlation(checkerboard) > 0.6 and correlation(swendsen_wang) < 0.5


# ---------------------------------------------------------------- runs and batches


@KERNELS
def test_a_batch_of_temperatures_moves_as_one(rng, kernel):
    couplings = torch.tensor([0.1, 0.4, 0.7], dtype=F64)
    x = random_spins(rng, 3, 5, 4, 4)
    ladder = Ising(4, 4, couplings[:, None], torch.tensor([0.1], dtype=F64))
    ours = kernel(ladder)
    state, info = ours.step(ours.init(x), generator=rng(10))
    assert state.x.shape == x.shape and info.accept_prob.shape == (3, 5)
    torch.testing.assert_close(
        ladder(x)[1], Ising(4, 4, 0.4, 0.1, dtype=F64)(x[1]), rtol=1e-14, atol=0
    )
    # The same noise, each temperature by itself.
    g = rng(10)
    if kernel is checkerboard:
        noise = torch.rand(4, 3, 5, 2, 2, dtype=F64, generator=g)
        parts = [(noise[:, i],) for i in range(3)]
        step = checkerboard_step
    elif kernel is swendsen_wang:
        bond = torch.rand(2, 3, 5, 4, 4, dtype=F64, generator=g)
        flip = torch.rand(3, 5, 4, 4, dtype=F64, generator=g)
        parts = [(ClusterNoise(bond[:, i], flip[i]),) for i in range(3)]
        step = swendsen_wang_step
    else:
        bond = torch.rand(2, 3, 5, 4, 4, dtype=F64, generator=g)
        seed = torch.randint(16, (3, 5), generator=g)
        uniform = torch.rand(3, 5, dtype=F64, generator=g)
        parts = [(WolffNoise(bond[:, i], seed[i], uniform[i]),) for i in range(3)]
        step = wolff_step
    field = torch.tensor(0.1, dtype=F64)
    for i, noise in enumerate(parts):
        alone, _ = step(couplings[i], field, GibbsState(x[i]), *noise)
        assert torch.equal(state.x[i], alone.x)


@KERNELS
def test_one_chain_and_many_dimensions_of_chains(rng, kernel):
    model = Ising(4, 4, 0.4)
    for chains in ((), (1,), (2, 3, 4)):
        trace = sample(
            kernel(model),
            random_spins(rng, *chains, 4, 4, dtype=torch.float32),
            5,
            generator=rng(11),
        )
        assert trace.x.shape == (*chains, 5, 4, 4) and trace.log_prob is None
        assert trace.accept_prob.shape == chains and (trace.accept_prob == 1).all()
        assert (trace.x.abs() == 1).all()


def test_gibbs_is_the_checkerboard_kernel_and_leaves_its_input_alone(rng):
    model = Ising(4, 6, 0.4, 0.1, dtype=F64)
    x = random_spins(rng, 10, 4, 6)
    before = x.clone()
    found = model.gibbs(x, 3, generator=rng(12))
    trace = sample(checkerboard(model), x, 3, generator=rng(12))
    assert torch.equal(found, trace.x[:, -1]) and torch.equal(x, before)


def test_sample_base_draws_independent_spins_in_the_field(rng, device):
    model = Ising(2, 2, 0.4, 0.7, device=device, dtype=F64)
    n = 100_000
    x = model.sample_base(n, generator=rng(14, device))
    assert x.shape == (n, 2, 2) and x.dtype == F64
    exact = math.tanh(0.7)
    z = (x.mean(0) - exact) / math.sqrt((1 - exact**2) / n)
    assert z.abs().max() < 4.9  # 4.9 for four (4e-6 in all)
    assert abs(float(x.mean()) - 0.7) > 4.9 * math.sqrt(1 / n)  # h for tanh h
    ladder = Ising(4, 4, 0.7, torch.tensor([[0.0], [5.0]], dtype=F64))
    assert ladder.sample_base(10, generator=rng(15)).shape == (10, 2, 1, 4, 4)


@KERNELS
def test_draws_come_from_the_generator_alone(rng, kernel):
    model = Ising(4, 4, 0.4)
    before = torch.get_rng_state()
    x = model.sample_base(3, generator=rng(16))
    first = sample(kernel(model), x, 5, generator=rng(17)).x
    assert torch.equal(first, sample(kernel(model), x, 5, generator=rng(17)).x)
    assert torch.equal(before, torch.get_rng_state())


@KERNELS
def test_no_tensor_is_made_on_the_default_device(rng, kernel):
    g = rng(18)
    coupling = torch.tensor(0.4)
    with torch.device("meta"):
        model = Ising(4, 4, coupling, 0.1)
        x = model.sample_base(3, generator=g)
        trace = sample(kernel(model), x, 2, generator=g)
        tensors = (trace.x, model(x), model.log_z().value, model.gibbs(x, generator=g))
    assert {t.device.type for t in tensors} == {"cpu"}


# ---------------------------------------------------------------- arguments


def test_parameters_decide_dtype_and_device(device):
    coupling = torch.tensor(0.4, dtype=F64, device=device)
    for model in (Ising(4, 4, coupling), Ising(4, 4, 0.4, coupling)):
        assert model.coupling.dtype == model.field.dtype == F64
        assert model.coupling.device.type == model.field.device.type == device.type
    assert Ising(4, 4, 0.4).coupling.dtype == torch.float32
    assert Ising(4, 4, coupling, dtype=torch.float32).coupling.dtype == torch.float32


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: Ising(0, 4, 0.4), "height must be at least 1"),
        (lambda: Ising(4, 4, math.nan), "coupling has 1 NaN"),
        (lambda: Ising(4, 4, 0.4, math.inf), "field has 1 NaN or infinite"),
    ],
)
def test_models_that_do_not_exist_are_refused(construct, message):
    with pytest.raises(ValueError, match=message):
        construct()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_a_dtype_that_would_cut_off_the_coupling_is_refused(dtype):
    for coupling in (0.4, torch.tensor(0.4), torch.tensor(1)):
        with pytest.raises(TypeError, match=f"dtype must be a floating dtype, got {dtype}"):
            Ising(4, 4, coupling, dtype=dtype)
    assert Ising(4, 4, torch.tensor(1, dtype=dtype)).coupling.dtype == torch.float32


@KERNELS
def test_what_is_no_batch_of_spins_is_refused(kernel):
    model = Ising(4, 4, 0.4)
    x = torch.ones(2, 4, 4)
    x[0, 1, 2] = 0
    for call in (kernel(model).init, model.log_prob, model.gibbs, model.magnetization):
        with pytest.raises(ValueError, match=r"x must be \(\.\.\., 4, 4\), got \(16,\)"):
            call(torch.ones(16))
        with pytest.raises(ValueError, match=r"spins -1 and \+1 only; at index \(0, 1, 2\) .* 0"):
            call(x)
        with pytest.raises(ValueError, match="holds nan"):
            call(torch.full((4, 4), math.nan))
        with pytest.raises(TypeError, match=r"x is torch.float64 but the model is torch.float32"):
            call(torch.ones(4, 4).double())
        with pytest.raises(TypeError, match=r"torch\.Tensor, got list"):
            call([[1.0]])
    assert model.log_prob(torch.ones(4, 4, dtype=torch.int8)) == pytest.approx(32 * 0.4)
    ladder = Ising(4, 4, torch.tensor([0.1, 0.2, 0.3]))
    for chains in ((), (2,)):
        with pytest.raises(ValueError, match=r"shape \(3,\), must broadcast over the chains"):
            ladder.log_prob(torch.ones(*chains, 4, 4))


@KERNELS
def test_bad_counts_and_generators_are_refused(kernel):
    model = Ising(4, 4, 0.4)
    ours = kernel(model)
    with pytest.raises(TypeError, match=r"torch\.Generator"):
        ours.step(ours.init(torch.ones(4, 4)), generator=1)
    with pytest.raises(ValueError, match="n must be at least 1"):
        model.sample_base(0)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        model.gibbs(torch.ones(4, 4), 0)
