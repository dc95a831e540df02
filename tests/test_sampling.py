"""What the chapter on sampling states: generators, exact samplers, and what draws do not add.

The chapter's own samplers stand here as definitions, and are held against the laws that they should
follow. A test of fit passes at p >= 1e-5 (shared among its comparisons); each is run on a broken
sampler, too, which it has to reject.
"""

import math
from fractions import Fraction

import pytest
import torch
from scipy.stats import chisquare, expon, gumbel_r, kstest, norm
from torch import Tensor

from companion.inputs import draw
from companion.monte_carlo import rejection_sampling

F64 = torch.float64
ALPHA = 1e-5


def uniform(n: int, generator) -> Tensor:
    """Uniform on (0, 1], so that the logarithm is finite."""
    return 1 - torch.rand(n, generator=generator, dtype=F64)


def ks(x: Tensor, cdf) -> float:
    return float(kstest(x.numpy(), cdf).pvalue)


def chi2(index: Tensor, probs: Tensor) -> float:
    """p-value of the counts of `index`, or 0 if something impossible was drawn."""
    counts = torch.bincount(index, minlength=len(probs))
    possible = probs > 0
    if len(counts) > len(probs) or counts[~possible].any():
        return 0.0
    expected = probs[possible] * len(index)
    assert expected.min() > 20
    return float(chisquare(counts[possible].numpy(), expected.numpy()).pvalue)


# ---------------------------------------------------------------- generators


def lcg(seed: int, n: int, *, a: int = 65539, c: int = 0, m: int = 2**31) -> list[int]:
    out, x = [], seed
    for _ in range(n):
        x = (a * x + c) % m
        out.append(x)
    return out


@pytest.mark.parametrize("seed", [1, 7, 123456789])
def test_randu_triples_lie_on_fifteen_planes(seed, rng):
    def planes(x):
        steps = {9 * p - 6 * q + r for p, q, r in zip(x, x[1:], x[2:], strict=False)}
        return {s // 2**31 for s in steps} if all(s % 2**31 == 0 for s in steps) else None

    assert planes(lcg(seed, 20_000)) == set(range(-5, 10))
    assert planes(torch.randint(2**31, (20_000,), generator=rng(seed)).tolist()) is None
    assert planes(lcg(seed, 20_000, a=16807, m=2**31 - 1)) is None


@pytest.mark.parametrize(("a", "c", "m"), [(65539, 0, 2**31), (1103515245, 12345, 2**31)])
def test_two_seeds_of_a_linear_generator_keep_a_distance_that_the_seeds_fix(a, c, m):
    for other in (1_000_002, 77):
        first, second = lcg(1_000_001, 50, a=a, c=c, m=m), lcg(other, 50, a=a, c=c, m=m)
        distance = [(y - x) % m for x, y in zip(first, second, strict=True)]
        delta = other - 1_000_001
        assert distance == [pow(a, k, m) * delta % m for k in range(1, 51)]


def test_low_bits_of_a_power_of_two_generator_have_short_periods():
    x = lcg(2026, 4096, a=1103515245, c=12345, m=2**31)
    for bit in range(8):
        bits = [(value >> bit) & 1 for value in x]
        period = 2 ** (bit + 1)
        assert bits[period:] == bits[:-period]
        assert bits[period // 2 :] != bits[: -period // 2]  # and no shorter one


# ---------------------------------------------------------------- inversion


def test_generalised_inverse_answers_the_question_of_the_cdf(rng):
    """inverse(u) <= x exactly where u <= F(x), for a law with atoms and gaps."""
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25], dtype=F64)  # exact in binary
    cdf = probs.cumsum(0)
    u = torch.cat([uniform(1000, rng(0)), cdf[cdf > 0]])
    inverse = torch.searchsorted(cdf, u)
    x = torch.arange(len(probs))
    assert torch.equal(inverse[:, None] <= x, u[:, None] <= cdf)
    right = torch.searchsorted(cdf, u, right=True)
    assert not torch.equal(right[:, None] <= x, u[:, None] <= cdf)


def test_inverse_cdf_draws_follow_the_law(rng):
    u = uniform(20_000, rng(1))
    assert ks(-u.log() / 2, expon(scale=0.5).cdf) > ALPHA
    assert ks(-u.log() * 2, expon(scale=0.5).cdf) < ALPHA  # the mean for the rate

    probs = torch.tensor([0.2, 0.0, 0.3, 0.5], dtype=F64)
    assert chi2(torch.searchsorted(probs.cumsum(0), u), probs) > ALPHA
    exclusive = probs.cumsum(0) - probs  # a table that starts at zero
    assert chi2(torch.searchsorted(exclusive, u), probs) < ALPHA

    # An atom of 0.3 at zero, and an exponential tail: P(X > x) = 0.7 exp(-x).
    x = torch.where(u <= 0.3, 0.0, -((1 - u) / 0.7).log())
    atom = torch.tensor([0.3, 0.7], dtype=F64)
    assert chi2((x > 0).long(), atom) > ALPHA
    assert ks(x[x > 0], expon.cdf) > ALPHA
    wrong = -(1 - u).log().clamp(max=0)
    assert chi2((wrong > 0).long(), atom) < ALPHA


# ---------------------------------------------------------------- Box-Muller


def normals(u: Tensor, v: Tensor, *, mutant: str = "") -> Tensor:
    square = -2 * u.log()
    radius = square if mutant == "square" else square.sqrt()
    angle = v * (360 if mutant == "degrees" else math.pi if mutant == "half" else 2 * math.pi)
    return torch.stack([radius * angle.cos(), radius * angle.sin()])


def worst_fit(z: Tensor) -> float:
    """Smallest p-value of both marginals and of a grid of 8 x 8 cells of equal probability."""
    cell = (8 * torch.special.ndtr(z)).long().clamp(max=7)
    grid = chi2(8 * cell[0] + cell[1], torch.full((64,), 1 / 64, dtype=F64))
    return min(ks(z[0], norm.cdf), ks(z[1], norm.cdf), grid)


def test_box_muller_gives_two_independent_normals(rng):
    g = rng(2)
    u, v = uniform(20_000, g), uniform(20_000, g)
    assert worst_fit(normals(u, v)) > ALPHA / 3
    assert worst_fit(normals(u, v, mutant="square")) < ALPHA / 3
    assert worst_fit(normals(u, v, mutant="half")) < ALPHA / 3
    assert worst_fit(normals(u, u)) < ALPHA / 3  # one uniform number for both
    # Degrees taken for radians are 57.3 turns: the 0.3 of a turn that remains changes the law so
    # little that this test has no power against it.
    assert worst_fit(normals(u, v, mutant="degrees")) > ALPHA / 3


# ---------------------------------------------------------------- rejection


class Wide:
    """N(0, tau^2 I) in d dimensions."""

    def __init__(self, tau: float, d: int) -> None:
        self.tau, self.d = tau, d

    def sample(self, n: int, *, generator=None) -> Tensor:
        return self.tau * torch.randn(n, self.d, generator=generator, dtype=F64)

    def log_prob(self, x: Tensor) -> Tensor:
        constant = self.d * math.log(self.tau * math.sqrt(2 * math.pi))
        return -0.5 * (x / self.tau).square().sum(-1) - constant


@pytest.mark.parametrize(("tau", "d"), [(1.5, 1), (1.5, 6), (1.1, 40)])
def test_a_normal_under_a_wider_one_accepts_tau_to_the_minus_d(tau, d, rng, ledger):
    log_m = d * math.log(tau * math.sqrt(2 * math.pi))  # attained at the origin
    found = rejection_sampling(
        lambda x: -0.5 * x.square().sum(-1), Wide(tau, d), log_m, 2000, generator=rng(3)
    )
    rate = tau**-d
    # The 2000th acceptance comes after a negative binomial number of proposals.
    std_error = math.sqrt(2000 * (1 - rate)) / rate
    tries = torch.tensor(found.num_proposals, dtype=F64)
    ledger(
        f"proposals for 2,000 normal draws, d = {d}, proposal {tau} times as wide",
        exact=2000 / rate,
        estimate=tries,
        std_error=std_error,
    )
    assert ks(found.x.flatten(), norm.cdf) > ALPHA
    # The two plausible rates: one dimension's, and half the exponent.
    for wrong in {tau**-1, tau ** (-d / 2)} - {rate}:
        assert abs(found.num_proposals - 2000 / wrong) > 4.5 * std_error


# ---------------------------------------------------------------- categorical draws


def gumbel_max(log_weights: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    top = (log_weights + noise).max(-1)
    return top.values, top.indices


def gumbel(u: Tensor) -> Tensor:
    return -(-u.log()).log()


def test_gumbel_max_draws_from_the_softmax(rng):
    log_weights = torch.tensor([2.0, 0.5, -1.0, 1.2], dtype=F64)
    probs, log_z = log_weights.softmax(0), log_weights.logsumexp(0)
    u = torch.rand(40_000, 4, generator=rng(4), dtype=F64)

    def fit(noise):
        """Of the winner, of the maximum, and of both together, in 4 x 5 cells."""
        top, index = gumbel_max(log_weights, noise)
        level = (5 * torch.from_numpy(gumbel_r.cdf(top - log_z))).long().clamp(0, 4)
        joint = (probs[:, None] / 5).expand(4, 5).flatten()
        law = ks(top - log_z, gumbel_r.cdf)
        return min(chi2(index, probs), law, chi2(5 * index + level, joint))

    assert fit(gumbel(u)) > ALPHA / 3
    winner = gumbel_max(log_weights, gumbel(u))[1]
    assert chi2(winner, probs) > ALPHA
    for noise in (u, torch.special.ndtri(u), -gumbel(u)):
        assert chi2(gumbel_max(log_weights, noise)[1], probs) < ALPHA
        assert fit(noise) < ALPHA / 3
    # One noise for all categories: always the same winner.
    assert chi2(gumbel_max(log_weights, gumbel(u[:, :1]))[1], probs) < ALPHA


def test_gumbel_top_two_draw_without_replacement(rng):
    probs = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    noise = gumbel(torch.rand(30_000, 3, generator=rng(5), dtype=F64))
    pair = (probs.log() + noise).topk(2).indices
    exact = probs[:, None] * probs / (1 - probs[:, None])
    exact.fill_diagonal_(0)
    assert chi2(3 * pair[:, 0] + pair[:, 1], exact.flatten()) > ALPHA
    # Two draws with replacement, kept where they differ, follow another law.
    pair = torch.multinomial(probs, 60_000, replacement=True, generator=rng(6)).reshape(-1, 2)
    pair = pair[pair[:, 0] != pair[:, 1]]
    assert chi2(3 * pair[:, 0] + pair[:, 1], exact.flatten()) < ALPHA


def alias_table(probs):
    """Of floats or fractions; with fractions there is no round-off."""
    k = len(probs)
    keep, alias = [k * p for p in probs], list(range(k))
    small = [i for i in range(k) if keep[i] < 1]
    large = [i for i in range(k) if keep[i] >= 1]
    while small and large:
        i, j = small.pop(), large[-1]
        alias[i] = j
        keep[j] -= 1 - keep[i]
        if keep[j] < 1:
            small.append(large.pop())
    for i in small + large:
        keep[i] = 1
    return keep, alias


def alias_law(keep, alias):
    """The exact law of the draws: a column in k, then the column or its alias."""
    keep = [Fraction(kept) for kept in keep]
    law = [kept / len(keep) for kept in keep]
    for i, j in enumerate(alias):
        law[j] += (1 - keep[i]) / len(keep)
    return law


def test_alias_tables_are_exact(rng):
    """With fractions: every law is a uniform mixture of two-point laws, to the last digit."""
    g = rng(7)
    for k in (1, 2, 3, 10, 50):
        for _ in range(20):
            parts = torch.randint(0, 30, (k,), generator=g).tolist()
            parts[0] += 1
            probs = [Fraction(part, sum(parts)) for part in parts]
            keep, alias = alias_table(probs)
            assert alias_law(keep, alias) == probs
            assert all(0 <= kept <= 1 for kept in keep)
            if max(keep) != min(keep):
                shifted = [(j + 1) % k for j in alias]
                assert alias_law(keep, shifted) != probs


def test_alias_draws_follow_the_law(rng):
    probs = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.3], dtype=F64)
    table = alias_table(probs.tolist())
    keep, alias = torch.tensor(table[0], dtype=F64), torch.tensor(table[1])
    law = [float(p) for p in alias_law(keep.tolist(), alias.tolist())]
    torch.testing.assert_close(torch.tensor(law, dtype=F64), probs)
    g = rng(8)
    column = torch.randint(5, (30_000,), generator=g)
    u = torch.rand(30_000, generator=g, dtype=F64)
    assert chi2(torch.where(u < keep[column], column, alias[column]), probs) > ALPHA
    assert chi2(torch.where(u < keep[column], alias[column], column), probs) < ALPHA
    shifted = (alias + 1) % 5
    assert chi2(torch.where(u < keep[column], column, shifted[column]), probs) < ALPHA


# ---------------------------------------------------------------- built from parts


def test_ancestral_draws_follow_the_mixture(rng):
    weights = torch.tensor([0.3, 0.7], dtype=F64)
    mean, std = torch.tensor([[-2.0, 1.0], [0.5, 1.5]], dtype=F64)

    def cdf(x):
        return 0.3 * norm.cdf(x, -2.0, 0.5) + 0.7 * norm.cdf(x, 1.0, 1.5)

    g = rng(9)
    z = torch.randn(20_000, 2, generator=g, dtype=F64)
    k = torch.multinomial(weights, 20_000, replacement=True, generator=g)
    assert ks(mean[k] + std[k] * z[:, 0], cdf) > ALPHA
    assert ks((mean + std * z) @ weights, cdf) < ALPHA  # averaging draws is no mixture

    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights), torch.distributions.Normal(mean, std)
    )
    assert ks(draw(mixture, 20_000, generator=g), cdf) > ALPHA


def test_a_cholesky_factor_gives_the_covariance(rng):
    cov = torch.tensor([[4.0, 1.8, 0.0], [1.8, 1.0, -0.3], [0.0, -0.3, 0.9]], dtype=F64)
    factor = torch.linalg.cholesky(cov)
    z = torch.randn(20_000, 3, generator=rng(10), dtype=F64)
    # Any direction a has a'x ~ N(0, a' cov a): the axes, and two oblique ones.
    directions = torch.tensor(
        [[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, -2, 0.5], [0.3, 1, 2]], dtype=F64
    )

    def fit(x):
        scale = ((directions @ cov) * directions).sum(1).sqrt()
        return min(ks(y, norm.cdf) for y in (x @ directions.T / scale).T)

    assert fit(z @ factor.T) > ALPHA / 5
    assert fit(z @ factor) < ALPHA / 5
    assert fit(z @ cov) < ALPHA / 5


# ---------------------------------------------------------------- what draws do not add


def test_another_class_balance_moves_every_logit_by_the_same_constant(rng):
    g = rng(11)
    classes = torch.rand(2, 40, generator=g, dtype=F64)  # p(x | y) on 40 points
    classes /= classes.sum(1, keepdim=True)

    def logit(share):
        joint = torch.tensor([[1 - share], [share]], dtype=F64) * classes
        return (joint[1] / joint[0]).log()

    def odds(share):
        return share / (1 - share)

    shift = logit(0.5) - logit(0.04)
    expected = torch.full_like(shift, math.log(odds(0.5) / odds(0.04)))
    torch.testing.assert_close(shift, expected)
    assert (shift - math.log(0.5 / 0.04)).abs().min() > 0.1  # shares are not odds
    torch.testing.assert_close(logit(0.5).argsort(), logit(0.04).argsort())  # so the AUC stays
    # Each positive five times: the odds are five times what they were.
    five = 5 * 0.04 / (5 * 0.04 + 0.96)
    torch.testing.assert_close(logit(five) - logit(0.04), torch.full_like(shift, math.log(5)))


def test_draws_from_a_fitted_model_add_variance(rng, ledger):
    """The mean of n data and m draws of N(mean, 1): variance (1 + n m / (n + m)^2) / n."""
    n, m, repetitions = 20, 60, 20_000
    g = rng(12)
    data = torch.randn(repetitions, n, generator=g, dtype=F64)
    fitted = data.mean(1, keepdim=True)
    made = fitted + torch.randn(repetitions, m, generator=g, dtype=F64)
    pooled = torch.cat([data, made], 1).mean(1)
    exact = (1 + n * m / (n + m) ** 2) / n
    found = pooled.square().mean()  # the true mean is zero
    std_error = exact * math.sqrt(2 / repetitions)
    ledger(
        "variance of the mean of 20 data and 60 draws from the law fitted to them",
        exact=exact,
        estimate=found,
        std_error=torch.tensor(std_error, dtype=F64),
    )
    assert found - 1 / n > 4.5 * std_error  # worse than the data alone
    assert found - 1 / (n + m) > 4.5 * std_error  # far from what 80 data would give


def test_interpolating_two_random_members_shrinks_the_covariance_by_a_third(rng):
    """x = a + t (b - a) with t uniform: E[(1 - t)^2 + t^2] = 2/3 of the covariance."""
    n = 100_000
    g = rng(13)
    scale = torch.tensor([1.0, 3.0], dtype=F64)
    a = scale * torch.randn(n, 2, generator=g, dtype=F64)
    b = scale * torch.randn(n, 2, generator=g, dtype=F64)
    t = torch.rand(n, 1, generator=g, dtype=F64)
    square = (a + t * (b - a)).square() / scale**2
    limit = 4.5 * square.std(0) / math.sqrt(n)
    assert ((square.mean(0) - 2 / 3).abs() < limit).all()
    assert ((square.mean(0) - 1).abs() > limit).all()
    assert ((square.mean(0) - 1 / 2).abs() > limit).all()  # t = 1/2 would give a half
