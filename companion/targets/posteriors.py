"""Two posteriors from real modelling, with exact answers by quadrature.

Both hold every constant of the prior and of the likelihood, so `log_z` is the logarithm of the
marginal likelihood of the data, the *evidence*.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

from companion.inputs import check_real
from companion.targets.base import HALF_LOG_2PI, Target, check_parameters

__all__ = ["EightSchools", "LogisticRegression"]


# ---------------------------------------------------------------- logistic regression

_MAX_POINTS = 2**23  # of the grid: half a minute for a hundred rows


class LogisticRegression(Target):
    """The posterior of a logistic regression's coefficients, with independent normal priors.

        log p~(x) = sum_i log sigmoid((2 y_i - 1) z_i^T x) + sum_j log N(x_j; 0, s^2)

    for rows z_i with labels y_i. It is log-concave, so it has one mode. With at most three
    coefficients `mean`, `covariance` and `log_z` are known by quadrature, which is done when they
    are first asked for; with more, asking raises. It has no `sample`.

    Args:
        features: the rows z_i, `(n, d)`; for an intercept add a column of ones.
        labels: y_i, `(n,)`, zeros and ones of any dtype.
        prior_scale: s, the standard deviation of each coefficient's prior.

    Raises:
        ValueError: shapes that do not fit, labels other than 0 and 1, a scale that is not positive;
            from `mean`, `covariance` and `log_z`: more than three coefficients.

    >>> features = torch.tensor([[1.0, -1.0], [1.0, 0.5], [1.0, 2.0]])
    >>> target = LogisticRegression(features, torch.tensor([0, 1, 1]), prior_scale=2.0)
    >>> target.value_and_grad(torch.zeros(2))      # 3 log(1/2) - 2 log(2 sqrt(2 pi)); (1, 3.5) / 2
    (tensor(-5.3036), tensor([0.5000, 1.7500]))
    >>> target.mean, round(target.log_z, 4)
    (tensor([0.3750, 2.1619]), -1.7244)
    """

    def __init__(self, features: Tensor, labels: Tensor, prior_scale: float) -> None:
        check_parameters(features=(features, 2))
        self.prior_scale = check_real("prior_scale", prior_scale, minimum=0.0)
        if labels.shape != features.shape[:1]:
            raise ValueError(
                f"labels must have one entry a row, ({len(features)},), got {tuple(labels.shape)}"
            )
        self.features, self.labels = features, labels.to(features)
        if not (self.labels * (1.0 - self.labels) == 0).all():
            raise ValueError("labels must be zeros and ones")
        self._signed = (2.0 * self.labels - 1.0)[:, None] * features
        self._constant = -features.shape[1] * (HALF_LOG_2PI + math.log(self.prior_scale))

    @property
    def _like(self) -> Tensor:
        return self.features[0]

    def log_prob(self, x: Tensor) -> Tensor:
        """`log p~(x)`, `(..., d) -> (...)`."""
        margin = linear(self._check(x), self._signed)  # negative where the label is missed
        prior = self._constant - 0.5 * (x / self.prior_scale).square().sum(-1)
        return prior + logsigmoid(margin).sum(-1)

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`log p~(x)`, `(...)`, and its gradient, `(..., d)`: one matrix product each way."""
        margin = linear(self._check(x), self._signed)
        pull = -x / self.prior_scale**2
        value = self._constant + 0.5 * (pull * x).sum(-1) + logsigmoid(margin).sum(-1)
        miss = margin.neg_().sigmoid_()  # in place: fresh memory costs more than the arithmetic
        return value, pull + miss @ self._signed

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient alone, `(..., d)`: the value's logarithms are more than half of the work."""
        miss = linear(self._check(x), -self._signed).sigmoid_()
        return miss @ self._signed - x / self.prior_scale**2

    def laplace(self) -> tuple[Tensor, Tensor]:
        """The mode, `(d,)`, by Newton's method, and the inverse of minus the Hessian there.

        They are the mean and the covariance, `(d, d)`, of the Laplace approximation.
        """
        signed, precision = self._signed.double(), 1.0 / self.prior_scale**2
        x = signed.new_zeros(signed.shape[1])

        def log_prob(x: Tensor) -> float:
            return float(logsigmoid(signed @ x).sum() - 0.5 * precision * x.square().sum())

        for _ in range(200):
            miss = torch.sigmoid(-signed @ x)
            grad = miss @ signed - precision * x
            curvature = (miss * (1.0 - miss) * signed.T) @ signed
            curvature.diagonal().add_(precision)
            step = torch.linalg.solve(curvature, grad)
            gain, size = float(grad @ step), 1.0  # the step's squared length in standard deviations
            if gain < 1e-20:
                break
            while gain > 1e-8 and log_prob(x + size * step) < log_prob(x) + 0.1 * size * gain:
                size /= 2.0
            x = x + size * step
        return x.to(self.features), torch.linalg.inv(curvature).to(self.features)

    @cached_property
    def _moments(self) -> tuple[float, Tensor, Tensor]:
        """`log_z`, mean and covariance, by the trapezoidal rule on a grid around the mode.

        For smooth densities that fall off on all sides this rule is as good as Gauss's: its error
        falls exponentially with the number of points. Half of the points give the error's size.
        """
        dim = self.features.shape[1]
        if dim > 3:
            raise ValueError(
                f"mean, covariance and log_z are computed on a grid, for at most three "
                f"coefficients; this regression has {dim}"
            )
        target = LogisticRegression(self.features.double(), self.labels, self.prior_scale)
        mode, covariance = target.laplace()
        factor = torch.linalg.cholesky(covariance)
        # Points are mode + factor u. The grid is refined by halves until nothing changes, and only
        # where the density is not negligible: exp(-45) = 3e-20.
        spacing, previous = 1.0, math.nan
        axis = torch.arange(-24.0, 25.0, dtype=mode.dtype, device=mode.device)
        u = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
        shifts = torch.cartesian_prod(*[axis[24:26] / 2.0] * dim).reshape(-1, dim)
        while len(u) <= _MAX_POINTS:
            blocks = (u[i : i + 2**16] for i in range(0, len(u), 2**16))
            log_probs = torch.cat([target(mode + block @ factor.T) for block in blocks])
            log_z = float(log_probs.logsumexp(0)) + dim * math.log(spacing)
            if abs(log_z - previous) < 1e-7:  # twice the points, the square of the error
                break
            u = u[log_probs > log_probs.max() - 45.0]
            u = (u[:, None] + spacing * shifts).reshape(-1, dim)
            previous, spacing = log_z, spacing / 2.0
        else:
            raise RuntimeError(
                "the grid does not resolve this posterior: the prior is too wide for what the rows "
                "say. Use a narrower prior"
            )
        weights = log_probs.softmax(0)
        centre = weights @ u
        spread = factor @ ((weights * (u - centre).T) @ (u - centre)) @ factor.T
        log_z += float(factor.diagonal().log().sum())
        return log_z, (mode + factor @ centre).to(self.features), spread.to(self.features)

    @cached_property
    def log_z(self) -> float:  # type: ignore[override]
        """Log of the marginal likelihood."""
        return self._moments[0]

    @cached_property
    def mean(self) -> Tensor:  # type: ignore[override]
        """The posterior mean, `(d,)`."""
        return self._moments[1]

    @cached_property
    def covariance(self) -> Tensor:  # type: ignore[override]
        """The posterior covariance, `(d, d)`."""
        return self._moments[2]


# ---------------------------------------------------------------- eight schools

_EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
_ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
_SCALE = 5.0  # of both priors
_SPACING = 1.0 / 128.0  # of the grid of log tau


class EightSchools(Target):
    """A hierarchical model of eight experiments: coaching for a test, in eight schools.

        y_i ~ N(theta_i, sigma_i^2),   theta_i ~ N(mu, tau^2),   mu ~ N(0, 5^2),   tau ~ C+(0, 5)

    with the estimated effects y_i and their standard errors sigma_i of Rubin, in points of the
    test, and a half-Cauchy prior for tau (these are the priors of posteriordb). A point is
    `x = (mu, log tau, eta_1, ..., eta_8)`; the density holds the Jacobian tau of `log tau`. In the
    *centered* parameterisation eta_i = theta_i: a funnel, whose neck at small tau most samplers
    miss. In the *noncentered* one `theta_i = mu + tau eta_i`, and the funnel is gone. Both have the
    same `log_z`.

    Given tau all else is normal, so that one sum over a grid of log tau gives `mean`, `covariance`,
    `log_z` and the moments of (mu, tau, theta), `parameter_mean` and `parameter_std`, to round-off;
    `sample` inverts the distribution function of tau, tabulated to about 1e-6.

    Args:
        parameterization: "centered" or "noncentered".
        device: where the target is, by default PyTorch's default device.
        dtype: its dtype, by default PyTorch's default.

    Raises:
        ValueError: another parameterisation.

    Reference: Rubin (1981), *Estimation in parallel randomized experiments*; Betancourt and
    Girolami (2015), *Hamiltonian Monte Carlo for hierarchical models*; Magnusson et al. (2025),
    *posteriordb: Testing, benchmarking and developing Bayesian inference algorithms*.

    >>> target = EightSchools("noncentered", dtype=torch.float64)
    >>> mu, tau = target.parameter_mean[:2]
    >>> f"{mu:.4f} {tau:.4f} {target.log_z:.4f}"
    '4.3968 3.5977 -31.3113'
    >>> target.transform(torch.zeros(10, dtype=torch.float64))            # tau = 1
    tensor([0., 1., 0., 0., 0., 0., 0., 0., 0., 0.], dtype=torch.float64)
    """

    def __init__(
        self,
        parameterization: Literal["centered", "noncentered"] = "centered",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if parameterization not in ("centered", "noncentered"):
            raise ValueError(
                f"parameterization must be 'centered' or 'noncentered', got {parameterization!r}"
            )
        self.parameterization = parameterization
        self.effects = torch.tensor(_EFFECTS, device=device, dtype=dtype)
        self.errors = torch.tensor(_ERRORS, device=device, dtype=dtype)
        log_errors = sum(map(math.log, _ERRORS))
        self._constant = -17.0 * HALF_LOG_2PI - math.log(_SCALE**2 * math.pi / 2.0) - log_errors
        # p(log tau | y) falls as tau on the left and as tau^-9 on the right, and is analytic: the
        # trapezoidal rule is exact to round-off.
        u = torch.arange(-40.0, 12.0, _SPACING, dtype=torch.float64, device=self.effects.device)
        log_marginal = self._given_tau(u)[0]
        self._u, self._weights = u, log_marginal.softmax(0)
        self._cumulative = self._weights.cumsum(0)
        self.log_z = float(log_marginal.logsumexp(0)) + math.log(_SPACING)
        moments = self._moments(parameterization == "centered")
        self.mean, self.covariance = (x.to(self.effects) for x in moments)
        mean, covariance = self._moments(True, of_tau=True)
        self.parameter_mean = mean.to(self.effects)
        self.parameter_std = covariance.diagonal().sqrt().to(self.effects)

    def log_prob(self, x: Tensor) -> Tensor:
        """`log p~(x)`, `(..., 10) -> (...)`."""
        return self._evaluate(x)[0]

    def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`log p~(x)`, `(...)`, and its gradient, `(..., 10)`."""
        value, mu, u, tau, eta, residual = self._evaluate(x)
        # Of the likelihood by theta, and of the priors of mu and log tau.
        pull = -residual / self.errors
        grad_mu = -mu / _SCALE**2
        grad_u = 1.0 - 2.0 * torch.sigmoid(2.0 * (u - math.log(_SCALE)))
        if self.parameterization == "centered":
            back = (eta - mu) / tau
            grad_mu = grad_mu + (back / tau).sum(-1, keepdim=True)
            grad_u = grad_u + (back.square() - 1.0).sum(-1, keepdim=True)
            grad_eta = pull - back / tau
        else:
            grad_mu = grad_mu + pull.sum(-1, keepdim=True)
            grad_u = grad_u + tau * (pull * eta).sum(-1, keepdim=True)
            grad_eta = tau * pull - eta
        return value, torch.cat([grad_mu, grad_u, grad_eta], -1)

    def _evaluate(self, x: Tensor) -> tuple[Tensor, ...]:
        """The log-density and what it is made of: mu, log tau, tau, eta, (theta - y) / sigma."""
        mu, u, eta = self._check(x).split_with_sizes([1, 1, 8], -1)
        tau = u.exp()
        centered = self.parameterization == "centered"
        theta = eta if centered else mu + tau * eta
        residual = (theta - self.effects) / self.errors
        spread = (eta - mu) / tau if centered else eta
        squares = (residual.square() + spread.square()).sum(-1, keepdim=True)
        # logsigmoid(-2 log(tau / 5)) = -log(1 + tau^2 / 25), of the half-Cauchy prior.
        value = self._constant + u + logsigmoid(2.0 * (math.log(_SCALE) - u))
        value = value - 0.5 * (squares + (mu / _SCALE).square()) - (8.0 * u if centered else 0.0)
        return value[..., 0], mu, u, tau, eta, residual

    def transform(self, x: Tensor) -> Tensor:
        """The parameters (mu, tau, theta_1, ..., theta_8) at `x`, `(..., 10) -> (..., 10)`."""
        mu, u, eta = self._check(x).split_with_sizes([1, 1, 8], -1)
        theta = eta if self.parameterization == "centered" else mu + u.exp() * eta
        return torch.cat([mu, u.exp(), theta], -1)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """`n` exact draws, `(n, 10)`: tau by inversion, then mu given tau, then eta given both."""
        noise = self._noise(n, generator).double()
        uniform = torch.rand(n, generator=generator, dtype=noise.dtype, device=noise.device)
        cell = torch.searchsorted(self._cumulative, uniform).clamp(max=len(self._u) - 1)
        above = (self._cumulative[cell] - uniform) / self._weights[cell]  # the part of the cell
        u = self._u[cell] + _SPACING * (0.5 - above.clamp(0.0, 1.0))
        _, mean, variance = self._given_tau(u)
        mu = (mean + variance.sqrt() * noise[:, 0])[:, None]
        shift, slope, scale = self._eta(u, self.parameterization == "centered")
        eta = shift + slope * mu + scale * noise[:, 2:]
        return torch.cat([mu, u[:, None], eta], 1).to(self.effects)

    # ------------------------------------------------------------ given tau all is normal

    def _given_tau(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of log tau, `(m,)`: its unnormalised log-posterior, and mean and variance of mu given it.

        Without theta, `y_i ~ N(mu, sigma_i^2 + tau^2)`.
        """
        effects, variances = self.effects.double(), self._variances(u)
        precision = 1.0 / _SCALE**2 + (1.0 / variances).sum(1)
        mean = (effects / variances).sum(1) / precision
        log_prior = u + logsigmoid(2.0 * (math.log(_SCALE) - u))
        log_likelihood = -0.5 * (
            variances.log().sum(1)
            + (effects**2 / variances).sum(1)
            + precision.log()
            - precision * mean.square()
        )
        constant = -8.0 * HALF_LOG_2PI - math.log(_SCALE**2 * math.pi / 2.0)
        return constant + log_prior + log_likelihood, mean, 1.0 / precision

    def _variances(self, u: Tensor) -> Tensor:
        return self.errors.double().square() + (2.0 * u).exp()[:, None]

    def _eta(self, u: Tensor, centered: bool) -> tuple[Tensor, Tensor, Tensor]:
        """`eta_i = shift_i + slope_i mu + scale_i noise` given mu and log tau, each `(m, 8)`."""
        tau, variances = u.exp()[:, None], self._variances(u)
        shift, scale = tau * self.effects / variances, self.errors / variances.sqrt()
        if centered:
            return tau * shift, self.errors.double().square() / variances, tau * scale
        return shift, -tau / variances, scale

    def _moments(self, centered: bool, of_tau: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and covariance of (mu, log tau or tau, eta), from those given tau."""
        u, weights = self._u, self._weights
        _, mean, variance = self._given_tau(u)
        shift, slope, scale = self._eta(u, centered)
        column = u.exp() if of_tau else u
        given = torch.cat([mean[:, None], column[:, None], shift + slope * mean[:, None]], 1)
        loading = torch.cat(
            [torch.ones_like(given[:, :1]), torch.zeros_like(given[:, :1]), slope], 1
        )
        noise = torch.cat([torch.zeros_like(given[:, :2]), scale], 1)
        overall = weights @ given
        spread = given - overall
        covariance = (weights * spread.T) @ spread + (weights * variance * loading.T) @ loading
        return overall, covariance + torch.diag(weights @ noise.square())
