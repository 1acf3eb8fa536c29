"""ESAM beside its reference: models, batches, and both trained together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from mm_sharp import ESAMOptimWrapper
from mm_sharp.ops.perturbation import weight_mask
from mm_sharp.samples.seeds import RngStream, make_generator
from tests.references_esam import ReferenceESAM, ToyLoss
from tests.toys import Batch, Notes, ToyNet, batches, make, same_bits, same_state
from tests.wrappers import momentum_sgd

both = pytest.mark.parametrize('refresh', [None, 3], ids=['exact', 'history'])


MEAN = ToyLoss()


class SizeSum(nn.Module):
    """The penalty on large outputs as a sum over the batch."""

    def forward(self, output: Tensor) -> Tensor:
        return 0.01 * output.abs().sum()


def toy(loss: ToyLoss = MEAN, **kwargs: Any) -> ToyNet:
    """A ``ToyNet`` with the loss modules that ``loss`` has by formula."""
    model = make(**kwargs)
    # Before BatchNorm it changes no loss: perturbed alone, it would leave the selection to rounding.
    model.conv.bias = None
    if loss.square_sum:
        model.square_loss = nn.MSELoss(reduction='sum')
    if loss.size_sum:
        model.size_loss = SizeSum()
    return model


class Rows:
    """The ids of the samples that each forward pass with gradients ran on."""

    def __init__(self, model: nn.Module) -> None:
        self.ids: list[list[int]] = Notes()
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self.ids.append(kwargs['sample_idx'].tolist())


def selecting(refresh: int | None) -> dict[str, Any]:
    """The wrapper's arguments: the exact selection, or the history's with its ``refresh``."""
    return dict(selection='history', refresh=refresh) if refresh else {}


class LineNet(BaseModel):
    """Returns losses of shape (N,), w * x_i, so that the increases are e * x_i; with ``log``, -log(1 - w * x_i)."""

    def __init__(self, log: bool = False) -> None:
        super().__init__()
        self.weight, self.log = nn.Parameter(torch.zeros(())), log

    def forward(self, inputs: Tensor, sample_idx: Any = None, mode: str = 'loss') -> dict[str, Tensor]:
        products = self.weight * inputs
        return {'loss': -torch.log(1 - products) if self.log else products}


def line(values: list[float], first_id: int = 0) -> Batch:
    return {'inputs': torch.tensor(values), 'sample_idx': torch.arange(first_id, first_id + len(values))}


def pool_batches(count: int, size: int = 8, pool: int = 24) -> list[Batch]:
    """``count`` batches of ``size`` distinct samples out of ``pool``, so that samples come again."""
    (samples,) = batches(1, pool)
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randperm(pool, generator=generator)[:size] for _ in range(count)]
    return [{name: value[chosen] for name, value in samples.items()} for chosen in rows]


def draws(wrapper: ESAMOptimWrapper, model: nn.Module, step: int, size: int) -> tuple[list[bool], list[int]]:
    """What the wrapper draws in a step: which tensors are perturbed, and the order of samples with equal history."""
    mask = weight_mask(len(list(model.parameters())), wrapper.beta, make_generator(wrapper.seed, RngStream.MASK, step))
    return mask, torch.randperm(size, generator=make_generator(wrapper.seed, RngStream.TIES, 0, step)).tolist()


def pair(
    loss: ToyLoss = MEAN, *, lr: float = 0.01, refresh: int | None = None, **kwargs: Any
) -> tuple[ToyNet, ESAMOptimWrapper, ReferenceESAM]:
    """A model with ESAM around it, and the reference around its twin; ``refresh`` makes it ``'history'``."""
    ours, theirs = toy(loss), toy(loss)
    wrapper = ESAMOptimWrapper(momentum_sgd(ours, lr), **selecting(refresh), **kwargs)
    return ours, wrapper, ReferenceESAM(theirs, momentum_sgd(theirs, lr), refresh=refresh, loss=loss, **kwargs)


def train_both(ours: ToyNet, wrapper: ESAMOptimWrapper, reference: ReferenceESAM, data: list[Batch]) -> None:
    """Train both, comparing weights, buffers, momenta and what the second pass ran on after every step."""
    rows = Rows(ours)
    for step, batch in enumerate(data):
        ours.train_step(batch, wrapper)
        reference.step(batch, *draws(wrapper, ours, step, len(batch['targets'])))
        assert same_state(ours, reference.model)
        assert rows.ids[-1] == batch['sample_idx'][reference.rows[-1]].tolist()
    for left, right in zip(ours.parameters(), reference.model.parameters(), strict=True):
        momenta = wrapper.optimizer.state[left], reference.optimizer.state[right]
        assert same_bits(momenta[0]['momentum_buffer'], momenta[1]['momentum_buffer'])
