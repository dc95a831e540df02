"""The minimum of a smooth loss, to the last digits."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def minimise(loss: Callable[[], Tensor], parameters: Iterable[Tensor]) -> None:
    """Move the parameters to a minimum of `loss()`.

    Near it the loss changes by less than its rounding error, so a search that compares losses ends
    somewhere within the root of that error, and where depends on the machine. Newton's method asks
    the gradient alone. Directions that the loss does not depend on are left as they are.
    """
    parameters = list(parameters)
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=400,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    for _ in range(2):
        gradient = _flat(torch.autograd.grad(loss(), parameters, create_graph=True))
        rows = [_flat(torch.autograd.grad(g, parameters, retain_graph=True)) for g in gradient]
        step = torch.linalg.pinv(torch.stack(rows), rtol=1e-9, hermitian=True) @ gradient.detach()
        with torch.no_grad():
            for p, change in zip(
                parameters, step.split([p.numel() for p in parameters]), strict=True
            ):
                p -= change.view_as(p)


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])
