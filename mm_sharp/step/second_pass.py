"""The captured call again, at other weights (ours)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm_sharp.ops.forward_state import ForwardState
from mm_sharp.ops.model_call import ModelCall, loss_of
from mm_sharp.step.parallel import ParallelModel

if TYPE_CHECKING:
    from mm_sharp.step.two_pass import TwoPassOptimWrapper


class SecondPass:
    """Runs captured calls again.

    Args:
        parallel: The model that is called.
        state: What its forward passes change in it.
    """

    def __init__(self, parallel: ParallelModel, state: ForwardState) -> None:
        self._parallel = parallel
        self._state = state

    def loss(self, wrapper: TwoPassOptimWrapper, call: ModelCall) -> Tensor:
        """The loss of ``call`` at the weights as they are now, with the first pass's random draws."""
        # Casts of the weights that an enclosing autocast region cached are those of other weights.
        torch.clear_autocast_cache()
        if wrapper.replay_rng:
            call.random_state.restore()
        with self._parallel.no_sync(not wrapper.should_sync()), wrapper.precision.autocast():
            output = call.replay()
        return loss_of(call, output)

    def loss_without_gradient(self, wrapper: TwoPassOptimWrapper, call: ModelCall) -> Tensor:
        """The same without communication; the next forward starts from the state that this one has started from."""
        with torch.no_grad(), self._parallel.no_sync(True):
            loss = wrapper.forward_again(call)
        self._state.again()
        return loss
