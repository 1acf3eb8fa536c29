"""The captured call again, at other weights, without a trace in the model (ours)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mm_sharp.module_state import ModuleStateBackup
from mm_sharp.parallel_model import ParallelModel
from mm_sharp.replay import ModelCall, loss_of, unwrap

if TYPE_CHECKING:
    from mm_sharp.two_pass import TwoPassOptimWrapper


class SecondPass:
    """Runs captured calls again; buffers and counters stay what the first pass has left.

    Args:
        parallel: The model that is called.
    """

    def __init__(self, parallel: ParallelModel) -> None:
        self._parallel = parallel
        self._between = ModuleStateBackup()

    def begin(self, model: nn.Module) -> None:
        """Keep the state of ``model``, the user's own, between the passes."""
        self._between.save(model)

    def end(self) -> None:
        """Put back what was kept."""
        self._between.restore()

    def drop(self) -> None:
        """Forget what was kept."""
        self._between.drop()

    def loss(self, wrapper: TwoPassOptimWrapper, call: ModelCall) -> Tensor:
        """The loss of ``call`` at the weights as they are now, with the first pass's random draws."""
        # Casts of the weights that an enclosing autocast region cached are those of other weights.
        torch.clear_autocast_cache()
        if wrapper.replay_rng:
            call.random_state.restore()
        with self._parallel.no_sync(call.model, not wrapper.should_sync()), wrapper.precision.autocast():
            output = call.replay()
        return loss_of(call, output)

    def loss_without_gradient(self, wrapper: TwoPassOptimWrapper, call: ModelCall) -> Tensor:
        """The same, leaving no trace at all: no communication, and buffers as :meth:`begin` found them."""
        with torch.no_grad(), self._parallel.no_sync(call.model, True):
            loss = wrapper.forward_again(call)
        self._between.restore()
        self._between.save(unwrap(call.model))
        return loss
