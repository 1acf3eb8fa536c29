"""The optimizer's state under MMEngine's FSDPStrategy.

Cause: torch 2.1 changed the order of the arguments of ``FSDP.optim_state_dict_to_load``, and FSDPStrategy passes them
in the old one: no run under FSDP can be resumed. Besides, what it saves and loads of an optimizer wrapper's state is
what torch knows of it, the optimizer's: loss scale and history are lost.

Repair: the arguments go by name. The state of our wrappers is kept whole; that of others stays as MMEngine has it.

Ends with: an mmengine that resumes under FSDP and keeps the optimizer wrapper's state (none as of 0.10.7).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from .fix import Fix

_NAME = 'resuming under FSDP'
_ENDS = "an mmengine whose FSDPStrategy keeps an optimizer wrapper's state (none as of 0.10.7)"
_OWN = 'mm_sharp'
_OPTIMIZER = ('state', 'param_groups')


def install() -> None:
    """Wrap the two methods of FSDPStrategy; a second call changes nothing, and without FSDP there is nothing to do."""
    strategy = _strategy()
    if strategy is None or hasattr(strategy.optim_state_dict, '__wrapped__'):
        return
    strategy.optim_state_dict = _saving(strategy.optim_state_dict)
    strategy.load_optim_state_dict = _loading(strategy.load_optim_state_dict)


def describe() -> Fix:
    """Active wherever there is an FSDPStrategy."""
    strategy = _strategy()
    if strategy is None:
        return Fix(_NAME, False, 'this torch or mmengine has no FSDP', _ENDS)
    reason = "FSDPStrategy drops our wrappers' state" + (', and cannot resume on this torch' if _order_is_new() else '')
    return Fix(_NAME, hasattr(strategy.optim_state_dict, '__wrapped__'), reason, _ENDS)


def _strategy() -> Any:
    try:
        from mmengine._strategy import FSDPStrategy
    except ImportError:
        return None
    return FSDPStrategy


def _order_is_new() -> bool:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return next(iter(inspect.signature(FullyShardedDataParallel.optim_state_dict_to_load).parameters)) == 'model'


def _saving(theirs: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    @functools.wraps(theirs)
    def optim_state_dict(self: Any) -> dict[str, Any]:
        whole = self.optim_wrapper.state_dict()
        if _OWN not in whole:
            return theirs(self)
        from torch.distributed.fsdp import FullyShardedDataParallel

        packed: dict[str, Any] = FullyShardedDataParallel.optim_state_dict(
            self.model, self.optim_wrapper, {key: whole[key] for key in _OPTIMIZER}
        )
        # Empty where another process saves for all.
        return {**packed, **_rest(whole)} if packed else packed

    return optim_state_dict


def _loading(theirs: Callable[[Any, dict[str, Any]], None]) -> Callable[[Any, dict[str, Any]], None]:
    @functools.wraps(theirs)
    def load_optim_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        if not _order_is_new() and _OWN not in state_dict:
            theirs(self, state_dict)
            return
        from torch.distributed.fsdp import FullyShardedDataParallel

        loadable = FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model,
            optim=self.optim_wrapper.optimizer,
            optim_state_dict={key: state_dict[key] for key in _OPTIMIZER if key in state_dict},
        )
        self.optim_wrapper.load_state_dict({**loadable, **_rest(state_dict)})

    return load_optim_state_dict


def _rest(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in _OPTIMIZER}
