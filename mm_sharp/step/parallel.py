"""A model as the processes train it: whole in each of them, synchronised by DDP, or in pieces, by FSDP (ours)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from mmengine.model import MMSeparateDistributedDataParallel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from mm_sharp.ops.fsdp import Shards, shards_of
from mm_sharp.ops.model_call import unwrap
from mm_sharp.ops.module_state import submodules
from mm_sharp.ops.parameters import parameters_of, trained_by
from mm_sharp.step.checks import check_shards

if TYPE_CHECKING:
    from mm_sharp.step.two_pass import TwoPassOptimWrapper


class ParallelModel:
    """The model of a training: looked at once, settled between the steps.

    Attributes:
        shards: Its pieces; None if no part of it is sharded.
        in_buckets: Whether gradients lie in the buckets that DDP averages.
    """

    def __init__(self) -> None:
        self.shards: Shards | None = None
        self.in_buckets = False
        self._model: nn.Module | None = None
        self._synchronised: list[Any] = []

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
        self._synchronised = [] if self.shards is not None else _synchronised(model)
        self.in_buckets = any(getattr(part, 'gradient_as_bucket_view', False) for part in self._synchronised)
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

    @property
    def averages(self) -> bool:
        """Whether DDP, or another wrapper that knows ``no_sync()``, averages the gradients over the processes."""
        return bool(self._synchronised)

    def no_sync(self, active: bool) -> AbstractContextManager[Any]:
        """The context in which DDP leaves gradients alone, if ``active``.

        DDP decides in the forward whether the backward that follows is synchronised. Under FSDP every pass is: whole
        gradients, as it keeps them otherwise, are no pieces.
        """
        if not active or not self._synchronised:
            return nullcontext()
        contexts = ExitStack()
        for part in self._synchronised:
            contexts.enter_context(part.no_sync())
        return contexts

    @contextmanager
    def on_forward(self, model: nn.Module, call: Callable[[nn.Module], None]) -> Iterator[None]:
        """Within, have ``call`` get the user's own model when its first forward begins.

        Under DDP that is after the first rank's buffers were sent to the others, which further forwards are not.
        """
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        assert isinstance(inner, nn.Module)

        def once(*_: Any) -> None:
            handle.remove()
            call(unwrap(inner))

        handle = inner.register_forward_pre_hook(once, prepend=True)
        try:
            yield
        finally:
            handle.remove()

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


def _synchronised(model: nn.Module) -> list[Any]:
    """The outermost modules that synchronise gradients: ``model`` itself, or parts of it (``MMSeparateDDP``)."""
    # MMSeparateDistributedDataParallel is of DDP's class without being DDP: it has it around each of its children.
    if callable(getattr(model, 'no_sync', None)) and not isinstance(model, MMSeparateDistributedDataParallel):
        return [model]
    return [part for child in model.children() for part in _synchronised(child)]
