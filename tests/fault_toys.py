"""Toys for runs in processes of their own, which are killed, interrupted or hang."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS

from tests.toys import ToyNet


@MODELS.register_module()
class HeavyNet(ToyNet):
    """A toy whose checkpoints take a while to write (8 MB), so that a kill can fall into it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer('ballast', torch.zeros(2_000_000))


@HOOKS.register_module()
class FaultHook(Hook):
    """Rank 1 dies, raises or hangs before an iteration.

    Args:
        fault: ``'dies'``, ``'raises'`` or ``'hangs'``.
        at: The iteration, from 0.
    """

    def __init__(self, fault: str, at: int) -> None:
        self.fault, self.at = fault, at

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if get_rank() != 1 or runner.iter != self.at:
            return
        if self.fault == 'dies':
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == 'raises':
            raise RuntimeError('what went wrong on rank 1')
        time.sleep(3600)


@HOOKS.register_module()
class HoldHook(Hook):
    """Holds a run before an iteration, counted from 0, for whoever is to kill it."""

    def __init__(self, at: int) -> None:
        self.at = at

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == self.at:
            time.sleep(3600)


@HOOKS.register_module()
class PauseHook(Hook):
    """Makes a toy's run last: a pause before every iteration, in seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        time.sleep(self.seconds)
