"""Tell the wrappers whose draws change over a training how long it is, and where in it they are."""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop

from mm_sharp.samples.schedule import TrainingLength, TrainingPlace
from mm_sharp.step.optim_wrappers import optim_wrappers


@runtime_checkable
class FollowsSchedule(Protocol):
    """An optimizer wrapper whose draws depend on the place in the training."""

    length: TrainingLength | None
    place: TrainingPlace | None


@HOOKS.register_module()
class DrawScheduleHook(Hook):  # type: ignore[misc]
    """Keep the schedule of AUSAM's draws in step with the training, resumed ones included.

    In iteration-based training an epoch is one pass over the data set's batches. Where the data set has no length there
    are no epochs, and a schedule goes by iterations.

    Added by itself to every Runner that uses this package; it does nothing where no wrapper has a schedule.
    """

    priority = 'NORMAL'  # before SampleHistoryHook, which has the data loader draw

    def __init__(self) -> None:
        self._wrappers: list[FollowsSchedule] = []
        self._length: TrainingLength | None = None

    def before_train(self, runner: Any) -> None:
        """Find out how long the training is."""
        found = optim_wrappers(runner.optim_wrapper).values()
        self._wrappers = [wrapper for wrapper in found if isinstance(wrapper, FollowsSchedule)]
        if not self._wrappers:
            return
        self._length = training_length(runner.train_loop, runner.train_dataloader)
        for wrapper in self._wrappers:
            wrapper.length = self._length

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Say where in the training the step is."""
        if self._length is None:
            return
        by_iterations = isinstance(runner.train_loop, IterBasedTrainLoop)
        place = self._length.place(0, runner.iter) if by_iterations else self._length.place(runner.epoch)
        for wrapper in self._wrappers:
            wrapper.place = place


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
