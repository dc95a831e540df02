"""Small machines whose expected gradients are sums over all states: the objectives' oracle."""

import math

import torch

from companion.models.rbm import RBM
from companion.testing import binary_states

F64 = torch.float64
DATA = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 1], [1, 1, 0]])


def machine(rng, seed=0, dtype=F64, device="cpu"):
    g = rng(seed)
    rbm = RBM(3, 2, generator=g, dtype=F64)
    with torch.no_grad():
        for parameter in rbm.parameters():
            parameter.copy_(2 * torch.randn(parameter.shape, generator=g, dtype=F64) + 0.3)
    return rbm.to(dtype=dtype, device=device)


def flat_grad(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def state_grads(model):
    """d log p~(v) / d theta for each of the 2^D states, (2^D, parameters)."""
    states = binary_states(3, dtype=model.W.dtype, device=model.W.device)
    return torch.stack([flat_grad(model.log_prob(v), model) for v in states])


def index(v):
    return (v.double() @ v.new_tensor([4, 2, 1]).double()).long()


def exact_gradient(model, data):
    """The gradient of the mean negative log-likelihood, all states summed out."""
    grads = state_grads(model)
    states = binary_states(3, dtype=model.W.dtype, device=model.W.device)
    pi = model.log_prob(states).detach().softmax(0)
    return pi @ grads - grads[index(data)].mean(0)


def largest_z(samples, exact):
    """The largest deviation of the mean of `samples` (n, components), in standard errors."""
    error = samples.std(0) / math.sqrt(len(samples))
    return ((samples.mean(0) - exact) / error).abs().max()
