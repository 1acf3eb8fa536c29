"""Freeze BatchNorm statistics and quantizer scales late in a quantization-aware training: a hook.

The end of the training then sees the network that is going to be used (Krishnamoorthi 2018, arXiv 1806.08342).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import broadcast, get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mm_sharp.errors import UserError
from mm_sharp.step.optim_wrappers import optim_wrappers

from .quantizers import SCALES

_EXAMPLE = "custom_hooks = [dict(type='FreezeHook', batchnorm_stats=6, quantizer_scales=8)]"


@HOOKS.register_module()
class FreezeHook(Hook):  # type: ignore[misc]
    """Freeze BatchNorm statistics, quantizer scales, or both, after a number of epochs.

    - BatchNorm layers are in evaluation mode from then on: their running statistics stay as they are, rank 0's on all
      ranks. Their weights and biases are trained on.
    - Quantizers' scales and zero points keep their values bit for bit, whatever the optimizer: they get zero gradients,
      so that neither a gradient's norm nor a perturbation has a part of theirs, and the optimizer's step does not see
      them. Scales that are computed from the weights (``weight_scales='statistics'``) follow the weights.

    Epochs are counted from the beginning of the training: a run that resumes later is frozen at once. In
    iteration-based training an epoch is one pass over the training set.

    Args:
        batchnorm_stats: Epochs after which BatchNorm statistics are frozen; 0: from the beginning; None: never.
        quantizer_scales: The same for quantizers' scales and zero points.

    Raises:
        ValueError: An argument is not allowed, none is given, or the training set has no length to count epochs by.
    """

    def __init__(self, batchnorm_stats: int | None = None, quantizer_scales: int | None = None) -> None:
        for name, value in (('batchnorm_stats', batchnorm_stats), ('quantizer_scales', quantizer_scales)):
            if value is not None and (type(value) is not int or value < 0):
                raise UserError(
                    f'FreezeHook: {name}={value!r} is not allowed: it must be None or an integer of at least 0, the '
                    f'epochs after which to freeze. Write for example: {_EXAMPLE}'
                )
        if batchnorm_stats is None and quantizer_scales is None:
            raise UserError(
                f'FreezeHook: batchnorm_stats=None and quantizer_scales=None would freeze nothing. Write {_EXAMPLE}'
            )
        self.batchnorm_stats = batchnorm_stats
        self.quantizer_scales = quantizer_scales
        self._norms: list[_BatchNorm] = []
        self._scales: list[nn.Parameter] = []
        self._norms_are_frozen = False
        self._handles: list[RemovableHandle] = []

    def before_train(self, runner: Any) -> None:
        """Find what is to be frozen, and warn of what will have no effect."""
        self.after_train(runner)
        _epochs_done(runner)
        self._norms_are_frozen = False
        self._norms = [module for module in runner.model.modules() if isinstance(module, _BatchNorm)]
        self._scales = [p for name, p in runner.model.named_parameters() if SCALES in name and p.requires_grad]
        for name, epochs, found, kind in (
            ('batchnorm_stats', self.batchnorm_stats, self._norms, 'BatchNorm layers'),
            ('quantizer_scales', self.quantizer_scales, self._scales, 'trained scales of quantizers'),
        ):
            reason = ''
            if not found:
                reason = f'the model has no {kind}'
            elif not isinstance(runner.train_loop, IterBasedTrainLoop) and (epochs or 0) >= runner.max_epochs:
                reason = f'training ends after {runner.max_epochs} epochs'
            if reason and epochs is not None:
                print_log(f'FreezeHook: {name}={epochs} has no effect: {reason}', 'current', logging.WARNING)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Freeze what is due; BatchNorm layers every time, since loops put the model into training mode."""
        done = _epochs_done(runner)
        if self.batchnorm_stats is not None and done >= self.batchnorm_stats:
            if self._norms and not self._norms_are_frozen:
                for statistic in (s for norm in self._norms for s in (norm.running_mean, norm.running_var)):
                    if statistic is not None:  # track_running_stats=False
                        broadcast(statistic, src=0)
                message = f'From epoch {done + 1} on, the statistics of {len(self._norms)} BatchNorm layers are frozen'
                print_log(message, 'current')
            self._norms_are_frozen = True
            for norm in self._norms:
                norm.train(False)
        due = self.quantizer_scales is not None and done >= self.quantizer_scales
        if due and self._scales and not self._handles:
            for scale in self._scales:
                scale.grad = None  # of an accumulation that began before
                # Not requires_grad_(False): DDP would wait for their gradients.
                self._handles.append(scale.register_hook(torch.zeros_like))
            for member in optim_wrappers(runner.optim_wrapper).values():
                self._handles.append(member.optimizer.register_step_pre_hook(self._hide_scales))
            message = f'From epoch {done + 1} on, {len(self._scales)} scales and zero points of quantizers are frozen'
            print_log(message, 'current')

    def after_train(self, runner: Any) -> None:
        """Leave no hooks behind on the model and the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hide_scales(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Optimizers pass over parameters without a gradient; a zero gradient would still let momentum move them.
        for scale in self._scales:
            scale.grad = None


def _epochs_done(runner: Any) -> int:
    """Epochs completed; in iteration-based training, whose loop counts none, passes over the training set."""
    loop = runner.train_loop
    if not isinstance(loop, IterBasedTrainLoop):
        return int(runner.epoch)
    try:
        length = len(loop.dataloader)
    except TypeError as error:
        raise UserError(
            'FreezeHook counts epochs, and the training set has no length: take FreezeHook out of custom_hooks, or '
            'give the dataset __len__'
        ) from error
    if isinstance(loop.dataloader.sampler, InfiniteSampler):
        length = -(-length // get_world_size())  # its length is that of the whole set, of which a rank sees its share
    return int(runner.iter) // max(1, length)
