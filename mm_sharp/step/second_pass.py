"""The captured call again, at other weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_sharp.ops.call_inputs import fresh
from mm_sharp.ops.forward_state import ForwardState
from mm_sharp.ops.model_call import ModelCall, loss_of
from mm_sharp.ops.precision import Precision
from mm_sharp.samples.keys import without_keys
from mm_sharp.step.parallel import ParallelModel


class SecondPass:
    """Runs captured calls again; with ``replay_rng`` every forward draws the random numbers that the first one drew.

    ``synchronise``: whether DDP averages the gradients of the next backward pass.
    """

    def __init__(self, parallel: ParallelModel, precision: Precision, state: ForwardState, replay_rng: bool) -> None:
        self._parallel = parallel
        self._precision = precision
        self._state = state
        self._replay_rng = replay_rng
        self.synchronise = True

    def loss(self, call: ModelCall) -> Tensor:
        """The loss of ``call`` at the weights as they are now, with the first pass's random draws."""
        return self._loss(call, self.synchronise)

    def loss_without_gradient(self, call: ModelCall) -> Tensor:
        """The same without communication; the next forward starts from the state that this one has started from."""
        with torch.no_grad():
            loss = self._loss(call, synchronise=False)
        self._state.rewind_again()
        return loss

    def try_forward(self, call: ModelCall) -> Any:
        """What the model returns for ``call`` before the first forward, without a trace."""
        args, kwargs = fresh(without_keys(call.model, call.args, call.kwargs), copies=True)
        parallel = self._parallel
        # DDP would count the forward, and send buffers around.
        run = call.model if parallel.shards is not None else parallel.module.forward
        self._state.snapshot(parallel.tree, sharded=parallel.shards is not None, broadcast=parallel.broadcasts)
        try:
            with torch.no_grad():
                return run(*args, **kwargs)
        finally:
            parallel.reshard()
            self._state.undo()
            call.random_state.restore()

    def _loss(self, call: ModelCall, synchronise: bool) -> Tensor:
        # Casts of the weights that an enclosing autocast region cached are those of other weights.
        torch.clear_autocast_cache()
        if self._replay_rng:
            call.random_state.restore()
        with self._parallel.no_sync(not synchronise), self._precision.autocast():
            output = call.replay()
        return loss_of(call, output)
