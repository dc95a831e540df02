"""Mass matrices: the momentum's covariance is M, and every product is that of M."""

import pytest
import torch
from torch import Tensor

from companion.mcmc.base import GradientState
from companion.mcmc.mass import dot, kinetic_energy, make_mass, mass_for, momentum, velocity, whiten

F64 = {"dtype": torch.float64}
DENSE = torch.tensor([[2.0, 0.9, 0.1], [0.9, 0.7, 0.2], [0.1, 0.2, 5.0]], **F64)
MASSES = {"identity": None, "diagonal": torch.tensor([3.0, 0.4, 9.0], **F64), "dense": DENSE}


def matrix(mass: Tensor | None) -> Tensor:
    return torch.eye(3, **F64) if mass is None else mass if mass.ndim == 2 else mass.diag()


def made(mass: Tensor | None, dtype=torch.float64, device="cpu"):
    mass = None if mass is None else mass.to(device, dtype)
    points = torch.empty(0, dtype=dtype, device=device)  # its device has an index
    return make_mass(mass, torch.Size([3]), dtype, points.device)


@pytest.mark.parametrize("mass", MASSES.values(), ids=MASSES.keys())
def test_momentum_has_covariance_mass_not_standard_deviation_mass(mass):
    # The momentum is linear in the normal noise z: its covariance is B^T B if row i of B is that of
    # the unit vector i.
    rows = momentum(made(mass), torch.eye(3, **F64))
    torch.testing.assert_close(rows.T @ rows, matrix(mass))
    if mass is not None:
        assert not torch.allclose(rows, matrix(mass))


@pytest.mark.parametrize("mass", MASSES.values(), ids=MASSES.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_velocity_kinetic_energy_and_whitening_agree_with_the_matrix(rng, device, dtype, mass):
    m, inverse = made(mass, dtype, device), torch.linalg.inv(matrix(mass)).to(device, dtype)
    p, q = torch.randn(2, 5, 3, dtype=dtype, device=device, generator=rng(0, device))
    like = p[:, 0]
    torch.testing.assert_close(velocity(m, p), p @ inverse)
    torch.testing.assert_close(kinetic_energy(m, p, like), 0.5 * (p @ inverse * p).sum(-1))
    torch.testing.assert_close(dot(whiten(m, p), whiten(m, q), like), (p @ inverse * q).sum(-1))
    torch.testing.assert_close(whiten(m, momentum(m, p)), p)


def test_square_matrix_is_a_diagonal_for_points_that_are_matrices():
    mass = torch.tensor([[2.0, 1.0], [1.0, 2.0]], **F64)
    diagonal = make_mass(mass, torch.Size([2, 2]), torch.float64, torch.device("cpu"))
    assert not diagonal.is_dense
    torch.testing.assert_close(velocity(diagonal, mass), torch.ones(2, 2, **F64))
    assert make_mass(mass, torch.Size([2]), torch.float64, torch.device("cpu")).is_dense


def test_mass_is_factorised_once_for_each_kind_of_points():
    of = mass_for(DENSE)
    state = GradientState(torch.zeros(4, 3, **F64), torch.zeros(4, **F64), torch.zeros(4, 3, **F64))
    assert of(state) is of(GradientState(state.x + 1, state.log_prob, state.grad))


@pytest.mark.parametrize(
    ("mass", "message"),
    [
        (torch.ones(2, **F64), r"shape of a point, \(3,\), or \(3, 3\), got \(2,\)"),
        (torch.ones(3), "float64 on cpu as the points are, got torch.float32"),
        (torch.tensor([1.0, 0.0, 1.0], **F64), "positive, its smallest entry is 0.0"),
        (torch.tensor([1.0, torch.nan, 1.0], **F64), "NaN or infinite"),
        (-DENSE, "positive definite"),
        (DENSE + torch.ones(3, 3, **F64).triu(1), "symmetric"),
    ],
)
def test_a_mass_that_is_none_is_refused(mass, message):
    zeros = torch.zeros(3, **F64)
    with pytest.raises(ValueError, match=message):
        mass_for(mass)(GradientState(zeros, zeros[0], zeros))


def test_a_mass_that_is_no_tensor_is_refused_at_once():
    with pytest.raises(TypeError, match="must be a torch.Tensor or None, got float"):
        mass_for(2.0)


def test_mass_follows_the_points_device():
    torch.set_default_device("meta")
    try:
        m = made(DENSE)
    finally:
        torch.set_default_device(None)
    assert m.factor.device.type == m.inverse.device.type == "cpu"
