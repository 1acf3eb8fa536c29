"""Sharpness-aware steps written out by hand, in plain torch: what the wrappers are compared with.

Nothing here uses the package, MMEngine's optimizer wrappers, ``torch._foreach_*`` or hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

LossFunction = Callable[[], Tensor]


def gradients_of(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The gradient of ``loss``, tensor by tensor."""
    return list(torch.autograd.grad(loss, parameters))


def sam_perturbation(gradients: list[Tensor], rho: float, eps: float = 1e-12) -> list[Tensor]:
    """SAM, eq. 2: e = rho * g / (||g|| + eps)."""
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    return [gradient * (rho / (norm + eps)) for gradient in gradients]


def asam_perturbation(
    weights: list[Tensor], gradients: list[Tensor], rho: float, eta: float = 0.01, eps: float = 1e-12
) -> list[Tensor]:
    """ASAM, eq. 9: e = rho * T^2 g / (||T g|| + eps), T = |w| + eta."""
    stretches = [weight.abs() + eta for weight in weights]
    stretched = [gradient * stretch for gradient, stretch in zip(gradients, stretches, strict=True)]
    norm = torch.stack([tensor.norm() for tensor in stretched]).norm()
    return [tensor * stretch * (rho / (norm + eps)) for tensor, stretch in zip(stretched, stretches, strict=True)]


def relative_perturbation(
    weights: list[Tensor], gradients: list[Tensor], rho: float, to: str, eps: float = 1e-12
) -> list[Tensor]:
    """rho as a share of the weights' norm: of ASAM with one T a tensor, of each tensor, or of all together."""
    sizes = [weight.norm() for weight in weights]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    if to == 'tensor':
        norm = torch.stack([size * gradient.norm() for size, gradient in zip(sizes, gradients, strict=True)]).norm()
        factors = [rho * size**2 / (norm + eps) for size in sizes]
    elif to == 'layer':
        factors = [rho * size / (gradient.norm() + eps) for size, gradient in zip(sizes, gradients, strict=True)]
    else:
        factors = [rho * torch.stack(sizes).norm() / (norm + eps)] * len(sizes)
    return [gradient * factor for gradient, factor in zip(gradients, factors, strict=True)]


def perturbation_of(
    weights: list[Tensor], gradients: list[Tensor], rho: float, adaptive: bool | str = False
) -> list[Tensor]:
    """SAM's, or what ``adaptive`` says."""
    if isinstance(adaptive, str):
        return relative_perturbation(weights, gradients, rho, adaptive)
    return asam_perturbation(weights, gradients, rho) if adaptive else sam_perturbation(gradients, rho)


def sam_step(
    model: nn.Module,
    optimizer: Optimizer,
    loss_function: LossFunction,
    rho: float,
    adaptive: bool | str = False,
    factor: float = 1.0,
) -> list[Tensor]:
    """One whole SAM step, in any of its scales: both passes and the optimizer's step.

    Args:
        model: Its buffers end as the first pass left them.
        optimizer: The base optimizer over all parameters of ``model``.
        loss_function: The batch loss at the current weights.
        rho: Radius.
        adaptive: The wrapper's argument.
        factor: On the final gradient.

    Returns:
        The final gradients.
    """
    final = sam_gradients(model, loss_function, rho, adaptive)
    for parameter, gradient in zip(model.parameters(), final, strict=True):
        parameter.grad = gradient * factor if factor != 1.0 else gradient
    optimizer.step()
    optimizer.zero_grad()
    return final


def sam_training(
    model: nn.Module,
    optimizer: Optimizer,
    loss_function: Callable[[Any], Tensor],
    steps: list[list[Any]],
    adaptive: bool | str = False,
    part: str = '',
    clip: Callable[[list[nn.Parameter]], Any] | None = None,
) -> list[float]:
    """SAM (ASAM) steps on several micro-batches each, whose final gradients are averaged.

    Args:
        model: Without buffers.
        optimizer: The base optimizer over all its parameters.
        loss_function: The loss of a micro-batch at the current weights.
        steps: The micro-batches of every step.
        adaptive: The wrapper's argument: True is ASAM, at radius 0.5; all others are at 0.05.
        part: Beginning of the names of what is perturbed.
        clip: What is done to the parameters' gradients before the optimizer steps.

    Returns:
        The norm of each climb's gradient (ASAM: of T g).
    """
    parameters, norms = list(model.parameters()), []
    chosen = [parameter for name, parameter in model.named_parameters() if name.startswith(part)]
    for batches in steps:
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for batch in batches:
            gradients = gradients_of(loss_function(batch), chosen)
            weights = [parameter.detach().clone() for parameter in parameters]
            ours = [parameter.detach() for parameter in chosen]
            moves = perturbation_of(ours, gradients, 0.5 if adaptive is True else 0.05, adaptive)
            stretch = {True: lambda w: w.abs() + 0.01, 'tensor': torch.norm}.get(adaptive, lambda w: 1.0)
            stretched = [g * stretch(w) for g, w in zip(gradients, ours, strict=True)]
            norms.append(torch.stack([tensor.norm() for tensor in stretched]).norm().item())
            with torch.no_grad():
                for parameter, move in zip(chosen, moves, strict=True):
                    parameter.add_(move)
            final = gradients_of(loss_function(batch), parameters)
            total = [sum_ + gradient / len(batches) for sum_, gradient in zip(total, final, strict=True)]
            with torch.no_grad():
                for parameter, weight in zip(parameters, weights, strict=True):
                    parameter.copy_(weight)
        for parameter, gradient in zip(parameters, total, strict=True):
            parameter.grad = gradient
        if clip is not None:
            clip(parameters)
        optimizer.step()
    return norms


def sam_gradients(
    model: nn.Module, loss_function: LossFunction, rho: float, adaptive: bool | str = False
) -> list[Tensor]:
    """The gradient at the perturbed weights; weights and buffers end as after the first pass."""
    parameters = list(model.parameters())
    gradients = gradients_of(loss_function(), parameters)
    weights = [parameter.detach().clone() for parameter in parameters]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    perturbation = perturbation_of(weights, gradients, rho, adaptive)
    with torch.no_grad():
        for parameter, step in zip(parameters, perturbation, strict=True):
            parameter.add_(step)
    final = gradients_of(loss_function(), parameters)
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return final
