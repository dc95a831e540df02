"""What the chapters on losses state: costs, their gradients and floating point; activations.

The chapters' own functions stand here as definitions, and are held against PyTorch's, against
finite differences, enumeration, quadrature or many digits.
"""

import functools
import itertools
import math

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

F64 = torch.float64


# ---------------------------------------------------------------- the costs of the first chapter


def softplus(z: Tensor) -> Tensor:
    return z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))


def log_sum_exp(z: Tensor) -> Tensor:
    top = z.amax(-1, keepdim=True)
    return (top + (z - top).exp().sum(-1, keepdim=True).log()).squeeze(-1)


def squared_error(z: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (z - y).square().sum(-1)


def binary_cost(z: Tensor, y: Tensor) -> Tensor:
    return softplus(z) - y * z


def categorical_cost(z: Tensor, y: Tensor) -> Tensor:
    """With one-hot targets, so that all costs have the same arguments."""
    return log_sum_exp(z) - (y * z).sum(-1)


def multi_label_cost(z: Tensor, y: Tensor) -> Tensor:
    return binary_cost(z, y).sum(-1)


def cases(rng):
    """Each cost with its output function, logits (6, 4) and targets of its kind."""
    g = rng(0)
    z = 3 * torch.randn(6, 4, generator=g, dtype=F64)
    numbers = torch.randn(6, 4, generator=g, dtype=F64)
    labels = (torch.rand(6, 4, generator=g, dtype=F64) < 0.4).double()
    classes = F.one_hot(torch.randint(4, (6,), generator=g), 4).double()
    return {
        "numbers": (squared_error, lambda z: z, z, numbers),
        "labels": (multi_label_cost, torch.sigmoid, z, labels),
        "classes": (categorical_cost, lambda z: z.softmax(-1), z, classes),
        "one number": (squared_error, lambda z: z, z[:, :1], numbers[:, :1]),
        "yes or no": (multi_label_cost, torch.sigmoid, z[:, :1], labels[:, :1]),
    }


def gradient(cost, z, y):
    z = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(cost(z, y).sum(), z)
    return slope


def central_differences(function, x, step):
    """The gradient of a scalar function at x, one entry at a time."""
    slope = torch.empty_like(x)
    for i in range(x.numel()):
        shift = torch.zeros(x.numel(), dtype=x.dtype)
        shift[i] = step
        shift = shift.view_as(x)
        slope.view(-1)[i] = (function(x + shift) - function(x - shift)) / (2 * step)
    return slope


def test_costs_are_those_of_pytorch(rng):
    g = rng(1)
    z = 5 * torch.randn(7, 3, generator=g, dtype=F64)
    y = torch.randn(7, 3, generator=g, dtype=F64)
    labels, classes = (y > 0).double(), torch.randint(3, (7,), generator=g)
    close = torch.testing.assert_close
    close(squared_error(z, y).mean(), F.mse_loss(z, y) * 3 / 2)
    close(categorical_cost(z, F.one_hot(classes, 3)).mean(), F.cross_entropy(z, classes))
    # the multi-label cost sums over the labels, PyTorch's mean divides by their number
    mean = F.binary_cross_entropy_with_logits(z, labels)
    close(multi_label_cost(z, labels).mean(), 3 * mean)
    assert abs(multi_label_cost(z, labels).mean() - mean) > 0.1


def test_squared_error_is_the_gaussian_negative_log_likelihood(rng):
    g = rng(2)
    n, m = 5, 3
    z = torch.randn(n, m, generator=g, dtype=F64)
    y = z + 0.7 * torch.randn(n, m, generator=g, dtype=F64)
    total = (z - y).square().sum()
    for sigma in (0.3, 1.0, 4.0):
        exact = -torch.distributions.Normal(z, sigma).log_prob(y).sum()
        constant = n * m / 2 * math.log(2 * math.pi * sigma**2)
        torch.testing.assert_close(total / (2 * sigma**2) + constant, exact)
        # the factor counts all n m numbers, not the rows
        assert abs(total / (2 * sigma**2) + constant / m - exact) > 0.1
        slope = gradient(lambda z, y, s=sigma: -torch.distributions.Normal(z, s).log_prob(y), z, y)
        torch.testing.assert_close(slope, gradient(squared_error, z, y) / sigma**2)
    best = (total / (n * m)).sqrt()

    def likelihood(sigma):
        return torch.distributions.Normal(z, sigma).log_prob(y).sum()

    assert likelihood(best) > max(likelihood(best * 0.99), likelihood(best * 1.01))


@pytest.mark.parametrize("kind", ["numbers", "labels", "classes", "one number", "yes or no"])
def test_gradient_by_the_logits_is_prediction_minus_target(rng, kind):
    cost, output, z, y = cases(rng)[kind]
    claim = output(z) - y
    torch.testing.assert_close(gradient(cost, z, y), claim, rtol=0, atol=1e-14)
    # central differences: third derivatives below 0.1 times h^2 / 6, and rounding of a cost near
    # 100 divided by h; both are about 1e-10
    numeric = central_differences(lambda z: cost(z, y).sum(), z, step=1e-4)
    torch.testing.assert_close(numeric, claim, rtol=0, atol=1e-9)
    if kind != "numbers" and kind != "one number":
        # the squared error of a probability has another gradient
        other = gradient(lambda z, y: (output(z) - y).square().sum(-1), z, y)
        assert (other - claim).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["numbers", "labels", "classes"])
def test_second_derivative_is_the_covariance_of_the_target(rng, kind):
    cost, output, z, y = cases(rng)[kind]
    z, y = z[0], y[0]
    hessian = torch.autograd.functional.hessian(lambda z: cost(z, y), z)
    # enumerate the values of the target with their probabilities
    if kind == "numbers":
        covariance = torch.eye(4, dtype=F64)
    else:
        values = torch.eye(4, dtype=F64)
        probs = output(z)
        if kind == "labels":
            values = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=F64)] * 4)
            probs = torch.where(values == 1, output(z), 1 - output(z)).prod(-1)
        mean = probs @ values
        covariance = (values - mean).T @ ((values - mean) * probs[:, None])
    torch.testing.assert_close(hessian, covariance, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(hessian).min() > -1e-12  # convex
    if kind != "numbers":  # the squared error of a probability is not
        other = torch.autograd.functional.hessian(lambda z: (output(z) - y).square().sum(), z)
        assert torch.linalg.eigvalsh(other).min() < -1e-3


def test_backpropagation_by_hand_is_autograd(rng, ledger):
    g = rng(3)
    sizes = [5, 7, 6, 4]
    weights = [torch.randn(a, b, generator=g, dtype=F64) for a, b in itertools.pairwise(sizes)]
    biases = [torch.randn(b, generator=g, dtype=F64) for b in sizes[1:]]
    x = torch.randn(9, 5, generator=g, dtype=F64)
    y = F.one_hot(torch.randint(4, (9,), generator=g), 4).double()

    def cost(parameters):
        h = x
        for layer, (w, b) in enumerate(zip(parameters[:3], parameters[3:], strict=True)):
            a = h @ w + b
            h = torch.tanh(a) if layer < 2 else a
        return categorical_cost(h, y).sum()

    hs = [x]
    for w, b in zip(weights[:2], biases[:2], strict=True):
        hs.append(torch.tanh(hs[-1] @ w + b))
    delta = (hs[2] @ weights[2] + biases[2]).softmax(-1) - y
    forgetful = delta  # leaves out the derivative of the activation
    by_hand: list[Tensor] = []
    for layer in (2, 1, 0):
        by_hand = [hs[layer].T @ delta, *by_hand, delta.sum(0)]
        delta = (delta @ weights[layer].T) * (1 - hs[layer].square())
        forgetful = forgetful @ weights[layer].T if layer else forgetful
    by_hand = by_hand[:3] + by_hand[:2:-1]  # weights, then biases, both from the first layer on
    leaves = [p.clone().requires_grad_() for p in (*weights, *biases)]
    exact = torch.autograd.grad(cost(leaves), leaves)
    for ours, theirs in zip(by_hand, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert (x.T @ forgetful - exact[0]).abs().max() > 0.1
    numeric = central_differences(lambda w: cost([w, *weights[1:], *biases]), weights[0], 1e-5)
    torch.testing.assert_close(by_hand[0], numeric, rtol=0, atol=1e-7)
    ledger("backpropagation by hand: one weight of three layers", exact=exact[0][0, 0],
           estimate=by_hand[0][0, 0])  # fmt: skip


def test_cross_entropy_is_bounded_below_only_for_targets_between_zero_and_one(ledger):
    z = torch.cat([torch.linspace(-1000, 1000, 4001), torch.linspace(-8, 8, 160_001)]).double()
    for t in (0.0, 0.1, 0.5, 0.75, 1.0):
        target = torch.tensor(t, dtype=F64)
        entropy = -(torch.xlogy(target, target) + torch.xlogy(1 - target, 1 - target))
        values = binary_cost(z, target)
        assert values.min() >= entropy - 1e-12
        if 0 < t < 1:
            found = z[values.argmin()].sigmoid()
            ledger(f"soft label {t}: lowest cross-entropy", exact=entropy, estimate=values.min(),
                   tolerance=1e-8)  # fmt: skip
            assert abs(found - t) < 1e-4
    for t, far in ((-1.0, -1.0), (-0.01, -1.0), (1.01, 1.0), (2.0, 1.0)):
        excess = max(-t, t - 1)
        for size in (1e4, 1e6, 1e8):
            value = binary_cost(torch.tensor(far * size, dtype=F64), torch.tensor(t, dtype=F64))
            assert value <= -excess * size * (1 - 1e-6)
    # the cost for labels -1 and 1 is the one for 0 and 1, renamed
    for y in (-1.0, 1.0):
        torch.testing.assert_close(softplus(-y * z), binary_cost(z, torch.tensor((y + 1) / 2)))


def test_cross_entropy_and_squared_error_are_proper_and_absolute_error_is_not(rng):
    g = rng(4)
    q = torch.randn(5, generator=g, dtype=F64).softmax(0)
    p = torch.randn(1000, 5, generator=g, dtype=F64).softmax(1)
    entropy = -(q * q.log()).sum()
    divergence = (q * (q / p).log()).sum(1)
    torch.testing.assert_close(-(q * p.log()).sum(1), entropy + divergence)
    assert divergence.min() > 0
    one_hot = torch.eye(5, dtype=F64)
    expected = ((p[:, None] - one_hot).square().sum(2) * q).sum(1)
    torch.testing.assert_close(expected, (p - q).square().sum(1) + 1 - q.square().sum())
    at_truth = ((q - one_hot).square().sum(1) * q).sum()
    assert (expected > at_truth).all()
    grid = torch.linspace(0, 1, 1001, dtype=F64)
    for truth, best in ((0.3, 0.0), (0.49, 0.0), (0.51, 1.0)):
        absolute = truth * (1 - grid) + (1 - truth) * grid
        assert grid[absolute.argmin()] == best
        for cost in (-torch.xlogy(torch.tensor(truth), grid) - (1 - truth) * (1 - grid).log(),
                     truth * (1 - grid).square() + (1 - truth) * grid.square()):  # fmt: skip
            assert abs(grid[cost.argmin()] - truth) < 1e-9


def test_log_sum_exp_lies_within_log_k_above_the_maximum(rng):
    for scale in (0.1, 10.0, 1e4):
        z = scale * torch.randn(200, 7, generator=rng(5), dtype=F64)
        value, top = log_sum_exp(z), z.amax(1)
        assert (value >= top).all()
        assert (value <= top + math.log(7) + 1e-12).all()
        torch.testing.assert_close(log_sum_exp(z + 3.0), value + 3.0)
        torch.testing.assert_close(value, torch.logsumexp(z, 1))
    equal = torch.full((1, 7), -2000.0, dtype=F64)
    torch.testing.assert_close(log_sum_exp(equal), torch.tensor([math.log(7) - 2000.0], dtype=F64))
    assert equal.exp().sum(1).log().isneginf().all()  # the naive form


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_stable_forms_are_accurate_where_the_naive_ones_break(dtype):
    info = torch.finfo(dtype)
    # beyond these limits e^-z is a subnormal number, which has fewer digits
    z = torch.linspace(math.log(info.smallest_normal) + 1, 1000, 251, dtype=dtype)

    def many_digits(z):
        with mpmath.workdps(400):
            return [mpmath.log1p(mpmath.exp(mpmath.mpf(v))) for v in z.tolist()]

    def relative_errors(values, exact):
        with mpmath.workdps(400):
            return [abs(float(mpmath.mpf(v) / e - 1)) for v, e in zip(values, exact, strict=True)]

    exact = many_digits(z)
    assert max(relative_errors(softplus(z).tolist(), exact)) < 4 * info.eps
    # the naive form breaks where the format says, and not one step before
    half_ulp, largest = math.log(info.eps / 2), math.log(info.max)
    at = torch.tensor([half_ulp * 1.0001, half_ulp * 0.9999, largest * 0.9999, largest * 1.0001],
                      dtype=dtype)  # fmt: skip
    naive = (1 + at.exp()).log()
    assert naive[0] == 0 and naive[1] > 0
    assert naive[2].isfinite() and naive[3].isinf()
    assert max(relative_errors(softplus(at).tolist(), many_digits(at))) < 4 * info.eps
    # a probability rounds to 1 at the mirror image of the first limit
    assert torch.sigmoid(-at[0]) == 1 and torch.sigmoid(-at[1]) < 1
    # and its cross-entropy no longer teaches, while that of the logit does
    logit = (-2 * at[:1]).requires_grad_()
    zero = torch.zeros(1, dtype=dtype)
    for cost, slope in (
        (lambda z: F.binary_cross_entropy(torch.sigmoid(z), zero), 0.0),
        (lambda z: F.binary_cross_entropy_with_logits(z, zero), 1.0),
    ):
        assert torch.autograd.grad(cost(logit).sum(), logit)[0].item() == slope


def test_separable_data_have_no_finite_maximum_likelihood_estimate(rng):
    g = rng(6)
    direction = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    x = torch.randn(60, 3, generator=g, dtype=F64)
    margin = x @ direction
    y = torch.where(margin > 0, 1.0, -1.0).double()

    def cost(w, y, ridge=0.0):
        return softplus(-y * (x @ w)).mean() + ridge / 2 * w.square().sum()

    def slope(w, y, ridge=0.0):
        return -(x.T @ (torch.sigmoid(-y * (x @ w)) * y)) / len(x) + ridge * w

    def newton(y, ridge):
        w = torch.zeros(3, dtype=F64)
        for _ in range(50):
            p = torch.sigmoid(x @ w)
            curvature = (x.T * (p * (1 - p))) @ x / len(x) + ridge * torch.eye(3, dtype=F64)
            w = w - torch.linalg.solve(curvature, slope(w, y, ridge))
        return w

    costs = torch.stack([cost(10.0**k * direction, y) for k in range(5)])
    assert (costs.diff() < 0).all() and (costs > 0).all()
    least = margin.abs().min()
    assert costs[-1] <= math.exp(-1e4 * least)
    # wherever you are, a step along the separating direction helps
    for w in 10 * torch.randn(100, 3, generator=g, dtype=F64):
        assert slope(w, y) @ direction < 0
    # a penalty gives one minimum, which any start finds
    best = newton(y, ridge=0.01)
    assert slope(best, y, 0.01).norm() < 1e-12
    for w in torch.randn(100, 3, generator=g, dtype=F64):
        assert cost(best + 0.1 * w, y, 0.01) > cost(best, y, 0.01)
    # data that no plane separates have a finite minimum without any penalty
    overlapping = torch.where(torch.rand(60, generator=g, dtype=F64) < 0.3, -y, y)
    finite = newton(overlapping, ridge=0.0)
    assert slope(finite, overlapping).norm() < 1e-12 and finite.norm() < 10


# ---------------------------------------------------------------- activations


def leaky_relu(a: Tensor, slope: float = 0.01) -> Tensor:
    return torch.where(a > 0, a, slope * a)


def elu(a: Tensor) -> Tensor:
    return torch.where(a > 0, a, torch.expm1(a.clamp(max=0)))


ALPHA = 1 / (math.sqrt(2 * math.pi) * (0.5 - math.exp(0.5) * float(mpmath.ncdf(-1))))
LAMBDA = 1 / math.sqrt(
    0.5
    + ALPHA**2
    * (math.exp(2) * float(mpmath.ncdf(-2)) - 2 * math.exp(0.5) * float(mpmath.ncdf(-1)) + 0.5)
)


def selu(a: Tensor) -> Tensor:
    return LAMBDA * torch.where(a > 0, a, ALPHA * torch.expm1(a.clamp(max=0)))


def gelu(a: Tensor) -> Tensor:
    return a * torch.special.ndtr(a)


ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "leaky relu": leaky_relu,
    "elu": elu,
    "selu": selu,
    "gelu": gelu,
}


def slope_of(activation, a):
    a = a.clone().requires_grad_()
    (slope,) = torch.autograd.grad(activation(a).sum(), a)
    return slope


@functools.cache
def normal_grid(step=2e-4):
    z = (torch.arange(-60_000, 60_000, dtype=F64) + 0.5) * step
    return z, step * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


def expect(f, q=1.0):
    """E[f(a)] for a normal a of mean 0 and variance q, by the midpoint rule: kinks lie at edges."""
    z, weight = normal_grid()
    return (f(math.sqrt(q) * z) @ weight).item()


def test_activations_are_those_of_pytorch():
    a = torch.linspace(-30, 30, 2001, dtype=F64)
    theirs = {"relu": F.relu, "leaky relu": F.leaky_relu, "elu": F.elu, "selu": F.selu}
    theirs |= {"gelu": F.gelu}
    for name, function in theirs.items():
        torch.testing.assert_close(ACTIVATIONS[name](a), function(a), rtol=1e-12, atol=1e-14)


def test_largest_derivatives_of_the_activations(ledger):
    peak, near = math.sqrt(2), torch.linspace(-0.05, 0.05, 10_001, dtype=F64)
    a = torch.cat([torch.linspace(-20, 20, 40_001, dtype=F64), near, peak + near])  # and zero
    peaks = {
        "sigmoid": (0.25, 0.0),
        "tanh": (1.0, 0.0),
        "relu": (1.0, None),
        "leaky relu": (1.0, None),
        "elu": (1.0, None),
        "selu": (LAMBDA * ALPHA, None),
        "gelu": (float(mpmath.ncdf(peak)) + peak * math.exp(-1) / math.sqrt(2 * math.pi), peak),
    }
    for name, (largest, where) in peaks.items():
        slope = slope_of(ACTIVATIONS[name], a)
        found = slope.max()
        tolerance = 1e-10 if where is not None else 1e-4  # a jump is approached, not reached
        ledger(f"{name}: largest derivative", exact=largest, estimate=found, tolerance=tolerance)
        assert found <= largest + 1e-12
        if where is not None:
            assert abs(a[slope.argmax()] - where) < 1e-4
    p = torch.sigmoid(a)
    torch.testing.assert_close(slope_of(torch.sigmoid, a), p * (1 - p))
    torch.testing.assert_close(torch.tanh(a), 2 * torch.sigmoid(2 * a) - 1)
    torch.testing.assert_close(slope_of(torch.tanh, a), 1 - torch.tanh(a).square())


def test_gradients_of_a_deep_network_are_bounded_by_a_product(rng):
    for name, largest in (("sigmoid", 0.25), ("tanh", 1.0), ("gelu", 1.13)):
        g = rng(7)
        weights = [torch.randn(30, 30, generator=g, dtype=F64) / math.sqrt(30) for _ in range(8)]
        first = torch.randn(50, 30, generator=g, dtype=F64, requires_grad=True)
        a = first
        for w in weights:
            a = ACTIVATIONS[name](a) @ w
        sent = torch.randn(50, 30, generator=g, dtype=F64)
        (received,) = torch.autograd.grad((a * sent).sum(), first)
        bound = math.prod(largest * torch.linalg.matrix_norm(w, 2).item() for w in weights)
        ratio = received.norm(dim=1) / sent.norm(dim=1)
        assert (ratio <= bound).all()
        if name == "sigmoid":  # and the bound for another activation would not do
            assert ratio.max() < 1e-3 * bound / 0.25**8


def test_variances_propagate_forwards_as_predicted(rng):
    """Exactly, over the draw of the weights: mean 0 and variance sigma^2 |h|^2, at any width."""
    g = rng(8)
    h = torch.rand(7, generator=g, dtype=F64)  # positive, as after a ReLU
    num, sigma = 200_000, 0.6
    weights = sigma * math.sqrt(3) * (2 * torch.rand(num, 7, generator=g, dtype=F64) - 1)
    a = weights @ h  # uniform weights: no normality is needed
    variance = sigma**2 * h.square().sum()
    z_mean = a.mean() / (a.std() / math.sqrt(num))
    squares = a.square()

    def z(claim):
        return (squares.mean() - claim) / (squares.std() / math.sqrt(num))

    assert abs(z_mean) < 4.5 and abs(z(variance)) < 4.5
    # the variance of the inputs is not enough: their mean counts, too
    assert abs(z(sigma**2 * 7 * h.var(correction=0))) > 20


def test_he_weights_keep_activations_and_gradients_of_a_relu_network(rng, ledger):
    """Exact at width 20: weights of either sign make the gates of ReLU fair coins."""

    def squares(variance, g, *, one_way=False, num=4000, width=20, depth=5):
        start = torch.ones(num, width, dtype=F64).requires_grad_()
        h = start
        for _ in range(depth):
            w = torch.randn(num, width, width, generator=g, dtype=F64) * math.sqrt(variance)
            h = torch.relu(torch.einsum("ni,nij->nj", h, w))
        sent = torch.randn(h.shape, generator=g, dtype=F64).sign()
        sent = torch.ones_like(h) if one_way else sent
        (received,) = torch.autograd.grad((h * sent).sum(), start)
        return h.square().mean(1).detach(), received.square().mean(1)

    def estimate(x):
        return x.mean(), x.std() / math.sqrt(len(x))

    for what, x in zip(("activations", "gradients"), squares(2 / 20, rng(9)), strict=True):
        # each layer multiplies by width * variance / 2 = 1
        mean, error = estimate(x)
        name = f"He weights: mean square of the {what} after 5 ReLU layers"
        ledger(name, exact=1.0, estimate=mean, std_error=error)
    for x in squares(1 / 20, rng(10)):  # with half the variance each layer halves them
        mean, error = estimate(x)
        assert abs(mean - 0.5**5) < 4.5 * error
        assert abs(mean - 1) > 20 * error
    # the components that are sent back must be uncorrelated: all of one sign, they add up
    mean, error = estimate(squares(2 / 20, rng(11), one_way=True)[1])
    assert mean - 1 > 20 * error


def test_second_moments_of_the_activations_give_the_initialisations(ledger):
    def forward(name, q):
        return expect(lambda a: ACTIVATIONS[name](a).square(), q) / q

    def backward(name, q):
        return expect(lambda a: slope_of(ACTIVATIONS[name], a).square(), q)

    for q in (0.1, 1.0, 7.0):
        ledger(f"ReLU: E[phi^2] / q at q = {q}", exact=0.5, estimate=forward("relu", q),
               tolerance=1e-8)  # fmt: skip
        assert abs(backward("relu", q) - 0.5) < 1e-8
        half = (1 + 0.01**2) / 2
        assert abs(forward("leaky relu", q) - half) < 1e-8
        assert abs(backward("leaky relu", q) - half) < 1e-8
    # near zero tanh is the identity: factor 1, and smaller for larger variances
    assert 1 - 3e-4 < forward("tanh", 1e-4) < 1 and forward("tanh", 1.0) < 0.5
    # a sigmoid passes on at most a sixteenth of the squared gradient, whatever the variance
    passed = [backward("sigmoid", q) for q in (1e-6, 0.1, 1.0, 10.0)]
    assert max(passed) <= 1 / 16 and passed == sorted(passed, reverse=True)
    # ELU and GELU have no factor that is the same at every variance
    for name in ("elu", "gelu"):
        assert abs(forward(name, 4.0) / forward(name, 0.25) - 1) > 0.1


def test_selu_has_the_fixed_point_zero_one(ledger):
    assert abs(ALPHA - 1.6732632423543772) < 1e-14 and abs(LAMBDA - 1.0507009873554805) < 1e-14
    ledger("SELU of a standard normal: mean", exact=0.0, estimate=expect(selu), tolerance=1e-8)
    second = expect(lambda a: selu(a).square())
    ledger("SELU of a standard normal: second moment", exact=1.0, estimate=second, tolerance=1e-8)
    tail = math.exp(2) * float(mpmath.ncdf(-2))
    ledger(
        "SELU of a standard normal: mean squared derivative",
        exact=LAMBDA**2 * (0.5 + ALPHA**2 * tail),
        estimate=expect(lambda a: slope_of(selu, a).square()),
        tolerance=1e-8,
    )
    # weights of variance 1 / n iterate q -> E[selu(sqrt(q) Z)^2]: a contraction towards 1
    for start in (0.05, 0.5, 3.0, 20.0):
        q = start
        for _ in range(50):
            before, q = q, expect(lambda a: selu(a).square(), q)
            assert abs(q - 1) <= abs(before - 1)
        assert abs(q - 1) < 1e-4
    above, below = (expect(lambda a: selu(a).square(), q) for q in (1.001, 0.999))
    assert abs((above - below) / 0.002 - 0.7826) < 1e-3
    # He's variance, or ELU in its place, has another fixed point
    q_he, q_elu = 1.0, 1.0
    for _ in range(50):
        q_he = expect(lambda a: selu(a).square(), 2 * q_he)
        q_elu = expect(lambda a: elu(a).square(), q_elu)
    assert q_he > 2 and q_elu < 0.1


def test_alpha_dropout_keeps_mean_and_variance_and_dropout_does_not(rng):
    g = rng(11)
    h = selu(torch.randn(1_000_000, generator=g, dtype=F64))
    rate, off = 0.1, -LAMBDA * ALPHA
    keep = torch.rand(len(h), generator=g, dtype=F64) >= rate
    scale = 1 / math.sqrt((1 - rate) * (1 + rate * off**2))
    alpha = scale * (torch.where(keep, h, off) - rate * off)
    plain = h * keep / (1 - rate)

    def z(x, claim):
        return (x.mean() - claim) / (x.std() / math.sqrt(len(x)))

    assert abs(z(alpha, 0.0)) < 4.5 and abs(z(alpha.square(), 1.0)) < 4.5
    assert abs(z(plain.square(), 1 / (1 - rate))) < 4.5
    assert abs(z(plain.square(), 1.0)) > 20


def test_a_dead_unit_of_the_first_layer_stays_dead(rng):
    def train(activation):
        g = rng(12)
        x = torch.randn(40, 3, generator=g, dtype=F64)
        y = torch.randn(40, 1, generator=g, dtype=F64)
        w1 = torch.randn(3, 5, generator=g, dtype=F64)
        b1 = torch.zeros(5, dtype=F64)
        b1[0] = -20.0  # this unit is off on every row
        w2 = torch.randn(5, 1, generator=g, dtype=F64)
        start = w1.clone(), b1.clone(), w2.clone()
        parameters = [p.requires_grad_() for p in (w1, b1, w2)]
        assert ((x @ w1 + b1)[:, 0] < 0).all()
        for _ in range(200):
            cost = (activation(x @ w1 + b1) @ w2 - y).square().mean()
            for p, slope in zip(parameters, torch.autograd.grad(cost, parameters), strict=True):
                p.data -= 0.05 * slope
        return start, [p.detach() for p in parameters]

    start, end = train(torch.relu)
    assert torch.equal(end[0][:, 0], start[0][:, 0]) and end[1][0] == start[1][0]  # bit for bit
    assert torch.equal(end[2][0], start[2][0])
    assert all(not torch.equal(end[0][:, j], start[0][:, j]) for j in range(1, 5))
    start, end = train(leaky_relu)
    assert not torch.equal(end[0][:, 0], start[0][:, 0])  # a leaky unit moves, however slowly
    for activation in (elu, selu):  # these do not leave zero either, once exp(a) is gone
        assert slope_of(activation, torch.tensor([-800.0], dtype=F64)) == 0
        assert slope_of(activation, torch.tensor([-110.0])) == 0
    assert slope_of(leaky_relu, torch.tensor([-110.0])) > 0


def test_a_sigmoid_network_is_a_tanh_network_with_larger_weights_and_other_biases(rng):
    g = rng(13)
    weights = [torch.randn(6, 6, generator=g, dtype=F64) / math.sqrt(6) for _ in range(4)]
    x = torch.randn(9, 6, generator=g, dtype=F64)

    def run(ws, bs, activation):
        h = x
        for w, b in zip(ws[:-1], bs[:-1], strict=True):
            h = activation(h @ w + b)
        return h @ ws[-1] + bs[-1]

    zeros = [torch.zeros(6, dtype=F64)] * 4
    # sigm(a) = (1 + tanh(a / 2)) / 2: twice the input of each unit, half of its output
    ws = [2 * weights[0], 4 * weights[1], 4 * weights[2], 2 * weights[3]]
    bs = [zeros[0], *(-w.sum(0) / 2 for w in ws[1:])]
    exact = run(weights, zeros, torch.tanh)
    torch.testing.assert_close(run(ws, bs, torch.sigmoid), exact)
    assert (run(ws, zeros, torch.sigmoid) - exact).abs().max() > 0.1


def test_relu_pulls_images_together_and_centred_activations_do_not(ledger):
    def product(activation, c, q=1.0):
        """E[phi(a) phi(b)] / E[phi(a)^2] for normal a, b of variance q and correlation c."""
        z = (torch.arange(-400, 400, dtype=F64) + 0.5) * 0.02
        weight = torch.exp(-z.square() / 2)
        a = math.sqrt(q) * z[:, None]
        b = math.sqrt(q) * (c * z[:, None] + math.sqrt(1 - c * c) * z[None, :])
        both = weight[:, None] * weight[None, :]
        moments = [(both * activation(a) * activation(x)).sum().item() for x in (b, a)]
        return moments[0] / moments[1]

    for c in (-0.9, 0.0, 0.3, 0.95):
        theta = math.acos(c)
        exact = c + (math.sin(theta) - theta * math.cos(theta)) / math.pi
        ledger(f"ReLU: correlation {c} after a layer", exact=exact,
               estimate=product(torch.relu, c), tolerance=1e-4)  # fmt: skip
        assert exact > c + 1e-3
        assert abs(product(torch.relu, c, q=5.0) - exact) < 1e-4
    for activation in (torch.sigmoid, torch.relu, elu, gelu):
        mean, square = expect(activation), expect(lambda a, f=activation: f(a).square())
        assert abs(product(activation, 0.0) - mean**2 / square) < 1e-4
        assert mean**2 / square > 0.03
    for q in (0.1, 1.0, 10.0):
        assert abs(product(torch.tanh, 0.0, q)) < 1e-12
    assert abs(product(selu, 0.0)) < 1e-4
    assert abs(product(selu, 0.0, q=4.0)) > 0.01  # only at its fixed point
