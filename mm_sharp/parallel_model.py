"""A model as the processes train it: whole in each of them, synchronised by DDP, or in pieces, by FSDP (ours)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from mm_sharp.module_state import submodules
from mm_sharp.parameters import parameters_of, trained_by
from mm_sharp.replay import unwrap
from mm_sharp.shards import Shards, shards_of
from mm_sharp.support import check_shards

if TYPE_CHECKING:
    from mm_sharp.two_pass import TwoPassOptimWrapper


class ParallelModel:
    """The model of a training: looked at once, settled between the steps.

    Attributes:
        shards: Its pieces; None if no part of it is sharded.
    """

    def __init__(self) -> None:
        self.shards: Shards | None = None
        self._model: nn.Module | None = None

    def look_at(self, wrapper: TwoPassOptimWrapper, model: nn.Module) -> None:
        """Find out whether ``model`` is sharded, once, and have its parameters be pieces.

        Args:
            wrapper: The optimizer wrapper.
            model: The model as ``optim_context`` gets it.

        Raises:
            NotImplementedError: It is, in a way that an argument of ``wrapper`` does not go with.
            ValueError: The same of an argument that another value can replace.
        """
        if model is self._model:
            self.settle()
            return
        self.shards = shards_of(model)
        wrapper.precision.share_overflow = None if self.shards is None else self.shards.share_overflow
        if self.shards is not None:
            check_shards(wrapper, self.shards)
            # In a pass, the parameters that have the names may be others.
            wrapper.selector.select(unwrap(model), trained_by(wrapper.optimizer))
        self._model = model

    def settle(self, error: type[BaseException] | None = None, *_: object) -> None:
        """Have the parameters be pieces, as the exit of a context in which a pass may have been broken off."""
        if self.shards is not None:
            self.shards.settle(broken_off=error is not None)

    def no_sync(self, model: nn.Module, active: bool) -> AbstractContextManager[Any]:
        """The context in which DDP leaves gradients alone, if ``active``.

        DDP decides in the forward whether the backward that follows is synchronised. Under FSDP every pass is: whole
        gradients, as it keeps them otherwise, are no pieces.
        """
        no_sync = getattr(model, 'no_sync', None) if self.shards is None else None
        return no_sync() if active and callable(no_sync) else nullcontext()

    def clip_gradients(self, wrapper: TwoPassOptimWrapper) -> None:
        """Clip the gradients of a sharded model as ``clip_grad`` says: by the whole one's norm, and not the piece's."""
        assert self.shards is not None, 'elsewhere MMEngine clips'
        norm = self.shards.clip_(trained_by(wrapper.optimizer), wrapper.device, **wrapper.clip_grad_kwargs)
        if norm is not None:
            wrapper.message_hub.update_scalar('train/grad_norm', float(norm))

    def parameters(self, model: nn.Module, optimizer: Optimizer) -> list[nn.Parameter]:
        """The optimizer's parameters and the model's: all that a backward pass may write gradients to."""
        if self.shards is None:
            theirs = [p for m in submodules(model) for p in m._parameters.values() if p is not None]
        else:
            theirs = list(self.shards.parameters)
        members = {id(p): p for p in (*parameters_of(optimizer), *theirs)}
        return list(members.values())
