"""Runs of MMEngine's FlexibleRunner can be resumed.

It writes its own count over the epoch that ``CheckpointHook`` hands over when validation finds a best score, so that
resuming skips one. FSDPStrategy passes the arguments of ``FSDP.optim_state_dict_to_load`` in the order of torch 2.0,
and saves only the optimizer's part of a wrapper's state. Here, in runs that use this package, the given epoch stays and
the state is kept whole; the arguments go by name in every run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from mmengine.runner import FlexibleRunner

from .checkpoint_hook import uses_mm_sharp
from .fix import Fix

_OWN = 'mm_sharp'  # in the state of our wrappers
_OPTIMIZER = ('state', 'param_groups')


class _GivenMeta(dict[str, Any]):
    """Keeps the epoch and the iteration that it was made with."""

    def update(self, *args: Any, **changes: Any) -> None:
        given = {key: self[key] for key in ('epoch', 'iter') if key in self}
        super().update(*args, **{**changes, **given})


def _keep_epoch(save_checkpoint: Callable[..., None]) -> Callable[..., None]:
    @wraps(save_checkpoint)
    def wrapper(self: Any, *args: Any, meta: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if meta is not None and uses_mm_sharp(self):
            meta = _GivenMeta(meta)
        save_checkpoint(self, *args, meta=meta, **kwargs)

    return wrapper


def _patch_fsdp() -> None:
    try:
        from mmengine._strategy import FSDPStrategy
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
    except ImportError:  # this torch or mmengine has no FSDP
        return
    save = FSDPStrategy.optim_state_dict

    @wraps(save)
    def optim_state_dict(self: Any) -> Any:
        whole = self.optim_wrapper.state_dict()
        if _OWN not in whole:
            return save(self)
        packed = FSDP.optim_state_dict(self.model, self.optim_wrapper, {key: whole[key] for key in _OPTIMIZER})
        return {**whole, **packed} if packed else packed  # empty where another process saves for all

    def load_optim_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        saved = {key: state_dict[key] for key in _OPTIMIZER if key in state_dict}
        arguments = {'model': self.model, 'optim': self.optim_wrapper.optimizer, 'optim_state_dict': saved}
        self.optim_wrapper.load_state_dict({**state_dict, **FSDP.optim_state_dict_to_load(**arguments)})

    FSDPStrategy.optim_state_dict, FSDPStrategy.load_optim_state_dict = optim_state_dict, load_optim_state_dict


@partial(Fix, 'resuming FlexibleRunner', 'an mmengine whose FlexibleRunner resumes exactly (none as of 0.10.7)')
def fix_resume(module: str) -> str:
    FlexibleRunner.save_checkpoint = _keep_epoch(FlexibleRunner.save_checkpoint)
    _patch_fsdp()
    return 'it would be resumed an epoch late, and under FSDPStrategy not at all'
