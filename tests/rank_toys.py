"""What the tests of several ranks train: a normalisation over all ranks, and a hook that notes every step's weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

# Imported before there is a process group: its functions would hold the group for ever.
import torch.distributed.nn.functional as collective
from mmengine.dist import get_rank
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS, MODELS
from torch import Tensor, nn

from tests.toys import ToyNet


class SyncedNorm(nn.BatchNorm2d):
    """Normalises by the statistics of all ranks' samples, with gradient: torch's SyncBatchNorm, for the CPU."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return super().forward(inputs)
        inputs = inputs.float()
        sums = [inputs.sum((0, 2, 3)), inputs.square().sum((0, 2, 3))]
        count = inputs.new_tensor([inputs.numel() / inputs.shape[1]])
        *moments, total = collective.all_reduce(torch.cat([*sums, count])).split([len(sums[0]), len(sums[1]), 1])
        mean, square = (moment / total for moment in moments)
        variance = square - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance, self.momentum)
            self.num_batches_tracked += 1
        shape = (1, -1, 1, 1)
        normalised = (inputs - mean.view(shape)) / (variance.view(shape) + self.eps).sqrt()
        return normalised * self.weight.view(shape) + self.bias.view(shape)


@MODELS.register_module()
class SyncedNet(ToyNet):
    """:class:`ToyNet` with :class:`SyncedNorm`, and a parameter that nothing uses."""

    def __init__(self, unused: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norm = SyncedNorm(6)
        if unused:
            self.unused = nn.Parameter(torch.ones(3))


def digest(model: nn.Module) -> str:
    """A hash of all weights, bit for bit."""
    hashed = hashlib.sha256()
    for parameter in model.parameters():
        hashed.update(parameter.detach().contiguous().numpy().tobytes())
    return hashed.hexdigest()


@HOOKS.register_module()
class WeightHashHook(Hook):  # type: ignore[misc]
    """Appends a line for every iteration to ``WORK_DIR/weights.RANK``: batch size, hash of the weights, of EMA's."""

    priority = 'LOWEST'

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        averages = [digest(hook.ema_model) for hook in runner.hooks if isinstance(hook, EMAHook)]
        line = ' '.join([str(len(data_batch['inputs'])), digest(runner.model), *averages])
        with (Path(runner.work_dir) / f'weights.{get_rank()}').open('a') as stream:
            stream.write(line + '\n')
