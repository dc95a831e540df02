"""Score matching against maximum likelihood, and against the distance of scores by quadrature."""

import math

import pytest
import torch

from companion.objectives import score_matching, sliced_score_matching
from companion.objectives.score import _exact_rows, _sliced_rows
from companion.testing import binary_states
from tests.minimum import minimise

F64 = torch.float64


class Gaussian:
    """`log p~(x) = h.x - x.P x / 2` with free parameters; P is what is symmetric of them."""

    def __init__(self, dim, dtype=F64, device="cpu"):
        self.h = torch.zeros(dim, dtype=dtype, device=device, requires_grad=True)
        self.P = torch.eye(dim, dtype=dtype, device=device, requires_grad=True)

    def log_prob(self, x):
        return (x * (self.h - x @ self.precision / 2)).sum(-1)

    @property
    def precision(self):
        return (self.P + self.P.mT) / 2

    def parameters(self):
        return [self.h, self.P]


class Wells:
    """Two double wells that pull at one another: `-a.x^4 + b.x^2 + c.x + d x_1 x_2`."""

    def __init__(self, *parameters):
        self.values = [torch.tensor(value, dtype=F64, requires_grad=True) for value in parameters]

    def log_prob(self, x):
        a, b, c, d = self.values
        return (-a * x**4 + b * x**2 + c * x).sum(-1) + d * x[..., 0] * x[..., 1]

    def parameters(self):
        return self.values


TRUTH = ((0.3, 0.5), (0.8, 0.4), (0.3, -0.1), 0.7)
OTHER = ((0.6, 0.2), (0.1, 0.7), (0.0, 0.5), -0.2)


def grid():
    """Points of the plane and the weights of Wells(*TRUTH) there: the trapezoidal rule."""
    axis = torch.linspace(-4.5, 4.5, 91, dtype=F64)
    x = torch.cartesian_prod(axis, axis)
    return x, Wells(*TRUTH).log_prob(x).detach().softmax(0)


def correlated_data(rng, n=200):
    mix = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [-0.3, 0.5, 1.2]], dtype=F64)
    return torch.randn(n, 3, dtype=F64, generator=rng(0)) @ mix.T + torch.arange(3)


def test_score_matching_of_a_normal_law_is_maximum_likelihood(rng, ledger):
    v, model = correlated_data(rng), Gaussian(3)

    def loss(theta):
        model.h, model.P = theta[:3], theta[3:].view(3, 3)
        return score_matching(model, v)

    # the loss is quadratic: one Newton step; P's antisymmetric part is free, and stays zero
    start = torch.zeros(12, dtype=F64)
    slope = torch.autograd.functional.jacobian(loss, start)
    hessian = torch.autograd.functional.hessian(loss, start)
    loss(-torch.linalg.pinv(hessian, hermitian=True) @ slope)
    covariance = model.precision.inverse()
    mean = covariance @ model.h
    exact = torch.cov(v.T, correction=0)
    torch.testing.assert_close(mean, v.mean(0), rtol=0, atol=1e-8)
    torch.testing.assert_close(covariance, exact, rtol=0, atol=1e-8)
    ledger(
        "score matching of a normal law: covariance [0, 2]",
        exact=exact[0, 2],
        estimate=covariance[0, 2],
        tolerance=1e-8,
    )


def test_without_the_trace_the_variance_runs_away(rng):
    v, model = correlated_data(rng), Gaussian(3)

    def loss():
        return (model.h - v @ model.precision).square().sum(-1).mean() / 2

    minimise(loss, model.parameters())
    precisions = torch.linalg.eigvalsh(model.precision.detach())
    assert precisions.abs().max() < 1e-4  # variances above 10,000, those of the data are near 1


def test_the_loss_is_the_distance_of_scores_up_to_a_constant_of_the_data(ledger):
    x, weights = grid()
    truth, model = Wells(*TRUTH), Wells(*OTHER)

    def score(of):
        at = x.clone().requires_grad_()
        return torch.autograd.grad(of.log_prob(at).sum(), at)[0]

    distance = weights @ (score(model) - score(truth)).square().sum(-1) / 2
    constant = weights @ score(truth).square().sum(-1) / 2
    found = (weights @ _exact_rows(model, x)).detach()
    ledger("score matching of double wells", exact=distance - constant, estimate=found)
    at_the_truth = (weights @ _exact_rows(truth, x)).detach()
    ledger("score matching, its minimum", exact=-constant, estimate=at_the_truth)


def test_the_truth_is_the_minimum_of_the_population_objective():
    x, weights = grid()
    truth, model = Wells(*TRUTH), Wells(*OTHER)
    gradients = torch.autograd.grad(weights @ _exact_rows(truth, x), truth.parameters())
    assert max(float(g.abs().max()) for g in gradients) < 1e-10
    minimise(lambda: weights @ _exact_rows(model, x), model.parameters())
    for found, exact in zip(model.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)


def test_data_that_stop_at_a_wall_bias_the_estimate(ledger):
    """Positive halves of standard normal draws: score matching finds their mean, not the mode 0."""
    x = torch.linspace(0, 9, 9001, dtype=F64)[:, None]
    weights = (-x[:, 0].square() / 2).exp()
    weights[0] /= 2  # the trapezoidal rule

    class Truncated:
        mode = torch.zeros((), dtype=F64, requires_grad=True)

        def log_prob(self, x):
            return -(x - self.mode).square().sum(-1) / 2

    model = Truncated()
    minimise(lambda: weights @ _exact_rows(model, x) / weights.sum(), [model.mode])
    ledger(
        "score matching of half-normal data: the mode, truly 0",
        exact=math.sqrt(2 / math.pi),
        estimate=model.mode.detach(),
        tolerance=1e-5,
    )


# ---------------------------------------------------------------- slices


def test_sliced_score_matching_averages_to_the_exact_one_over_all_directions(rng, ledger):
    v, model = correlated_data(rng, 5), Gaussian(3)
    with torch.no_grad():
        model.P.copy_(torch.cov(correlated_data(rng).T).inverse())
    signs = 2 * binary_states(3, dtype=F64) - 1
    every = torch.stack([_sliced_rows(model, v, w.expand(1, 5, 3)) for w in signs])
    exact = _exact_rows(model, v)
    torch.testing.assert_close(every.mean(0), exact, rtol=0, atol=1e-12)
    ledger("sliced score matching", exact=exact[0].detach(), estimate=every[:, 0].mean().detach())
    found, of_gradient = (torch.autograd.grad(rows.mean(), model.P)[0] for rows in (every, exact))
    torch.testing.assert_close(found, of_gradient)
    # its variance is that of what is off the diagonal: 2 sum_{i != j} P_ij^2
    P = model.precision.detach()
    variance = 2 * (P.square().sum() - P.diagonal().square().sum())
    torch.testing.assert_close(every.var(0, correction=0), variance.expand(5))


def test_sliced_score_matching_draws_fair_signs_for_every_row(rng, device):
    model = Gaussian(2, device=device)
    with torch.no_grad():
        model.P.copy_(torch.tensor([[1.0, 0.5], [0.5, 2.0]]))
    n = 20_000
    v = torch.zeros(n, 2, dtype=F64, device=device)
    for m in (1, 4):
        found = sliced_score_matching(model, v, m, generator=rng(1, device)).detach()
        error = math.sqrt(2 * 0.5 / (n * m))  # 2 sum_{i != j} P_ij^2 = 1
        assert abs(float(found) + 3) < 4.5 * error
    one_for_all = _sliced_rows(model, v, torch.ones(1, n, 2, dtype=F64, device=device)).mean()
    assert abs(float(one_for_all.detach()) + 3) > 4.5 * math.sqrt(1 / n)


def test_sliced_score_matching_of_independent_components_is_exact(rng):
    v, model = correlated_data(rng), Gaussian(3)
    torch.testing.assert_close(
        sliced_score_matching(model, v, generator=rng(1)), score_matching(model, v)
    )


# ---------------------------------------------------------------- models and input


def test_a_score_without_a_density_is_used_as_it_is(rng):
    """A linear score whose matrix is not symmetric belongs to no density."""
    v = correlated_data(rng)
    matrix = torch.randn(3, 3, dtype=F64, generator=rng(1)).requires_grad_()

    class Linear:
        def score(self, x):
            return x @ matrix.T

    by_hand = (v @ matrix.T).square().sum(-1).mean() / 2 + matrix.trace()
    torch.testing.assert_close(score_matching(Linear(), v), by_hand)
    sliced = sliced_score_matching(Linear(), v, 1000, generator=rng(2))
    torch.testing.assert_close(sliced, by_hand, rtol=0.01, atol=0.05)


@pytest.mark.parametrize("objective", [score_matching, sliced_score_matching])
def test_a_leading_dimension_gives_each_model_its_own_gradient(objective, rng):
    data = torch.stack([correlated_data(rng), -correlated_data(rng)])

    class Several(Gaussian):
        def __init__(self, num_models):
            self.h = torch.zeros(num_models, 1, 3, dtype=F64, requires_grad=True)
            self.P = torch.eye(3, dtype=F64).repeat(num_models, 1, 1).requires_grad_()

    together = Several(2)
    objective(together, data).backward()
    for i in range(2):
        alone = Several(1)
        objective(alone, data[i : i + 1]).backward()
        torch.testing.assert_close(together.h.grad[i], alone.h.grad[0])
        if objective is score_matching:  # the slices of the other differ
            torch.testing.assert_close(together.P.grad[i], alone.P.grad[0])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_losses_follow_device_and_dtype_and_work_where_gradients_are_off(dtype, rng, device):
    model = Gaussian(3, dtype, device)
    v = correlated_data(rng).to(device, dtype)
    with torch.device("meta"), torch.no_grad():
        losses = [
            score_matching(model, v),
            sliced_score_matching(model, v, generator=rng(1, device)),
        ]
    for loss in losses:
        assert loss.shape == () and loss.dtype == dtype and loss.device.type == device.type
    assert not v.requires_grad
    score_matching(model, v).backward()
    assert model.P.grad is not None


def test_bad_input_is_refused_with_a_sentence(rng):
    model, v = Gaussian(3), correlated_data(rng)
    for objective in (score_matching, sliced_score_matching):
        with pytest.raises(ValueError, match=r"v must be a matrix \(n, D\).* got \(3,\)"):
            objective(model, v[0])
        with pytest.raises(TypeError, match=r"must be floating.* torch\.int64"):
            objective(model, v.long())
        with pytest.raises(ValueError, match="v has .* NaN"):
            objective(model, v * math.nan)

    class Flat:
        slope = torch.ones(3, dtype=F64, requires_grad=True)

        def log_prob(self, x):
            return x @ self.slope

    class Detached:
        def log_prob(self, x):
            return x.detach().sum(-1)

    class Short:
        def score(self, x):
            return x[..., :2]

    with pytest.raises(ValueError, match="score does not depend on v"):
        score_matching(Flat(), v)
    with pytest.raises(ValueError, match=r"no gradient by x.* detach"):
        score_matching(Detached(), v)
    with pytest.raises(ValueError, match=r"keep the shape of x, \(200, 3\), got \(200, 2\)"):
        score_matching(Short(), v)

    class Two(Gaussian):
        def log_prob(self, x):
            return super().log_prob(x).expand(2, *x.shape[:-1])

    with pytest.raises(ValueError, match=r"a number a row, \(200,\), got \(2, 200\).*leading"):
        score_matching(Two(3), v)
    with pytest.raises(ValueError, match="num_projections must be at least 1, got 0"):
        sliced_score_matching(model, v, 0)
