"""The contracts: densities with gradients, and annealing paths."""

import pytest
import torch
from torch import Tensor

from companion.core import AnnealingPath, gradient, value_and_grad, with_gradients

# ---------------------------------------------------------------- value_and_grad


def quartic(x: Tensor) -> Tensor:
    """Not symmetric, not separable: `(..., 2) -> (...)`."""
    return -((x[..., 0] - 1) ** 4) - (x[..., 0] * x[..., 1]) ** 2 + x[..., 1]


def quartic_grad(x: Tensor) -> Tensor:
    first, second = x.unbind(-1)
    return torch.stack(
        [-4 * (first - 1) ** 3 - 2 * first * second**2, 1 - 2 * first**2 * second], -1
    )


@pytest.mark.parametrize("shape", [(2,), (5, 2), (3, 5, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autograd_supplies_the_gradient_of_each_chain(rng, device, shape, dtype):
    x = torch.randn(shape, dtype=dtype, device=device, generator=rng(0, device))
    value, grad = value_and_grad(quartic, x)
    torch.testing.assert_close(value, quartic(x))
    torch.testing.assert_close(grad, quartic_grad(x))
    assert not value.requires_grad
    assert not grad.requires_grad
    assert not x.requires_grad  # the caller's tensor is left alone


def test_a_nan_in_one_chain_leaves_the_gradients_of_the_others_alone():
    x = torch.tensor([[1.0], [-1.0], [4.0]])
    value, grad = value_and_grad(lambda y: y[:, 0].sqrt(), x)
    assert value.isnan().tolist() == [False, True, False]
    assert grad[0, 0] == 0.5
    assert grad[2, 0] == 0.25


def test_gradients_are_found_inside_no_grad_and_leave_parameters_alone():
    layer = torch.nn.Linear(2, 1)
    with torch.no_grad():
        _, grad = value_and_grad(lambda x: layer(x)[..., 0], torch.zeros(4, 2))
    torch.testing.assert_close(grad, layer.weight.detach().expand(4, 2))
    assert layer.weight.grad is None


def test_a_density_with_its_own_gradient_is_used_as_it_is():
    class Own:
        weight = torch.tensor(3.0, requires_grad=True)

        def __call__(self, x: Tensor) -> Tensor:
            raise AssertionError("its own method should have been called")

        def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.weight * x.sum(-1), self.weight.expand(x.shape)

    value, grad = value_and_grad(Own(), torch.ones(5, 2))
    assert value.tolist() == [6.0] * 5
    assert grad.tolist() == [[3.0, 3.0]] * 5
    assert not value.requires_grad
    assert not grad.requires_grad
    alone = gradient(Own(), torch.ones(5, 2))  # it has no shorter way
    assert alone.tolist() == grad.tolist() and not alone.requires_grad


def test_a_gradient_alone_is_the_density_s_own_where_it_has_one(rng):
    class Own:
        weight = torch.tensor(3.0, requires_grad=True)

        def gradient(self, x: Tensor) -> Tensor:
            return self.weight.expand(x.shape)

        def value_and_grad(self, x: Tensor) -> tuple[Tensor, Tensor]:
            raise AssertionError("nobody asked for the value")

    grad = gradient(Own(), torch.ones(5, 2))
    assert grad.tolist() == [[3.0, 3.0]] * 5 and not grad.requires_grad
    x = torch.randn(5, 2, generator=rng(0))
    torch.testing.assert_close(gradient(quartic, x), quartic_grad(x))


# ---------------------------------------------------------------- known gradients


def outer(scale, x, y):
    return [torch.outer(scale * x, y)]


@pytest.mark.parametrize("known", ["tensors", "a function"])
def test_known_gradients_scale_and_add_up(device, known):
    w = torch.zeros(2, 3, dtype=torch.float64, device=device, requires_grad=True)
    x, y = torch.arange(2.0).to(w) + 1, torch.arange(3.0).to(w) - 1
    one = w.new_tensor(5.0)
    if known == "tensors":
        loss = with_gradients(one, [w], [torch.outer(x, y)])
    else:
        loss = with_gradients(one, [w], outer, saved=(x, y))
    assert loss.item() == 5.0
    (3.0 * loss + w.sum()).backward(retain_graph=True)
    torch.testing.assert_close(w.grad, 3.0 * torch.outer(x, y) + 1.0)
    loss.backward()
    torch.testing.assert_close(w.grad, 4.0 * torch.outer(x, y) + 1.0)


@pytest.mark.parametrize("known", ["tensors", "a function"])
def test_known_gradients_notice_what_was_changed_in_place(known):
    w, x = torch.zeros(2, 2, requires_grad=True), torch.ones(2)
    given = torch.outer(x, x)
    loss = (
        with_gradients(torch.ones(()), [w], [given])
        if known == "tensors"
        else with_gradients(torch.ones(()), [w], outer, saved=(x, x))
    )
    given.mul_(2.0), x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_known_gradients_of_another_shape_or_number_are_refused():
    w = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"shape \(3,\) was given for a parameter of shape \(2,\)"):
        with_gradients(torch.ones(()), [w], [torch.ones(3)])
    with pytest.raises(ValueError, match="shorter"):
        with_gradients(torch.ones(()), [w], [])
    with pytest.raises(RuntimeError, match="number of gradients"):
        with_gradients(torch.ones(()), [w], lambda scale: []).backward()


# ---------------------------------------------------------------- AnnealingPath


def test_annealing_paths_are_known_by_their_methods():
    class Path:
        base_log_z = 0.0

        def sample_base(self, n, *, generator=None): ...

        def log_prob(self, x, beta): ...

        def step(self, x, beta, *, generator=None): ...

    assert isinstance(Path(), AnnealingPath)
    assert not isinstance(object(), AnnealingPath)
