"""The methods of the family written out by hand, on flat vectors: what their wrappers are compared with.

Micro-batches are averaged before anything else is done with their gradients; each is perturbed by its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from tests.references import gradients_of
from tests.toys import Batch, ToyNet


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


class FlatReference:
    """SAM, and what the others need; ``clip`` acts on what the base optimizer gets."""

    rho: ClassVar[float] = 0.05

    def __init__(
        self, model: ToyNet, optimizer: Optimizer, clip: Callable[[Any], Any] = lambda parameters: None
    ) -> None:
        self.model, self.optimizer, self.clip, self.steps = model, optimizer, clip, 0
        self.parameters = list(model.parameters())

    def loss(self, batch: Batch) -> Tensor:
        total: Tensor = self.model.parse_losses(self.model(**batch))[0]
        return total

    def gradient(self, batch: Batch, move: Tensor | None = None) -> Tensor:
        """Of one micro-batch, at the weights or at the weights moved by ``move``."""
        weights = flat(self.parameters)
        if move is not None:
            self.write(weights + move)
        gradient = flat(gradients_of(self.loss(batch), self.parameters))
        self.write(weights)
        return gradient

    def write(self, values: Tensor) -> None:
        start = 0
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.copy_(values[start : start + parameter.numel()].view_as(parameter))
                start += parameter.numel()

    def perturbation(self, gradient: Tensor) -> Tensor:
        return self.rho * gradient / gradient.norm()

    def both(self, micro_batches: list[Batch]) -> tuple[Tensor, Tensor]:
        """g and g', averaged over the micro-batches."""
        plain = [self.gradient(batch) for batch in micro_batches]
        perturbed = [self.gradient(batch, self.perturbation(g)) for batch, g in zip(micro_batches, plain, strict=True)]
        return torch.stack(plain).mean(0), torch.stack(perturbed).mean(0)

    def final(self, plain: Tensor, perturbed: Tensor) -> Tensor:
        return perturbed

    def step(self, micro_batches: list[Batch]) -> None:
        self.finish(self.final(*self.both(micro_batches)))

    def finish(self, final: Tensor) -> None:
        start = 0
        for parameter in self.parameters:
            parameter.grad = final[start : start + parameter.numel()].view_as(parameter).clone()
            start += parameter.numel()
        self.clip(self.parameters)
        self.optimizer.step()
        self.steps += 1


class IntervalSAM(FlatReference):
    """SAM in one step of n."""

    def __init__(self, *args: Any, interval: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.interval = interval

    def final(self, plain: Tensor, perturbed: Tensor) -> Tensor:
        return plain if self.steps % self.interval else perturbed


class LookSAM(FlatReference):
    """Algorithm 1."""

    def __init__(self, *args: Any, k: int, alpha: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.k, self.alpha, self.kept = k, alpha, torch.zeros(())

    def final(self, plain: Tensor, perturbed: Tensor) -> Tensor:
        if self.steps % self.k == 0:
            self.kept = perturbed - (perturbed @ plain) / (plain @ plain) * plain
            return perturbed
        return plain + self.alpha * plain.norm() / self.kept.norm() * self.kept


class FriendlySAM(FlatReference):
    """The average takes up the whole step's gradient, each micro-batch's direction its own."""

    def __init__(self, *args: Any, sigma: float, lmbda: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sigma, self.lmbda, self.average = sigma, lmbda, torch.zeros_like(flat(self.parameters))

    def update(self, gradient: Tensor) -> Tensor:
        return self.lmbda * self.average + (1 - self.lmbda) * gradient

    def perturbation(self, gradient: Tensor) -> Tensor:
        return super().perturbation(gradient - self.sigma * self.update(gradient))

    def final(self, plain: Tensor, perturbed: Tensor) -> Tensor:
        self.average = self.update(plain)
        return perturbed


class GSAM(FlatReference):
    """Algorithm 1; the learning rate is the first group's, and was ``lr_max`` at the start."""

    def __init__(self, *args: Any, alpha: float, rho_min: float, lr_min: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alpha, self.rho_min, self.lr_min = alpha, rho_min, lr_min
        self.lr_max = self.optimizer.param_groups[0]['lr']

    def perturbation(self, gradient: Tensor) -> Tensor:
        share = (self.optimizer.param_groups[0]['lr'] - self.lr_min) / (self.lr_max - self.lr_min)
        return (self.rho_min + (self.rho - self.rho_min) * share) * gradient / gradient.norm()

    def final(self, plain: Tensor, perturbed: Tensor) -> Tensor:
        orthogonal = plain - (plain @ perturbed) / (perturbed @ perturbed) * perturbed
        return perturbed - self.alpha * orthogonal


class WSAM(FlatReference):
    """Clipping is of g and g' each by itself, or of the sum that the base optimizer gets."""

    def __init__(self, *args: Any, gamma: float, decouple: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight, self.decouple = gamma / (1 - gamma), decouple

    def clipped(self, gradient: Tensor) -> Tensor:
        """Of one vector as of many tensors."""
        holder = torch.nn.Parameter(torch.zeros_like(gradient))
        holder.grad = gradient.clone()
        self.clip([holder])
        return holder.grad

    def final(self, plain: Tensor, perturbed: Tensor) -> Tensor:
        self.apart = self.clipped(perturbed) - self.clipped(plain)
        return plain if self.decouple else plain + self.weight * (perturbed - plain)

    def finish(self, final: Tensor) -> None:
        super().finish(final)
        if self.decouple:
            (group,) = self.optimizer.param_groups
            self.write(flat(self.parameters) - group['lr'] * self.weight * self.apart)


class MSAM(FlatReference):
    """Along SGD's momentum, or Adam's."""

    rho = 0.3

    def step(self, micro_batches: list[Batch]) -> None:
        states = [self.optimizer.state[parameter] for parameter in self.parameters]
        momenta = [state.get('momentum_buffer', state.get('exp_avg')) for state in states]
        move = None
        if self.steps:
            momentum = flat(momenta)
            move = -self.rho * momentum / momentum.norm()
        self.finish(torch.stack([self.gradient(batch, move) for batch in micro_batches]).mean(0))


# By the wrapper's row in tests/wrappers.py, with that row's arguments.
FAMILY: dict[str, Callable[..., FlatReference]] = {
    'sam-interval': partial(IntervalSAM, interval=2),
    'looksam': partial(LookSAM, k=2, alpha=0.7),
    'gsam': partial(GSAM, alpha=0.4, rho_min=0.0),
    'msam': MSAM,
    'wsam': partial(WSAM, gamma=0.9),
    'wsam-coupled': partial(WSAM, gamma=0.9, decouple=False),
    'friendlysam': partial(FriendlySAM, sigma=1.0, lmbda=0.9),
}
