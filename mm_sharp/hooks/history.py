"""What the sample history needs of a Runner: the data set, the ranks, the data loader."""

from __future__ import annotations

import logging
from typing import Any, Protocol, runtime_checkable

from mmengine.dist import get_rank
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop
from torch import nn

from mm_sharp.errors import UserError
from mm_sharp.samples.ausam_sampler import AUSAMSampler
from mm_sharp.samples.dataset_keys import DatasetKeys
from mm_sharp.samples.history import SampleHistory
from mm_sharp.samples.keys import SampleIdError
from mm_sharp.samples.seeds import Member
from mm_sharp.step.optim_wrappers import optim_wrappers


@runtime_checkable
class KeepsHistory(Protocol):
    """An optimizer wrapper that keeps a history of its samples' loss differences."""

    history: SampleHistory
    member: Member
    dataset_size: int | None

    @property
    def uses_history(self) -> bool:
        """Whether it does so with its present arguments."""

    def exchange_history(self) -> None:
        """Bring the histories of all ranks to the same state."""


@runtime_checkable
class DrawsInLoader(KeepsHistory, Protocol):
    """One that can take the batches which an ``AUSAMSampler`` has drawn."""

    def attach_model(self, model: nn.Module) -> None:
        """Fit the draws to what the model can be trained on."""

    def attach_sampler(self, sampler: AUSAMSampler, dataset_keys: DatasetKeys, rank: int) -> None:
        """Take the sampler's batches."""


@HOOKS.register_module()
class SampleHistoryHook(Hook):  # type: ignore[misc]
    """Keep the history of loss differences in step with data set, ranks and data loader.

    - Before training: the wrappers of an ``OptimWrapperDict`` are numbered, so that they draw independently. A loaded
      history is fitted to the data set, and the log says how. An ``AUSAMSampler`` gets the wrapper that it draws for.
    - With several ranks, the histories are exchanged at the end of every epoch (in iteration-based training, after as
      many iterations as an epoch has), before validation and before a checkpoint.

    Added by itself to every Runner that uses this package; it does nothing where no wrapper keeps a history.
    """

    priority = 'LOW'  # before CheckpointHook

    def __init__(self) -> None:
        self._wrappers: list[KeepsHistory] = []
        self._epoch_length = 1
        self._exchanged = True

    def before_train(self, runner: Any) -> None:
        """Bring together wrapper, data set and data loader."""
        loader = runner.train_dataloader
        try:
            self._epoch_length = max(1, len(loader))
        except TypeError:  # a sampler without end
            self._epoch_length = 1000
        wrappers = optim_wrappers(runner.optim_wrapper).values()
        for number, wrapper in enumerate(wrappers):
            if isinstance(wrapper, KeepsHistory):
                wrapper.member.number = number
        self._wrappers = [wrapper for wrapper in wrappers if isinstance(wrapper, KeepsHistory) and wrapper.uses_history]
        sampler = getattr(loader, 'batch_sampler', None)
        if isinstance(sampler, AUSAMSampler):
            _check_sampler(loader, runner.optim_wrapper)
        drawing = [w for w in wrappers if isinstance(w, DrawsInLoader)] if isinstance(sampler, AUSAMSampler) else []
        if not (self._wrappers or drawing) or not hasattr(loader.dataset, '__len__'):
            return  # a data set that only iterates: its samples are known when they arrive
        keys = DatasetKeys(loader.dataset)
        for wrapper in self._wrappers:
            keys.check_collisions()
            wrapper.dataset_size = keys.count()
            if len(wrapper.history):
                _reconcile(wrapper, keys)
        for drawer in drawing:
            assert sampler is not None
            drawer.attach_model(runner.model)
            drawer.attach_sampler(sampler, keys, get_rank())
            sampler.follow(runner.train_loop)

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
            for wrapper in self._wrappers:
                wrapper.exchange_history()
        self._exchanged = True


def _check_sampler(loader: Any, optim_wrapper: Any) -> None:
    wrappers = optim_wrappers(optim_wrapper).values()
    found = sum(isinstance(wrapper, DrawsInLoader) for wrapper in wrappers)
    # Another wrapper of an OptimWrapperDict would train on the samples drawn without knowing of it.
    if found != 1 or len(wrappers) > 1:
        uses = f'{found} of them' if found > 1 else type(optim_wrapper).__name__
        raise UserError(
            f'AUSAMSampler draws the batches for one AUSAMOptimWrapper, but the config uses {uses}: write '
            "optim_wrapper = dict(type='AUSAMOptimWrapper', ...), or take batch_sampler=dict(type='AUSAMSampler') out "
            'of train_dataloader'
        )
    if not getattr(loader, 'in_order', True):
        raise UserError(
            'train_dataloader.in_order=False is not allowed: AUSAMSampler must know which draw a batch is from. Take '
            'it out of train_dataloader'
        )


def _reconcile(wrapper: KeepsHistory, keys: DatasetKeys) -> None:
    """Drop samples of a loaded history that are not in the data set any more, and log it."""
    dropped = 0
    try:
        kept, dropped, unseen = wrapper.history.reconcile(keys.ids_by_name())
        message = f'{kept} samples of the data set have been seen, {unseen} not yet'
        message += f'; {dropped} that are not in the data set any more were dropped' if dropped else ''
    except SampleIdError:
        message = (
            f'{len(wrapper.history)} samples have been seen; the data set cannot tell the ids of its samples '
            'beforehand, so that it is not known whether all of them are still in it'
        )
    level = logging.WARNING if dropped else logging.INFO
    print_log(f'Sample history: {message}', logger='current', level=level)


def _checkpoint_is_due(runner: Any) -> bool:
    """Whether ``CheckpointHook`` writes a checkpoint after this iteration."""
    hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook) and not hook.by_epoch]
    return any(
        hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
        or (hook.save_last and hook.is_last_train_iter(runner))
        for hook in hooks
    )
