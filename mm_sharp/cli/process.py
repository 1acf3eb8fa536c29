"""How a command line's run is built, and how its process ends: after Ctrl-C, on a full disk, with its parent or group.

SIGTERM ends a training run at once: a checkpoint is whole at any time (:mod:`mm_sharp.compat.atomic_writes`), and the
run goes on with ``--resume``.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import FlexibleRunner, Runner

from mm_sharp.compat import CheckpointWriteError
from mm_sharp.errors import UsageError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
INTERRUPTED, NOT_WRITTEN = 130, 1  # 128 + SIGINT, as shells have it
# What the strategies' model wrappers need on the CPU: by default MMEngine puts the model on a GPU.
_ON_CPU: dict[str, dict[str, Any]] = {
    'FSDPStrategy': {'type': 'MMFullyShardedDataParallel', 'device_id': 'cpu'},
    'DDPStrategy': {'type': 'MMDistributedDataParallel', 'device_ids': None, 'broadcast_buffers': False},
}


class StoppedError(Exception):
    """The program ends with a line, which says how to go on, and an exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def ending(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit code with which a program ends after an error; None if the error is a bug."""
    if isinstance(error, StoppedError):
        return str(error), error.code
    if _interrupted(error):
        return 'interrupted', INTERRUPTED
    if isinstance(error, CheckpointWriteError) or (isinstance(error, OSError) and error.errno in _NO_ROOM):
        what = f" '{error.filename}'" if error.filename else ''  # what is written to an open file has none
        return f'error: cannot write{what}: {error.strerror}', NOT_WRITTEN
    return None


@contextmanager
def say_how_to_go_on(last_checkpoint: Callable[[], str | None]) -> Iterator[None]:
    """Within, a training run that Ctrl-C or a full disk ends raises a :class:`StoppedError` that says how to go on."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        end = ending(error)
        if end is None:
            raise
        message, code = end
        newest = last_checkpoint()
        if newest is None:
            raise StoppedError(f'{message}; there is no checkpoint yet', code) from error
        room = '' if code == INTERRUPTED else 'make room, and '
        raise StoppedError(f'{message}; {room}go on from {newest} with --resume', code) from error


def end_with_parent() -> None:
    """Have this process end by SIGTERM soon after the one that started it, not write on into a resumed run's folder."""
    threading.Thread(target=_watch, args=(os.getppid(),), name='launcher watch', daemon=True).start()


def end_process_group() -> None:
    """End gloo's process group after a tool that has succeeded; one that failed may have collectives in flight.

    A thread of gloo's that frees tensors while the interpreter shuts down aborts the process.
    """
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_backend() == 'gloo':
        gc.collect()  # a runner is part of reference cycles, and DDP in it holds the group
        group.destroy_process_group()


def _watch(parent: int) -> None:
    while os.getppid() == parent:  # a process whose parent has ended gets another
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C came first: MMEngine's Config, for one, makes a SyntaxError of it while it formats its text."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def build_runner(cfg: Config) -> Any:
    """MMEngine's ``Runner``, or what ``runner_type`` names, with what the config's ``strategy`` needs on the CPU."""
    kind = cfg.get('runner_type', 'Runner')
    found = RUNNERS.get(kind) if isinstance(kind, str) else kind
    if found is None:
        raise UsageError(f"runner_type={kind!r} is not registered: write runner_type='FlexibleRunner', or take it out")
    if not issubclass(found, FlexibleRunner):
        if cfg.get('strategy'):
            raise UsageError("strategy is for MMEngine's FlexibleRunner alone: write runner_type = 'FlexibleRunner'")
        if cfg.get('load_from') and Path(cfg.load_from).is_dir():
            raise UsageError(
                f"'{cfg.load_from}' is a folder of parts, saved under FSDP: load it with the runner_type and strategy "
                "that saved it, or save whole weights, by strategy=dict(state_dict_cfg='full')"
            )
        return Runner.from_cfg(cfg) if found is Runner else RUNNERS.build(cfg)
    strategy = cfg.get('strategy') or {}
    name = strategy.get('type')
    if name in _ON_CPU and get_device() == 'cpu':
        cfg.strategy = {**strategy, 'model_wrapper': {**_ON_CPU[name], **(strategy.get('model_wrapper') or {})}}
    if cfg.get('env_cfg') is None:  # FlexibleRunner takes what Runner has a default for
        cfg.env_cfg = {'dist_cfg': {'backend': 'gloo' if get_device() == 'cpu' else 'nccl'}}
    return RUNNERS.build(cfg)
