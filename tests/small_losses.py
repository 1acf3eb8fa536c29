"""Small models and losses for the tests of per-sample losses, and what is recorded of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from mm_sharp.per_sample_loss import LossRecord, PerSampleLoss

N = 5


class Net(BaseModel):
    """A linear layer and a loss: ``make`` computes the returned losses from the model, its output and the targets."""

    def __init__(self, make: Callable[[Any, Tensor, Tensor], Any] | None = None, **losses: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        for name, loss in losses.items():
            setattr(self, name, loss)
        self.make = make or (lambda net, output, targets: {'loss': net.loss_fn(output, targets)})

    def forward(self, inputs: Tensor, targets: Tensor, mode: str = 'loss') -> Any:
        return self.make(self, self.linear(inputs), targets)


class Lambda(nn.Module):
    """A loss made of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class CountingLoss(nn.Module):
    """Counts its calls in a number and a buffer; its value depends on the number: 0 in the first ``warmup`` calls."""

    def __init__(self, warmup: int = 0) -> None:
        super().__init__()
        self.warmup, self.calls = warmup, 0
        self.register_buffer('average', torch.ones(()))

    def forward(self, output: Tensor, targets: Tensor) -> Any:
        self.calls += 1
        loss = F.mse_loss(output, targets)
        self.average.mul_(0.9)
        return loss * 0 if self.calls <= self.warmup else loss * self.calls


class PretrainLoss(nn.Module):
    """The signature and the averaging of MMPretrain's ``CrossEntropyLoss``."""

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        losses = F.cross_entropy(cls_score, label, reduction='none')
        losses = losses if weight is None else losses * weight
        return losses.mean() if avg_factor is None else losses.sum() / avg_factor


class Branching(nn.Module):
    """Looks at its values, which vmap does not allow."""

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        difference = (output - targets).abs()
        return difference.sum() if float(difference.detach().max()) < 1e6 else difference.mean()


def data(size: int = N, seed: int = 0, labels: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 4, generator=generator)
    if labels:
        return {'inputs': inputs, 'targets': torch.randint(3, (size,), generator=generator)}
    return {'inputs': inputs, 'targets': torch.rand(size, 3, generator=generator)}


def net(make: Any = None, **losses: Any) -> Net:
    torch.manual_seed(0)
    return Net(make, **losses)


def record(model: Net, batch: dict[str, Tensor], **how: Any) -> tuple[LossRecord, Tensor]:
    """The record of one forward, and the total."""
    with PerSampleLoss(model).record(**how) as found:
        output = model(**batch)
    return found, output.mean() if isinstance(output, Tensor) else model.parse_losses(output)[0]


def one_by_one(model: Net, batch: dict[str, Tensor]) -> Tensor:
    """The model's loss on every sample alone."""
    losses = []
    for i in range(len(batch['inputs'])):
        output = copy.deepcopy(model)(**{key: value[i : i + 1] for key, value in batch.items()})
        losses.append(output.mean() if isinstance(output, Tensor) else model.parse_losses(output)[0])
    return torch.stack(losses).detach()


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.nonzero.default,
        )
        self.count += func in waits
        return func(*args, **(kwargs or {}))
