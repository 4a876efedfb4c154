"""Muon: an optimizer whose updates of filters are orthogonal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95
RMS = 0.2  # of an update, per learning rate: about that of Adam
LEAST_SIDE = 4  # smaller matrices have nothing to be orthogonal to


class Muon(torch.optim.AdamW):
    """Momentum whose singular values are all set to about 1, for filters; AdamW for all else.

    A gradient of a filter bank has a few large singular values, and Adam follows them; here the weak directions are
    learned as fast as the strong ones (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/). Updates are
    scaled to the size of Adam's (Liu et al. 2025, arXiv:2502.16982), so one learning rate and one weight decay serve
    both. Filters ``(out, in, ...)`` are matrices ``(out, in * ...)``, a grouped convolution's and
    the output layer's like any other; depth-wise ones, biases and norms are AdamW's.

    Parameters
    ----------
    params
        Parameters or groups of them.
    lr, weight_decay
        As AdamW's.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.95))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        filters = [(p, group) for group in self.param_groups for p in group["params"] if is_filter_bank(p)]
        gradients = [(p, p.grad, group) for p, group in filters if p.grad is not None]
        for parameter, gradient, group in gradients:
            self._update(parameter, gradient, group)
            parameter.grad = None  # AdamW passes it over
        super().step()
        for parameter, gradient, _ in gradients:
            parameter.grad = gradient
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
            state["step"] = torch.zeros(())  # AdamW asks all states that it loads for one
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(momentum, MOMENTUM)  # Nesterov's
        matrix = ahead.flatten(1)
        step = group["lr"] * RMS * math.sqrt(max(matrix.shape))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(orthogonalize(matrix).view(parameter.shape), alpha=step)


def is_filter_bank(weight: Tensor) -> bool:
    """Tell whether a weight is a matrix, or a filter bank that is no depth-wise one, with sides that are worth it."""
    return weight.ndim >= 2 and weight.shape[1] > 1 and min(weight.flatten(1).shape) >= LEAST_SIDE


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return about ``U Vᵀ`` of ``matrix = U S Vᵀ``: all singular values become 0.7 to 1.2, but for those near 0.

    The quintic Newton-Schulz iteration of Jordan et al. (2024), ``X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X``. All iterates
    are polynomials of ``X Xᵀ`` times ``X``, so only that polynomial is iterated, a square matrix of the shorter side:
    two products with the long matrix instead of ten, so that float32 costs less than bfloat16 would otherwise, also
    where there are no units for bfloat16.

    Parameters
    ----------
    matrix
        ``(m, n)``, float32.
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalize(matrix.mT).mT
    a, b, c = COEFFICIENTS
    x = matrix / matrix.norm().clamp_min(torch.finfo(matrix.dtype).tiny)
    gram = x @ x.mT
    product = identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(ITERATIONS):
        polynomial = torch.addmm(torch.add(a * identity, gram, alpha=b), gram, gram, alpha=c)
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    return product @ x
