"""Record one training forward of a model, and run it again.

MMEngine's ``train_step`` runs ``optim_context(model)`` around pre-processing and forward, and then hands over a scalar.
The hooks here see the model call itself, after pre-processing, so that both passes work on the same augmented batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.model import BaseModel, is_model_wrapper
from torch import Tensor, nn

from mm_sharp.ops.call_inputs import InputSnapshot, SharedInputs, fresh
from mm_sharp.ops.fsdp import is_flat_wrapper
from mm_sharp.ops.rare_changes import RareChanges
from mm_sharp.ops.rng import RandomState

RIGHT_FORM = (
    "    with optim_wrapper.optim_context(model):\n        losses = model(inputs, data_samples, mode='loss')\n"
    '    optim_wrapper.update_params(model.parse_losses(losses)[0])'
)


@dataclass
class ModelCall:
    """One call ``output = model(*args, **kwargs)``, with the arguments as they were before it."""

    model: nn.Module  # DDP's or FSDP's wrapper where there is one
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random_state: RandomState  # just before the call; NumPy's and Python's only where the model may use them
    may_write: bool = False  # whether the model may write to tensors and arrays among the arguments
    shared: SharedInputs | None = None  # what all passes of this step have in common
    output: Any = None

    def replay(self) -> Any:
        """Call the model again; it gets containers of its own, and tensors of its own where it may write to them."""
        memo = {} if self.shared is None else self.shared.begin_pass()
        args, kwargs = fresh((self.args, self.kwargs), self.may_write, memo=memo)
        try:
            return self.model(*args, **kwargs)
        finally:
            if self.shared is not None:
                self.shared.end_pass()


class CallRecorder:
    """Records the one call of a model within a context; ``call`` is None if there was none, or it has failed."""

    def __init__(self) -> None:
        self.call: ModelCall | None = None
        self.is_open = False
        self._inputs = InputSnapshot()
        self._other_draws = RareChanges()  # of NumPy's and Python's generators
        self._depth = 0

    def random_state_now(self, call: ModelCall, devices: tuple[torch.device, ...]) -> RandomState:
        """The random state after the call's forward, of the generators that ``call.random_state`` holds."""
        state = RandomState.capture(devices, all_libraries=call.random_state.numpy is not None)
        if not state.same_beyond_torch(call.random_state):
            self._other_draws.seen()
        return state

    @contextmanager
    def record(
        self, model: nn.Module, devices: tuple[torch.device, ...], on_call: Callable[[ModelCall], ModelCall]
    ) -> Iterator[None]:
        """Record the call of ``model`` in this context, which may call itself but must not be called twice.

        ``on_call`` sees the call before it runs, with the random state of ``devices``, and returns the call that runs
        instead, such as one on a part of the batch.
        """
        self.call, self._depth, self.is_open = None, 0, True
        at_first: list[RandomState] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._depth += 1
            if self._depth > 1:
                return None
            if self.call is not None:
                raise RuntimeError(_called_twice(model))
            random_state = RandomState.capture(devices, all_libraries=self._other_draws.next_step())
            at_first.append(random_state)
            call = on_call(ModelCall(model, args, kwargs, random_state))
            given = call.args, call.kwargs
            (call.args, call.kwargs), call.may_write, call.shared = self._inputs.take(given)
            self.call = call
            return given

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._depth -= 1
            if self._depth == 0 and self.call is not None:
                self._inputs.check()
                self.call.output = fresh(output, copies=False)
                if output is None:  # the call has failed, and may be tried again
                    self.call = None

        handles = [
            # Before the user's own hooks, which run in every pass, and after them.
            model.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
            # Also where a call fails: a model may catch the error of a call within its own.
            model.register_forward_hook(after, with_kwargs=True, always_call=True),
        ]
        try:
            yield
        except BaseException:
            self.call = None
            if at_first:
                at_first[0].restore()
            raise
        finally:
            self.is_open = False
            for handle in handles:
                handle.remove()

    def take(self) -> ModelCall | None:
        """The recorded call, which is then forgotten here."""
        call, self.call = self.call, None
        return call


def _called_twice(model: nn.Module) -> str:
    return (
        f'{type(unwrap(model)).__name__} was called twice in one optim_context: a second pass could not tell which '
        'call the loss comes from. Put everything that the loss needs into one forward (model(..., mode="loss")), or '
        f'use one optim_context and update_params for each call:\n{RIGHT_FORM}'
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The user's model inside DDP, FSDP, ``torch.compile`` and the like."""
    while True:
        # The other one is torch's OptimizedModule, whose class takes seconds to import.
        inner = model.module if _wraps(model) else model._modules.get('_orig_mod')
        if not isinstance(inner, nn.Module):
            return model
        model = inner


_wrapping: dict[type, bool] = {}


def _wraps(model: nn.Module) -> bool:
    kind = type(model)
    if kind not in _wrapping:
        _wrapping[kind] = is_model_wrapper(model) or is_flat_wrapper(model)
    return _wrapping[kind]


def has_own_parse_losses(model: nn.Module) -> bool:
    """Whether a model adds its losses up in its own way, which may keep state from call to call."""
    parse_losses = getattr(model, 'parse_losses', None)
    return parse_losses is not None and getattr(parse_losses, '__func__', None) is not BaseModel.parse_losses


def loss_of(call: ModelCall, output: Any) -> Tensor:
    """The scalar that ``train_step`` makes of a model's output: ``parse_losses`` of a dict, or the mean of a tensor."""
    if isinstance(output, Tensor):
        return output.mean()
    model = unwrap(call.model)
    parse_losses = getattr(model, 'parse_losses', None)
    if isinstance(output, dict) and callable(parse_losses):
        loss: Tensor = parse_losses(output)[0]
        return loss
    raise TypeError(
        f'{type(model).__name__} returned {type(output).__name__} within optim_context: a second pass needs a loss '
        "that can be computed again. Return a dict of losses (mode='loss') from a model that derives from "
        'mmengine.model.BaseModel, or the loss itself as a tensor.'
    )
