"""Denoising score matching and its sampler, against smoothed densities in closed form."""

import math

import pytest
import torch

from companion.objectives import annealed_langevin, denoising_score_matching, tweedie
from companion.objectives.denoising import _denoising_rows

F64 = torch.float64


class Mixture:
    """Two normal laws on the line, and themselves with noise of any sigma."""

    weights = torch.tensor([0.2, 0.8], dtype=F64)
    means = torch.tensor([-3.0, 2.0], dtype=F64)
    scales = torch.tensor([0.5, 0.8], dtype=F64)

    def __init__(self, sigma=None):
        self.sigma = sigma

    def parts(self, x, sigma):
        variance = self.scales**2 + torch.as_tensor(sigma, dtype=x.dtype)[..., None] ** 2
        self.gain = self.scales**2 / variance
        deviation = x - self.means
        log = self.weights.log() - deviation.square() / (2 * variance) - variance.log() / 2
        return log - 0.5 * math.log(2 * math.pi)

    def log_prob(self, x, *sigma):
        return self.parts(x, *(sigma or [self.sigma])).logsumexp(-1)

    def posterior_mean(self, x, sigma):
        share = self.parts(x, sigma).softmax(-1)
        return (share * (self.means + self.gain * (x - self.means))).sum(-1, keepdim=True)


def score_of(log_prob, x):
    at = x.clone().requires_grad_()
    return torch.autograd.grad(log_prob(at).sum(), at)[0]


def line(limit, num):
    dx = 2 * limit / (num - 1)  # and x[num // 2] is exactly 0, on every machine
    return dx * (torch.arange(num, dtype=F64) - num // 2), dx


def expectation(model, sigma):
    """The loss of one scale with all data of the mixture and all noise: trapezoidal rules."""
    (v, dv), (e, de) = line(12, 361), line(9, 145)
    noise = (-e.square() / 2).exp() / math.sqrt(2 * math.pi) * de
    weights = (Mixture(0.0).log_prob(v[:, None]).exp() * dv)[:, None] * noise
    points = torch.cartesian_prod(v, e)
    rows = _denoising_rows(model, points[:, :1], sigma, points[:, 1:])
    return weights.flatten() @ rows


class Cubic:
    """A score of free coefficients, `a x + b x^3 + c`; it belongs to a density only at times."""

    def __init__(self, *coefficients):
        self.coefficients = torch.tensor(coefficients, dtype=F64, requires_grad=True)

    def score(self, x):
        a, b, c = self.coefficients
        return a * x + b * x**3 + c


@pytest.mark.parametrize("model", [Cubic(-0.3, 0.01, 0.2), Mixture(0.2)], ids=["score", "density"])
def test_the_loss_is_the_distance_to_the_smoothed_score_up_to_a_constant(model, ledger):
    sigma = 0.7
    x, dx = line(16, 2001)
    x = x[:, None]
    smooth = Mixture(sigma)
    weights, target = smooth.log_prob(x).exp() * dx, score_of(smooth.log_prob, x)[:, 0]
    found = model.score(x) if hasattr(model, "score") else score_of(model.log_prob, x)
    distance = weights @ (found[:, 0] - target).square() / 2
    exact = sigma**2 * (distance - weights @ target.square() / 2) + 1 / 2
    ledger(
        f"denoising score matching, {type(model).__name__.lower()} model",
        exact=exact.detach(),
        estimate=expectation(model, sigma).detach(),
        tolerance=1e-8,
    )
    data = score_of(Mixture(0.0).log_prob, x)[:, 0]  # the clean data's score is another
    other = sigma**2 * (weights @ (found[:, 0] - data).square() / 2)
    assert abs(other - sigma**2 * distance) > 0.1


def test_the_smoothed_density_is_the_minimum():
    sigma = torch.tensor(0.7, dtype=F64, requires_grad=True)
    model = Mixture(sigma)  # its own sigma is the parameter
    (slope,) = torch.autograd.grad(expectation(model, 0.7), sigma)
    assert abs(slope) < 1e-9
    (slope,) = torch.autograd.grad(expectation(model, 0.9), sigma)
    assert abs(slope) > 0.01


def test_clean_targets_give_the_score_and_noisy_ones_the_identity(ledger):
    """Data N(0, 1), noise 0.5: the score's slope is -1/1.25, that of a useless denoiser 1."""
    sigma = 0.5
    (v, dv), (e, de) = line(9, 145), line(9, 145)
    weights = torch.outer((-v.square() / 2).exp() * dv, (-e.square() / 2).exp() * de).flatten()
    weights, points = weights / (2 * math.pi), torch.cartesian_prod(v, e)
    clean, noise = points[:, :1], points[:, 1:]

    def loss(slope):
        model = Cubic(0, 0, 0)
        model.coefficients = torch.cat([slope[None], slope.new_zeros(2)])
        return weights @ _denoising_rows(model, clean, sigma, noise)

    zero = torch.zeros((), dtype=F64)
    gradient = torch.autograd.functional.jacobian(loss, zero)
    slope = -gradient / torch.autograd.functional.hessian(loss, zero)
    ledger("denoising score matching of N(0, 1): slope", exact=-0.8, estimate=slope)
    noisy = (clean + sigma * noise)[:, 0]
    identity = weights @ (noisy * noisy) / (weights @ noisy.square())  # least squares to itself
    ledger("a denoiser with noisy targets: slope", exact=1.0, estimate=identity)
    implied_score = (identity - 1) / sigma**2
    assert abs(implied_score) < 1e-12 and abs(slope) > 0.79


def test_the_loss_averages_over_the_scales_and_tells_the_model_which(rng, ledger):
    class Normal:  # wrong on purpose: a score that does not know the scale
        def score(self, x, sigma):
            assert sigma.shape == x.shape[:-1]
            seen.append(sigma)
            return -x

    n, scales, seen = 100_000, torch.tensor([2.0, 0.5], dtype=F64), []
    v = torch.randn(n, 1, dtype=F64, generator=rng(0))
    loss = denoising_score_matching(Normal(), v, scales, generator=rng(1)).detach()
    # sigma s + e = -sigma v + (1 - sigma^2) e has the variance sigma^2 + (1 - sigma^2)^2
    variance = scales**2 + (1 - scales**2) ** 2
    exact = variance.mean() / 2
    error = ((3 * variance**2).mean() / 4 - exact**2).sqrt() / math.sqrt(n)
    ledger("denoising score matching, two scales", exact=exact, estimate=loss, std_error=error)
    assert abs(loss - variance[0] / 2) > 4.5 * error
    assert abs((seen[0] == 2).double().mean() - 0.5) < 4.5 * 0.5 / math.sqrt(n)


# ---------------------------------------------------------------- tweedie


def test_tweedie_gives_the_posterior_mean(ledger):
    x = torch.linspace(-6, 6, 25, dtype=F64)[:, None]
    exact = Mixture().posterior_mean(x, 0.7)
    found = tweedie(Mixture(0.7), x, 0.7)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    ledger("Tweedie's posterior mean at 0", exact=exact[12], estimate=found[12])
    assert not found.requires_grad
    told = tweedie(Mixture(), x, torch.full((25,), 0.7, dtype=F64))
    torch.testing.assert_close(told, exact, rtol=0, atol=1e-12)
    assert (tweedie(Mixture(0.2), x, 0.7) - exact).abs().max() > 0.1  # the score of less noise


# ---------------------------------------------------------------- annealed Langevin


class StandardNormal:
    def score(self, x, sigma):
        return -x / (1 + sigma**2)[..., None]


def variance_after(sigmas, variance, num_steps, step_size, drift=0.5):
    """The variance of annealed Langevin dynamics on N(0, 1), exactly, step by step."""
    for sigma in sigmas.tolist():
        a = step_size * sigma**2 / float(sigmas[-1]) ** 2
        for _ in range(num_steps):
            variance = (1 - drift * a / (1 + sigma**2)) ** 2 * variance + a
    return variance


def test_the_variance_on_a_normal_law_is_that_of_the_recursion(rng, device, ledger):
    sigmas = torch.tensor([2.0, 1.0, 0.5], dtype=F64, device=device)
    n, steps, step_size = 100_000, 5, 0.4
    x = 3 * torch.randn(n, 1, dtype=F64, device=device, generator=rng(0, device))
    end = annealed_langevin(StandardNormal(), sigmas, x, steps, step_size, generator=rng(1, device))
    exact = variance_after(sigmas, 9.0, steps, step_size)
    error = exact * math.sqrt(2 / n)
    ledger(
        "annealed Langevin dynamics on N(0, 1): variance",
        exact=exact,
        estimate=end.var(),
        std_error=error,
    )
    whole_step = variance_after(sigmas, 9.0, steps, step_size, drift=1.0)  # a, not a / 2
    same_step = variance_after(sigmas.new_full((3,), 0.5), 9.0, steps, step_size)
    assert min(abs(end.var() - whole_step), abs(end.var() - same_step)) > 4.5 * error


def test_the_variance_settles_at_what_the_docstring_says():
    for sigma, step_size in ((0.5, 0.4), (1.0, 0.1)):
        t = 1 + sigma**2
        settled = variance_after(torch.tensor([sigma]), 9.0, 2000, step_size)
        assert math.isclose(settled, t / (1 - step_size / (4 * t)), rel_tol=1e-12)
        assert settled / t < 1 / (1 - step_size / sigma**2 / 4)


def test_annealing_finds_the_weights_of_modes_that_plain_langevin_cannot(rng, ledger):
    """Against the exact law of the chain: its transition on a grid, scale by scale."""
    sigmas = torch.logspace(math.log10(4), math.log10(0.4), 8, dtype=F64)
    steps, step_size, n = 60, 0.04, 5_000
    grid, dx = line(20, 401)

    def law(scales):
        p = (-grid.square() / 32).exp()
        p = p / p.sum()
        for sigma in scales:
            a = step_size * sigma**2 / scales[-1] ** 2
            drift = grid + a / 2 * score_of(Mixture(sigma).log_prob, grid[:, None])[:, 0]
            kernel = (-(grid - drift[:, None]).square() / (2 * a)).exp()
            kernel = kernel / kernel.sum(1, keepdim=True)
            for _ in range(steps):
                p = p @ kernel
        return p

    def right(p):
        return float(p[grid > 0].sum() + p[grid == 0].sum() / 2)

    exact = law(sigmas)
    x = 4 * torch.randn(n, 1, dtype=F64, generator=rng(0))
    end = annealed_langevin(Mixture(), sigmas, x, steps, step_size, generator=rng(1))
    share = (end > 0).double().mean()
    ledger(
        "annealed Langevin dynamics: weight of the right mode",
        exact=right(exact),
        estimate=share,
        std_error=math.sqrt(right(exact) * (1 - right(exact)) / n),
    )
    mean = float(exact @ grid)
    sd = math.sqrt(float(exact @ (grid - mean).square()))
    ledger(
        "annealed Langevin dynamics: mean of the mixture",
        exact=mean,
        estimate=end.mean(),
        std_error=sd / math.sqrt(n),
    )
    smoothed = Mixture(float(sigmas[-1])).log_prob(grid[:, None]).exp() * dx
    assert abs(right(exact) - right(smoothed)) < 0.02  # its bias
    assert abs(right(law(sigmas[-1:])) - right(smoothed)) > 0.1  # only the smallest scale


# ---------------------------------------------------------------- models and input


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_all_follow_device_and_dtype_and_the_global_generator_is_left_alone(dtype, rng, device):
    v = torch.randn(6, 2, dtype=dtype, device=device, generator=rng(0, device))
    scales = torch.tensor([1.0, 0.5], device=device)
    before = torch.get_rng_state()
    with torch.device("meta"), torch.no_grad():
        model = StandardNormal()
        found = [
            denoising_score_matching(model, v, scales, generator=rng(1, device)),
            tweedie(model, v, scales[0]),
            annealed_langevin(model, scales, v, 2, 0.1, generator=rng(1, device)),
        ]
    for x, shape in zip(found, [(), (6, 2), (6, 2)], strict=True):
        assert x.shape == shape and x.dtype == dtype and x.device.type == device.type
    assert torch.equal(before, torch.get_rng_state())


def test_a_leading_dimension_gives_each_model_its_own_gradient(rng):
    class Slopes:
        def __init__(self, num_models):
            self.slope = torch.ones(num_models, 1, 1, dtype=F64, requires_grad=True)

        def score(self, x):
            return -self.slope * x

    v = torch.randn(2, 50, 3, dtype=F64, generator=rng(0))
    model = Slopes(2)
    denoising_score_matching(model, v, 0.5, generator=rng(1)).backward()
    noise = torch.randn(v.shape, dtype=F64, generator=rng(1))
    for i in range(2):
        alone = Slopes(1)
        _denoising_rows(alone, v[i : i + 1], 0.5, noise[i : i + 1]).mean().backward()
        torch.testing.assert_close(model.slope.grad[i], alone.slope.grad[0])


def test_bad_input_is_refused_with_a_sentence(rng):
    model, v = StandardNormal(), torch.ones(4, 2)
    scales = torch.tensor([1.0, 0.5])
    with pytest.raises(ValueError, match="v must be a matrix"):
        denoising_score_matching(model, v[0], scales)
    with pytest.raises(TypeError, match="must be floating"):
        denoising_score_matching(model, v.long(), scales)
    for bad, error, message in (
        (0.0, ValueError, "sigma must be a finite number above 0"),
        ("a", TypeError, "sigma must be a number"),
        (torch.tensor([1.0, -1.0]), ValueError, "sigma must be positive"),
        (torch.ones(2, 2), ValueError, r"vector of scales, got shape \(2, 2\)"),
    ):
        with pytest.raises(error, match=message):
            denoising_score_matching(model, v, bad)
    with pytest.raises(ValueError, match="sigma must be positive"):
        tweedie(model, v, torch.tensor(0.0))
    for integers in (v.long(), v.bool()):
        for sigma in (0.5, torch.tensor(0.5)):
            with pytest.raises(TypeError, match="x must be floating, got .*; convert it"):
                tweedie(model, integers, sigma)
        with pytest.raises(TypeError, match="x must be floating, got .*; convert it"):
            annealed_langevin(model, scales, integers, 1, 0.1)
    with pytest.raises(ValueError, match="sigmas must fall"):
        annealed_langevin(model, scales.flip(0), v, 1, 0.1)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        annealed_langevin(model, scales, v, 0, 0.1)
    with pytest.raises(ValueError, match="step_size must be"):
        annealed_langevin(model, scales, v, 1, -0.1)
    with pytest.raises(ValueError, match="last states has .* NaN or infinite"):
        annealed_langevin(model, scales, v, 400, 1e3, generator=rng(0))
    with pytest.raises(TypeError, match="generator must be"):
        denoising_score_matching(model, v, 1.0, generator=3)
