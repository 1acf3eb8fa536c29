"""A model as the processes train it: whole in each of them, synchronised by DDP, or in pieces, by FSDP."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from mmengine.dist import all_reduce_params
from mmengine.model import MMSeparateDistributedDataParallel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mm_sharp.ops.fsdp import Shards, local_shard, shards_of
from mm_sharp.ops.model_call import unwrap
from mm_sharp.ops.module_tree import ModuleTree
from mm_sharp.ops.perturbation import Norms

_NOTHING = nullcontext()


class ParallelModel:
    """The model of a training: attached once, resharded between the steps."""

    def __init__(self) -> None:
        self.shards: Shards | None = None  # its pieces; None if no part of it is sharded
        self.module: nn.Module = nn.Identity()  # the user's own model
        self.in_buckets = False  # whether gradients lie in the buckets that DDP averages
        self.finds_unused = False  # whether DDP looks for parameters that a pass does not use
        self.is_ddp = False  # whether the model is wrapped by DDP as a whole, or by MMEngine's that is of its class
        self.broadcasts = False  # whether DDP sends the first rank's buffers to the others
        self.model: nn.Module | None = None  # as optim_context gets it
        self.tree = ModuleTree(self.module)
        self.synchronised: list[Any] = []  # what averages gradients over the processes

    def attach(self, model: nn.Module) -> bool:
        """Find out how ``model``, as ``optim_context`` gets it, is parallel; returns whether it is another than before.

        Where it is sharded, its parameters are pieces afterwards.
        """
        if model is self.model:
            self.reshard()
            if not self.tree.unchanged():
                self.tree = ModuleTree(self.module)
            return False
        self.shards = shards_of(model)
        self.module = unwrap(model)
        self.tree = ModuleTree(self.module)
        self.synchronised = [] if self.shards is not None else _synchronised(model)
        self.in_buckets = any(getattr(part, 'gradient_as_bucket_view', False) for part in self.synchronised)
        self.finds_unused = any(getattr(part, 'find_unused_parameters', False) for part in self.synchronised)
        self.broadcasts = any(getattr(part, 'broadcast_buffers', False) for part in self.synchronised)
        self.is_ddp = isinstance(model, DistributedDataParallel)
        self.model = model
        return True

    def reshard(self, interrupted: bool = False) -> None:
        """Have the parameters be pieces, as they are between passes; ``interrupted``: one may have been broken off."""
        if self.shards is not None:
            self.shards.reshard(interrupted)

    def no_sync(self, active: bool) -> AbstractContextManager[Any]:
        """The context in which DDP leaves gradients alone, if ``active``.

        DDP decides in the forward whether the backward that follows is synchronised. Under FSDP every pass is: whole
        gradients, as it keeps them otherwise, are no pieces.
        """
        if not active or not self.synchronised:
            return _NOTHING
        contexts = ExitStack()
        for part in self.synchronised:
            contexts.enter_context(part.no_sync())
        return contexts

    @contextmanager
    def on_forward(self, call: Callable[[], None]) -> Iterator[None]:
        """Within, have ``call`` run when the first forward of what DDP wraps begins.

        That is after the first rank's buffers were sent to the others, which further forwards do not see again.
        """

        def once(*_: Any) -> None:
            handle.remove()
            call()

        assert isinstance(self.model, DistributedDataParallel)
        handle = self.model.module.register_forward_pre_hook(once, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    def pieces(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """What this process holds of parameters or gradients."""
        return list(tensors if self.shards is None else map(local_shard, tensors))

    def total(self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Tensor:
        """The sum over all parameters of a number that each piece of them has; scalar."""
        if self.shards is not None:
            return self.shards.total(parameters, values)
        return torch.stack([value.to(values[0]) for value in values]).sum() if values else torch.zeros(())

    def norms(
        self, parameters: Sequence[nn.Parameter], device: torch.device, perturbed: Sequence[nn.Parameter]
    ) -> Norms:
        """What takes the norms of ``parameters``, which have a gradient in this process: whole tensors', of pieces.

        ``device`` is where the norms are if there is none of them, ``perturbed`` what any process may have one of.
        """
        return Norms() if self.shards is None else self.shards.norms(parameters, device, perturbed)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average their gradients, of which a missing one counts as zero."""
        for parameter in parameters if self.synchronised else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.average([parameter.grad for parameter in parameters if parameter.grad is not None])

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Average tensors over the processes in place, as DDP does gradients; FSDP has done so already."""
        if self.synchronised and tensors:
            all_reduce_params(list(tensors), coalesce=True, op='mean')  # one all-reduce a dtype

    def parameters(self, others: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """The model's parameters and ``others``: all that a backward pass may write gradients to."""
        theirs = self.tree.parameters if self.shards is None else list(self.shards.parameters)
        return list({id(parameter): parameter for parameter in (*others, *theirs)}.values())


def _synchronised(model: nn.Module) -> list[Any]:
    """The outermost modules that synchronise gradients: ``model`` itself, or parts of it (``MMSeparateDDP``)."""
    # MMSeparateDistributedDataParallel is of DDP's class without being DDP: it has it around each of its children.
    if callable(getattr(model, 'no_sync', None)) and not isinstance(model, MMSeparateDistributedDataParallel):
        return [model]
    return [part for child in model.children() for part in _synchronised(child)]
