"""What the sample history, and AUSAM's draws by it, need of a Runner."""

from __future__ import annotations

import math
from typing import Any

from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop

from mm_sharp.errors import UserError
from mm_sharp.samples.ausam_sampler import AUSAMSampler
from mm_sharp.samples.dataset_keys import DatasetKeys
from mm_sharp.samples.schedule import TrainingLength
from mm_sharp.step.optim_wrappers import optim_wrappers


@HOOKS.register_module()
class SampleHistoryHook(Hook):  # type: ignore[misc]
    """Keep the history of loss differences, and AUSAM's draws, in step with data set, data loader, ranks and training.

    - Before training: the wrappers of an ``OptimWrapperDict`` are numbered, so that they draw independently. An
      ``AUSAMSampler`` gets the wrapper that it draws for.
    - Before each step: AUSAM's schedule learns the place in the training. In iteration-based training an epoch is one
      pass over the data set's batches; where the data set has no length, a schedule goes by iterations.
    - With several ranks, the histories are exchanged at the end of every epoch (in iteration-based training, after as
      many iterations as an epoch has), before validation and before a checkpoint.

    Added by itself to every Runner that uses this package; it does nothing for other optimizer wrappers.
    """

    priority = 'LOW'  # before CheckpointHook

    def __init__(self) -> None:
        # Methods are told by what they have: they lie above the hooks.
        self._keeping: list[Any] = []
        self._drawing: list[Any] = []
        self._length: TrainingLength | None = None
        self._epoch_length = 1
        self._exchanged = True

    def before_train(self, runner: Any) -> None:
        """Bring together wrapper, data set and data loader."""
        loader, wrappers = runner.train_dataloader, list(optim_wrappers(runner.optim_wrapper).values())
        try:
            self._epoch_length = max(1, len(loader))
        except TypeError:  # a sampler without end
            self._epoch_length = 1000
        self._keeping = [wrapper for wrapper in wrappers if getattr(wrapper, 'uses_history', False)]
        self._drawing = [wrapper for wrapper in wrappers if hasattr(wrapper, 'attach_sampler')]
        for number, wrapper in enumerate(wrappers):
            if hasattr(wrapper, 'history'):
                wrapper.number = number
        if self._drawing:
            self._length = training_length(runner.train_loop, loader)
        for wrapper in self._drawing:
            wrapper.length = self._length
        sampler = getattr(loader, 'batch_sampler', None)
        if isinstance(sampler, AUSAMSampler):
            self._check_sampler(loader, wrappers)
        elif not self._keeping:
            return
        if not hasattr(loader.dataset, '__len__'):
            return  # a data set that only iterates: its samples are known when they arrive
        keys = DatasetKeys(loader.dataset)
        for wrapper in self._keeping:
            keys.check_collisions()
            wrapper.dataset_size = keys.count()
        if isinstance(sampler, AUSAMSampler):
            (drawer,) = self._drawing
            drawer.attach_sampler(sampler, keys, get_rank(), runner.model)
            sampler.follow(runner.train_loop)

    def _check_sampler(self, loader: Any, wrappers: list[Any]) -> None:
        # Another wrapper of an OptimWrapperDict would train on the samples drawn without knowing of it.
        if len(wrappers) > 1 or not self._drawing:
            uses = ', '.join(type(wrapper).__name__ for wrapper in wrappers)
            raise UserError(
                f'AUSAMSampler draws the batches for one AUSAMOptimWrapper, but the config uses {uses}: write '
                "optim_wrapper = dict(type='AUSAMOptimWrapper', ...), or take batch_sampler=dict(type='AUSAMSampler') "
                'out of train_dataloader'
            )
        if not getattr(loader, 'in_order', True):
            raise UserError(
                'train_dataloader.in_order=False is not allowed: AUSAMSampler must know which draw a batch is from. '
                'Take it out of train_dataloader'
            )

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Say where in the training the step is."""
        if self._length is not None:
            by_iterations = isinstance(runner.train_loop, IterBasedTrainLoop)
            place = self._length.place(0, runner.iter) if by_iterations else self._length.place(runner.epoch)
            for wrapper in self._drawing:
                wrapper.place = place

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """In iteration-based training: exchange as often as an epoch is long, and before checkpoints."""
        self._exchanged = False
        ends = (runner.iter + 1) % self._epoch_length == 0 or self.is_last_train_iter(runner)
        if _checkpoint_is_due(runner) or (ends and isinstance(runner.train_loop, IterBasedTrainLoop)):
            self._exchange()

    def after_train_epoch(self, runner: Any) -> None:
        """Exchange at the end of every epoch, and before validation, which may write the best checkpoint."""
        self._exchange()

    before_val_epoch = after_train_epoch

    def _exchange(self) -> None:
        # Ranks go through the same hooks, so that all of them come here or none.
        if not self._exchanged:
            for wrapper in self._keeping:
                wrapper.exchange_history()
        self._exchanged = True


def training_length(loop: Any, loader: Any) -> TrainingLength:
    """How long a Runner's training is."""
    if not isinstance(loop, IterBasedTrainLoop):
        return TrainingLength(loop.max_epochs, max(1, len(loader)))
    try:
        epoch_length = max(1, len(loader))
    except TypeError:  # a data set or a sampler without end
        return TrainingLength(loop.max_iters, None)
    sampler = getattr(loader.batch_sampler, 'sampler', loader.sampler)
    sampler = getattr(sampler, 'sampler', sampler)  # AUSAMSampler's, which counts epochs
    if isinstance(sampler, InfiniteSampler):  # its length is that of all ranks together
        epoch_length = max(1, math.ceil(len(sampler) / (batch_size_of(loader) * get_world_size())))
    return TrainingLength(loop.max_iters / epoch_length, epoch_length)


def batch_size_of(loader: Any) -> int:
    """How many samples a process loads at once, before any draw; 1 where that cannot be told."""
    return getattr(loader, 'batch_size', None) or getattr(loader.batch_sampler, 'batch_size', None) or 1


def _checkpoint_is_due(runner: Any) -> bool:
    """Whether ``CheckpointHook`` writes a checkpoint after this iteration."""
    hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook) and not hook.by_epoch]
    return any(
        hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
        or (hook.save_last and hook.is_last_train_iter(runner))
        for hook in hooks
    )
