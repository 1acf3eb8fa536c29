"""Checkpoints of MMEngine's FlexibleRunner know which epoch they are of.

Cause: when validation finds a best score, ``CheckpointHook`` saves the epoch's checkpoint again and hands over its
epoch and iteration, since the loop counts one more by then. Runner keeps what it is given; FlexibleRunner writes its
own count over it (over the hook's own dict, too), so that resuming skips an epoch.

Repair: what is given is written over it once more, in runs that use this package.

Ends with: an mmengine whose FlexibleRunner keeps what it is given, as its Runner does (none as of 0.10.7).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mmengine.runner import FlexibleRunner

from .checkpoint_hook import uses_mm_sharp
from .fix import Fix

_NAME = 'epochs of FlexibleRunner'
_ENDS = 'an mmengine whose FlexibleRunner keeps the meta that it is given (none as of 0.10.7)'
_COUNTS = ('epoch', 'iter')


def install() -> None:
    """Wrap ``FlexibleRunner.save_checkpoint``; a second call changes nothing."""
    if not hasattr(FlexibleRunner.save_checkpoint, '__wrapped__'):
        FlexibleRunner.save_checkpoint = _keeping(FlexibleRunner.save_checkpoint)


def describe() -> Fix:
    """Always active, for runs that use this package."""
    reason = 'a checkpoint that is saved again after validation would be of the next epoch'
    return Fix(_NAME, hasattr(FlexibleRunner.save_checkpoint, '__wrapped__'), reason, _ENDS)


def _keeping(save_checkpoint: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(save_checkpoint)
    def wrapper(self: Any, *args: Any, meta: dict[str, Any] | None = None, **kwargs: Any) -> None:
        given = {key: value for key, value in (meta or {}).items() if key in _COUNTS}
        if not given or not uses_mm_sharp(self):
            save_checkpoint(self, *args, meta=meta, **kwargs)
            return
        save = self.strategy.save_checkpoint

        def save_given(*args: Any, extra_ckpt: dict[str, Any], **kwargs: Any) -> None:
            save(*args, extra_ckpt={**extra_ckpt, 'meta': {**extra_ckpt['meta'], **given}}, **kwargs)

        self.strategy.save_checkpoint = save_given
        try:
            save_checkpoint(self, *args, meta={**(meta or {})}, **kwargs)
        finally:
            del self.strategy.save_checkpoint

    return wrapper
