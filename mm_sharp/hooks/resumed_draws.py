"""A resumed run draws the random numbers that it would have drawn without the interruption.

A checkpoint's random state is that after its last step. A resumed run draws more before its next step than one never
stopped: the workers' seed and, in iteration-based training, whatever loading the skipped batches takes. So the state
is restored once more, just before the next batch is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop

from mm_sharp.ops.parameters import devices_of
from mm_sharp.ops.rng import RandomState
from mm_sharp.step.optim_wrappers import optim_wrappers
from mm_sharp.step.wrapper import TwoPassOptimWrapper


@HOOKS.register_module()
class ResumedDrawsHook(Hook):  # type: ignore[misc]
    """Restore the random state of a checkpoint just before the first batch.

    - Iteration-based training: after the batches that MMEngine skips.
    - Epochs: when the first epoch begins. Persistent workers, which a run never stopped has had since its first epoch,
      are seeded without the global generator.
    - Validation leaves the random state as it was: a checkpoint that is written before it cannot know of its draws.

    Added by itself to every Runner that uses this package; it does nothing without one of our optimizer wrappers.
    """

    priority = 'VERY_HIGH'  # other hooks' draws come after the state is restored, as they came after the checkpoint

    def __init__(self) -> None:
        self._devices: tuple[torch.device, ...] | None = None
        self._before_loading: RandomState | None = None
        self._to_restore: RandomState | None = None
        self._before_validation: RandomState | None = None
        self._workers_seed: torch.Generator | None = None

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Before the optimizer wrapper loads its part, and with it the random state."""
        if get_world_size() == 1 and _holds_random_state(checkpoint.get('optimizer')):
            self._before_loading = RandomState.capture()

    def before_train(self, runner: Any) -> None:
        """In a resumed run, have hooks and loader draw until training begins as in a run never stopped."""
        wrappers = [w for w in optim_wrappers(runner.optim_wrapper).values() if isinstance(w, TwoPassOptimWrapper)]
        if not wrappers:
            return
        self._devices = tuple({device for wrapper in wrappers for device in devices_of(wrapper.optimizer)})
        before, self._before_loading = self._before_loading, None
        if runner.iter > 0 and before is not None:
            self._to_restore = RandomState.capture(self._devices)
            before.restore()

    def before_train_epoch(self, runner: Any) -> None:
        """Restore the state, or have it restored after the batches that are skipped."""
        if self._to_restore is None:
            return
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            loop = runner.train_loop
            loop.dataloader_iterator = _restore_after_skipping(loop, loop.dataloader_iterator, self)
        else:
            self._workers_seed = _seed_workers_apart(runner.train_dataloader, self._to_restore)
            self.restore()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """The first step: the loader's iteration has begun."""
        if self._workers_seed is not None:
            runner.train_dataloader.generator = self._workers_seed = None
        self.restore()  # in a loop of the user's, which does not skip

    def restore(self) -> None:
        """Restore the state of the checkpoint, once."""
        if self._to_restore is not None:
            self._to_restore.restore()
        self._to_restore = None

    def before_val_epoch(self, runner: Any) -> None:
        """Keep the state; in training only."""
        if self._devices is not None:
            self._before_validation = RandomState.capture(self._devices)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Restore it, before the best checkpoint is written."""
        if self._before_validation is not None:
            self._before_validation.restore()
        self._before_validation = None


def _restore_after_skipping(loop: IterBasedTrainLoop, iterator: Iterator[Any], hook: ResumedDrawsHook) -> Iterator[Any]:
    """``iterator`` for as many batches as ``loop`` has trained already, which it discards, and the next one."""
    for _ in range(loop.iter):
        yield next(iterator)
    loop.dataloader_iterator = iterator
    hook.restore()
    yield next(iterator)


def _holds_random_state(optimizer: Any) -> bool:
    """Whether the optimizer state of one wrapper, or of several by name, holds a random state."""
    if not isinstance(optimizer, Mapping):
        return False
    own = optimizer.get('mm_sharp')
    return (isinstance(own, Mapping) and 'random_state' in own) or any(map(_holds_random_state, optimizer.values()))


def _seed_workers_apart(loader: Any, state: RandomState) -> torch.Generator | None:
    """Give ``loader`` a generator of its own, if it is about to start persistent workers, and return it."""
    starts = getattr(loader, 'num_workers', 0) > 0 and getattr(loader, '_iterator', None) is None
    if not (starts and loader.persistent_workers) or loader.generator is not None:
        return None
    generator = torch.Generator()
    generator.set_state(state.cpu)
    loader.generator = generator
    return generator
