"""Small models and batches that the tests train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapperDict
from mmengine.registry import DATASETS, MODELS
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from mm_sharp.samples.history import SampleHistory

Batch = dict[str, Tensor]


class Notes(list[Any]):
    """What a test's model notes of its forward passes: not a plain list, so that nobody puts it back."""


class SizeLoss(nn.Module):
    """A small penalty on large outputs."""

    def forward(self, output: Tensor) -> Tensor:
        return 0.01 * output.abs().mean()


@MODELS.register_module()
class ToyNet(BaseModel):
    """A small convolutional regressor: convolution, BatchNorm, dropout, linear; mean squared error.

    Its batches have ``sample_idx``, the samples' ids, which the forward takes and does not use.

    Args:
        norm: Whether there is a BatchNorm layer.
        dropout: Dropout probability.
        with_cp: Recompute the convolution in the backward pass (re-entrant checkpointing, as MMPose's ``with_cp``).
    """

    def __init__(self, norm: bool = True, dropout: float = 0.0, with_cp: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(6 * 4 * 4, 3)
        self.with_cp = with_cp
        self.square_loss, self.size_loss = nn.MSELoss(), SizeLoss()

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        if self.with_cp and inputs.requires_grad is False:
            inputs = inputs.clone().requires_grad_()
        features = checkpoint(self.features, inputs, use_reentrant=True) if self.with_cp else self.features(inputs)
        output = self.head(self.dropout(features).flatten(1))
        if mode != 'loss':
            return output
        return {'loss_square': self.square_loss(output, targets), 'loss_size': self.size_loss(output)}

    def features(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(inputs)))


class CountingNet(ToyNet):
    """Changes everything that a forward pass can change: a number, a buffer in place, and a buffer that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer('seen', torch.zeros((), dtype=torch.long))
        self.register_buffer('average', torch.zeros(3))

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        self.calls += 1
        self.seen += 1
        self.average = 0.9 * self.average + 0.1 * targets.mean(0)
        return super().forward(inputs, targets, sample_idx, mode)


class NaNSecond(ToyNet):
    """Multiplies the loss of chosen forward passes (counted from 0 over all passes) by a number, such as nan."""

    def __init__(self, factors: dict[int, float]) -> None:
        super().__init__()
        self.factors, self.forwards = factors, Notes()

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        losses = super().forward(inputs, targets, sample_idx, mode)
        factor = self.factors.get(len(self.forwards), 1.0)
        self.forwards.append(factor)
        return {name: loss * factor for name, loss in losses.items()}


class Functional(ToyNet):
    """Computes its loss by a function, which no hook can see."""

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        return {'loss': F.mse_loss(super().forward(inputs, targets, sample_idx, 'tensor'), targets)}


@DATASETS.register_module()
class ToySamples(Dataset[Batch]):
    """``count`` random samples for :class:`ToyNet`."""

    def __init__(self, count: int) -> None:
        (batch,) = batches(1, count)
        self.rows = [{key: value[i] for key, value in batch.items()} for i in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def get_data_info(self, index: int) -> dict[str, int]:
        return {'sample_idx': index}

    def __getitem__(self, index: int) -> Batch:
        return self.rows[index]


def toy_config(work_dir: Path, **changes: Any) -> dict[str, Any]:
    """A Runner's config: two epochs of 5 iterations of SAM on :class:`ToyNet`, logged every 2 iterations."""
    config: dict[str, Any] = dict(
        model=dict(type='ToyNet'),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=dict(type='ToySamples', count=20),
            batch_size=4,
            num_workers=0,
            collate_fn=dict(type='default_collate'),
            sampler=dict(type='DefaultSampler', shuffle=True),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(type='SAMOptimWrapper', rho=0.05, optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=2)),
        custom_hooks=[dict(type='SharpnessHook')],
        # MMEngine keeps loggers and message hubs by this name for as long as the process lives.
        experiment_name='-'.join(work_dir.parts[1:]),
        log_level='WARNING',
        randomness=dict(seed=0),
    )
    return {**config, **changes}


def batches(count: int, size: int = 8, seed: int = 0) -> list[Batch]:
    """``count`` random batches of ``size`` samples, whose ids go on from batch to batch."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            'inputs': torch.randn(size, 2, 6, 6, generator=generator),
            'targets': torch.randn(size, 3, generator=generator),
            'sample_idx': torch.arange(number * size, (number + 1) * size),
        }
        for number in range(count)
    ]


def make(kind: type[ToyNet] = ToyNet, seed: int = 0, **kwargs: Any) -> ToyNet:
    """A model with weights that ``seed`` determines, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(**kwargs).train()


def same_state(left: nn.Module, right: nn.Module) -> bool:
    """Whether all weights and buffers are equal, bit for bit."""
    states = left.state_dict(), right.state_dict()
    return states[0].keys() == states[1].keys() and all(
        same_bits(states[0][name], states[1][name]) for name in states[0]
    )


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal bit for bit: nan equals itself, and -0.0 is not 0.0."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return left.detach().cpu().contiguous().numpy().tobytes() == right.detach().cpu().contiguous().numpy().tobytes()


@MODELS.register_module()
class ToyPair(BaseModel):
    """Two models with an optimizer each, as adversarial training has them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = make(seed=1), make(seed=2)

    def forward(self, inputs: Tensor, targets: Tensor, sample_idx: Any = None, mode: str = 'loss') -> Any:
        return self.left(inputs, targets, mode=mode)

    def train_step(self, data: dict[str, Tensor], optim_wrapper: OptimWrapperDict) -> dict[str, Tensor]:
        logged: dict[str, Tensor] = {}
        for name, part in (('left', self.left), ('right', self.right)):
            with optim_wrapper[name].optim_context(part):
                losses = part(**data)
            loss, _ = part.parse_losses(losses)
            optim_wrapper[name].update_params(loss)
            logged[f'loss_{name}'] = loss
        return logged


# What a SharpnessHook logs of a step.
KEYS = {f'sharpness/{name}' for name in ('L_w', 'L_w_e', 'sharpness', 'g_norm', 'pass2_share')}


def history_bytes(history: SampleHistory) -> int:
    """Memory of a history's arrays."""
    tables = [*history._shared.values(), *history._own.values()]
    return sum(column.nbytes for table in tables for column in (*table._main, *table._recent))
