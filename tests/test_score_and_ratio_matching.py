"""What the chapter on score matching and ratio matching states, beyond what the objectives' own
tests check: linear equations, asymptotic variances, walls, and the blindness for modes far apart.

Everything is an identity or a bound by quadrature or enumeration, next to a plausible mistake that
it rejects.
"""

import math

import pytest
import torch
from torch import Tensor

from companion.models.boltzmann import BoltzmannMachine
from companion.objectives import pseudolikelihood, ratio_matching, score_matching
from companion.objectives.score import _exact_rows
from companion.testing import binary_states

F64 = torch.float64
LINE = torch.linspace(-16, 16, 6401, dtype=F64)
DX = LINE[1] - LINE[0]


# ---------------------------------------------------------------- exponential families


def test_an_exponential_family_is_fitted_by_linear_equations(rng, ledger):
    """`theta = -A^-1 b` makes the gradient of the companion's loss zero; the sign matters."""
    x = torch.randn(200, 2, dtype=F64, generator=rng(0)) * 0.8 + 0.3

    def statistics(x: Tensor) -> Tensor:
        a, b = x.unbind(-1)
        return torch.stack([a**4 + b**4, a * a * b * b, a * a, a * b, a, b], -1)

    class Family:
        theta = torch.zeros(6, dtype=F64)

        def log_prob(self, x: Tensor) -> Tensor:
            return statistics(x) @ self.theta

    at, slopes, laplacians = x.clone().requires_grad_(), [], []
    for statistic in statistics(at).unbind(-1):
        (slope,) = torch.autograd.grad(statistic.sum(), at, create_graph=True)
        curvature = torch.zeros(len(x), dtype=F64)
        for i in range(2) if slope.requires_grad else ():
            second = torch.autograd.grad(slope[:, i].sum(), at, retain_graph=True)[0]
            curvature = curvature + second[:, i]
        slopes.append(slope.detach())
        laplacians.append(curvature)
    G, b = torch.stack(slopes, 1), torch.stack(laplacians, 1).mean(0)
    A = (G @ G.mT).mean(0)
    model = Family()
    for sign in (1, -1):
        model.theta = torch.linalg.solve(A, -sign * b).requires_grad_()
        loss = score_matching(model, x)
        (gradient,) = torch.autograd.grad(loss, model.theta)
        if sign == 1:
            ledger(
                "score matching of an exponential family: its minimum",
                exact=-b @ torch.linalg.solve(A, b) / 2,
                estimate=loss.detach(),
            )
            assert gradient.abs().max() < 1e-10
        else:
            assert gradient.abs().max() > 0.1


def power_moment(a: float, k: int) -> float:
    """`E |x|^a` under `exp(-x^(2k))`."""
    return math.exp(math.lgamma((a + 1) / (2 * k)) - math.lgamma(1 / (2 * k)))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_sandwich_of_a_power_family_agrees_with_its_closed_form(k, ledger):
    """`exp(-theta x^2k)` at 1: rows of the companion's loss by quadrature, against Gamma moments.

    For the normal law, k = 1, it is the variance of maximum likelihood, 2k.
    """
    x = torch.linspace(-6, 6, 3001, dtype=F64)[:, None]
    weights = (-(x[:, 0] ** (2 * k))).softmax(0)

    class Power:
        theta = torch.ones((), dtype=F64, requires_grad=True)

        def log_prob(self, x: Tensor) -> Tensor:
            return -self.theta * (x ** (2 * k)).sum(-1)

    def rows(theta: Tensor) -> Tensor:
        model = Power()
        model.theta = theta
        return _exact_rows(model, x)

    theta = torch.ones(len(x), dtype=F64, requires_grad=True)  # each row has its own
    (slopes,) = torch.autograd.grad(rows(theta).sum(), theta, create_graph=True)
    (curvatures,) = torch.autograd.grad(slopes.sum(), theta)
    A, slopes = weights @ curvatures, slopes.detach()
    assert abs(weights @ slopes) < 1e-10
    of_A = 4 * k**2 * power_moment(4 * k - 2, k)
    of_B = 16 * k**4 * power_moment(8 * k - 4, k)
    of_B -= 16 * k**3 * (2 * k - 1) * power_moment(6 * k - 4, k)
    of_B += 4 * k**2 * (2 * k - 1) ** 2 * power_moment(4 * k - 4, k)
    exact = of_B / of_A**2
    ledger(
        f"score matching of exp(-x^{2 * k}): asymptotic variance",
        exact=exact,
        estimate=weights @ slopes.square() / A**2,
        tolerance=1e-8,
    )
    assert (abs(exact - 2 * k) < 1e-12) == (k == 1) and exact > 2 * k - 1e-12
    assert abs(exact - 1 / of_A) > 0.1  # the inverse Hessian alone is another number


# ---------------------------------------------------------------- walls


@pytest.mark.parametrize("rate", [0.5, 2.0])
def test_a_weight_that_vanishes_at_the_wall_finds_the_truth(rate):
    """Half-normal and exponential data: weighted with x exact, unweighted wrong."""
    x = torch.linspace(0, 40, 40_001, dtype=F64)
    trapezium = torch.ones_like(x)
    trapezium[0] = 0.5

    def minimum(p: Tensor, score, slope, weighted: bool) -> Tensor:
        """By differences, which are exact: the losses are quadratic in the parameter."""

        def loss(theta: Tensor) -> Tensor:
            s, ds = score(theta), slope(theta)
            rows = x**2 * (s**2 / 2 + ds) + 2 * x * s if weighted else s**2 / 2 + ds
            return p @ rows

        below, at_0, above = (loss(torch.tensor(t, dtype=F64)) for t in (-1.0, 0.0, 1.0))
        return (below - above) / (2 * (above - 2 * at_0 + below))

    half = trapezium * (-(x**2) / 2).exp()
    half = half / half.sum()

    def mode(weighted: bool) -> Tensor:
        return minimum(half, lambda m: m - x, lambda m: -torch.ones_like(x), weighted)

    assert abs(mode(True)) < 1e-6
    assert abs(mode(False) - math.sqrt(2 / math.pi)) < 1e-4
    waits = trapezium * (-rate * x).exp()
    waits = waits / waits.sum()

    def found(weighted: bool) -> Tensor:
        flat = torch.zeros_like(x)
        return minimum(waits, lambda r: -r + flat, lambda r: flat + 0 * r, weighted)

    assert abs(found(True) - rate) < 1e-5
    assert abs(found(False)) < 1e-12


# ---------------------------------------------------------------- blindness


def mixture(m: float, w: float) -> tuple[Tensor, Tensor]:
    """Log-density and, by autograd, score of `w N(m, 1) + (1 - w) N(-m, 1)`."""
    x = LINE.clone().requires_grad_()
    one = math.log(w) - (x - m).square() / 2
    two = math.log(1 - w) - (x + m).square() / 2
    log_p = torch.logaddexp(one, two) - math.log(2 * math.pi) / 2
    (score,) = torch.autograd.grad(log_p.sum(), x)
    return log_p.detach(), score


@pytest.mark.parametrize(("w", "u"), [(0.3, 0.7), (0.5, 0.9), (0.02, 0.6)])
def test_the_score_hardly_sees_the_weights_of_separated_modes(w, u):
    def bound(m: float) -> float:
        factor = m**2 * (w - u) ** 2 / (4 * u * (1 - u) * math.sqrt(w * (1 - w)))
        return factor * math.exp(-(m**2) / 2)

    coins = w * math.log(w / u) + (1 - w) * math.log((1 - w) / (1 - u))
    for m in (0.5, 1.0, 2.0, 3.0, 4.0, 5.0):
        (log_p, s), (log_q, t) = mixture(m, w), mixture(m, u)
        p = log_p.exp() * DX
        divergence = float(p @ (s - t).square() / 2)
        assert 0 < divergence <= bound(m)
    assert divergence > bound(m) / 100  # not a vacuous bound
    assert divergence < 1e-3 and abs(float(p @ (log_p - log_q)) - coins) < 1e-4
    # the rate is right: the bound with twice the exponent is broken
    assert divergence > bound(m) * math.exp(-(m**2) / 2)
    # the general form, with the integral by quadrature, is the same bound
    f1 = torch.exp(-(LINE - m).square() / 2) / math.sqrt(2 * math.pi)
    f2 = f1.flip(0)
    integral = float(((f1 * f2).sqrt() * (2 * m) ** 2 * DX).sum())
    general = (w - u) ** 2 / (16 * u * (1 - u) * math.sqrt(w * (1 - w))) * integral
    assert abs(general / bound(m) - 1) < 1e-10


@pytest.mark.parametrize(("w", "u"), [(0.3, 0.7), (0.02, 0.6)])
def test_the_bound_on_blindness_holds_for_unequal_modes(w, u):
    """A normal law and a wider logistic one; the identity of the proof, and the bound after it."""
    x = torch.linspace(-60, 60, 24_001, dtype=F64, requires_grad=True)
    dx = float(x.detach()[1] - x.detach()[0])
    log_f1 = -(x - 3).square() / 2 - math.log(2 * math.pi) / 2
    z = (x + 4) / 1.5
    log_f2 = -z - 2 * torch.nn.functional.softplus(-z) - math.log(1.5)

    def score(log_p: Tensor) -> Tensor:
        return torch.autograd.grad(log_p.sum(), x, retain_graph=True)[0]

    log_pw = torch.logaddexp(math.log(w) + log_f1, math.log(1 - w) + log_f2)
    log_pu = torch.logaddexp(math.log(u) + log_f1, math.log(1 - u) + log_f2)
    apart = (score(log_f1) - score(log_f2)).square()
    divergence = ((log_pw.exp() * (score(log_pw) - score(log_pu)).square()).sum() * dx / 2).item()

    def of_proof(power: int) -> float:
        rows = (2 * log_f1 + 2 * log_f2 - log_pw - power * log_pu).exp() * apart
        return ((w - u) ** 2 / 2 * rows.sum() * dx).item()

    assert abs(of_proof(2) / divergence - 1) < 1e-9
    assert abs(of_proof(1) / divergence - 1) > 0.1
    integral = (((log_f1 + log_f2) / 2).exp() * apart).sum().item() * dx
    bound = (w - u) ** 2 / (16 * u * (1 - u) * math.sqrt(w * (1 - w))) * integral
    assert bound / 100 < divergence <= bound


# ---------------------------------------------------------------- directions


def test_normal_directions_add_the_variance_of_the_diagonal(rng):
    """Exact by Gauss-Hermite quadrature with three points, which is right up to degree 5."""
    A = torch.randn(3, 3, dtype=F64, generator=rng(0))
    A = A + A.T
    nodes = torch.tensor([-math.sqrt(3), 0.0, math.sqrt(3)], dtype=F64)
    masses = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=F64)
    w, p = torch.cartesian_prod(nodes, nodes, nodes), torch.cartesian_prod(masses, masses, masses)
    values, p = ((w @ A) * w).sum(1), p.prod(1)
    torch.testing.assert_close(p @ values, A.trace())
    variance = p @ values.square() - A.trace().square()
    torch.testing.assert_close(variance, 2 * A.square().sum())
    signs = 2 * binary_states(3, dtype=F64) - 1
    off_diagonal = 2 * (A.square().sum() - A.diagonal().square().sum())
    of_signs = ((signs @ A) * signs).sum(1).var(correction=0)
    torch.testing.assert_close(of_signs, off_diagonal)
    assert of_signs < 0.9 * variance


# ---------------------------------------------------------------- ratio matching


def test_ratio_matching_weighs_a_unit_by_how_undecided_it_is(rng):
    """The gradients are `-sum_i k(e_i) d log-odds_i`, k = e for PL and 2 e^2 (1 - e) for RM."""
    model = BoltzmannMachine(4, dtype=F64)
    with torch.no_grad():
        model.J.copy_(torch.randn(4, 4, dtype=F64, generator=rng(1)))
    v = binary_states(4, dtype=F64)
    wrong = (v - model.conditional_probs(v)).abs().detach()  # probability of the wrong value
    sign = 2 * v - 1

    def by_weights(weight: Tensor) -> Tensor:
        # d log-odds of the value that is there, by b_i, is its sign
        return -(weight * sign).mean(0)

    (of_pl,) = torch.autograd.grad(pseudolikelihood(model, v), model.b)
    (of_rm,) = torch.autograd.grad(ratio_matching(model, v), model.b)
    torch.testing.assert_close(of_pl, by_weights(wrong))
    torch.testing.assert_close(of_rm, by_weights(2 * wrong**2 * (1 - wrong)))
    assert (of_rm - by_weights(2 * wrong**2)).abs().max() > 0.01
