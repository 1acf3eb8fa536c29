"""Fully sharded models (FSDP): what this process holds of the parameters, and what all processes hold together.

Every process holds a piece of each parameter and of its averaged gradient. A perturbation works element by element on
the pieces, once one all-reduce of a number has given the norm of *all* pieces. Both of torch's kinds are known:

- FSDP1, ``FullyShardedDataParallel``, and MMEngine's ``MMFullyShardedDataParallel``: the model is wrapped, and its
  parameters are views of a flat one's piece between the passes, of the whole one in a pass;
- FSDP2, ``fully_shard``: the model's parameters are DTensors between the passes, and others in a pass.

So whatever asks for names, or writes to parameters, does it between the passes (:meth:`Shards.reshard`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size
from torch import Tensor, nn

from mm_sharp.ops.perturbation import Norms, global_norm, tensor_norms

_PLAIN = frozenset({Tensor, nn.Parameter})


def is_flat_wrapper(module: nn.Module) -> bool:
    """Whether ``module`` is FSDP1's wrapper of another."""
    return any(cls.__name__ == 'FullyShardedDataParallel' for cls in type(module).__mro__)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP, of either kind, was applied to ``module`` itself."""
    return any(cls.__name__ in ('FullyShardedDataParallel', 'FSDPModule') for cls in type(module).__mro__)


def local_shard(tensor: Tensor) -> Tensor:
    """This process's piece of ``tensor``, sharing its memory; ``tensor`` itself unless it is a DTensor."""
    if type(tensor) in _PLAIN or not hasattr(tensor, 'to_local'):
        return tensor
    with torch.no_grad():  # with gradients the piece would be a new tensor every time
        piece: Tensor = tensor.to_local()
    return piece


def any_rank(flag: Tensor) -> Tensor:
    """Whether the scalar ``flag``, on the device of communication, is True in any process; all of them must ask."""
    together = flag.to(torch.float32)
    all_reduce(together, 'max')
    return together > 0


def shards_of(model: nn.Module) -> Shards | None:
    """The pieces of ``model`` in this process; None if no part of it is sharded."""
    return Shards(model) if any(map(is_sharded, model.modules())) else None


class Shards:
    """The pieces in this process of a model, as ``optim_context`` gets it. All processes must take part in all steps.

    Attributes:
        parameters: All of the model's parameters, as pieces.
        flat: Whether flat parameters stand for the model's own (FSDP1 with ``use_orig_params=False``).
        offloads: Whether FSDP1 keeps the pieces on the CPU.
    """

    def __init__(self, model: nn.Module) -> None:
        self._wrappers: list[Any] = [module for module in model.modules() if is_flat_wrapper(module)]
        marked = [module for module in model.modules() if is_sharded(module)]
        self._modules: list[Any] = [module for module in marked if not is_flat_wrapper(module)]
        self.flat = any(not wrapper._use_orig_params for wrapper in self._wrappers)
        self.offloads = any(wrapper.cpu_offload.offload_params for wrapper in self._wrappers)
        self.reshard()
        self.parameters = list(model.parameters())
        self._parts = self._distinct_parts()

    def norms(self, parameters: Sequence[Tensor], device: torch.device, among: Sequence[Tensor] = ()) -> ShardNorms:
        """What takes the norms of whole tensors, given this process's pieces of ``parameters``.

        ``device`` is where a process without a single tensor has the norms; ``among``, for norms of single tensors,
        what any process may have pieces of, the same in all of them.
        """
        places = {id(parameter): place for place, parameter in enumerate(among)}
        own = [places[id(parameter)] for parameter in parameters] if among else []
        pieces = list(map(local_shard, among))
        return ShardNorms(self._weights(parameters), pieces, self._weights(among), own, device)

    @torch.no_grad()
    def total(self, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """The sum over all processes of ``values``, scalars of their pieces of ``parameters``; all must call it."""
        device = values[0].device if values else self.parameters[0].device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for weight, value in zip(self._weights(parameters), values, strict=True):
            total += weight * value.to(total)
        all_reduce(total)
        return total.to(torch.float32)

    def _weights(self, parameters: Sequence[Tensor]) -> list[float]:
        """By how much to multiply what is summed over processes: a piece that several hold counts once."""
        return [self._parts.get(id(parameter), 1) / get_world_size() for parameter in parameters]

    @torch.no_grad()
    def clip_(
        self,
        parameters: Sequence[nn.Parameter],
        device: torch.device,
        *,
        max_norm: float | None = None,
        clip_value: float | None = None,
        error_if_nonfinite: bool = False,
        **_: Any,
    ) -> Tensor | None:
        """Clip gradients as torch does those of whole tensors; returns the norm before, None when clipping by value."""
        pairs = [(parameter, local_shard(parameter.grad)) for parameter in parameters if parameter.grad is not None]
        gradients = [gradient for _, gradient in pairs]
        if max_norm is None:
            assert clip_value is not None, 'check_clip_grad has looked'
            for gradient in gradients:
                gradient.clamp_(-clip_value, clip_value)
            return None
        norm = self.norms([parameter for parameter, _ in pairs], device).of_all(gradients)
        if error_if_nonfinite and not bool(torch.isfinite(norm)):
            raise RuntimeError(f'clip_grad: the norm of the gradient is {norm.item()}, and error_if_nonfinite=True')
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device, gradient.dtype))
        return norm

    def share_overflow(self, scaler: Any, optimizer: Any) -> None:
        """Share among the processes' ``GradScaler``, which have just unscaled, whether a gradient overflowed."""
        found: dict[torch.device, Tensor] = scaler._per_optimizer_states[id(optimizer)]['found_inf_per_device']
        if not found:  # a process without any gradient: torch asks for an entry
            device = scaler._scale.device
            found[device] = torch.zeros(1, device=device)
        overflow = any_rank(torch.stack([flag.reshape(()).to(scaler._scale.device) for flag in found.values()]).any())
        for flag in found.values():
            flag.fill_(overflow.to(flag.device, flag.dtype).reshape(()))

    def reshard(self, interrupted: bool = False) -> None:
        """Make the parameters pieces again, after a forward without a backward pass or an error (``interrupted``).

        Otherwise torch would go on with the whole parameters that it has gathered before. No communication.
        """
        for wrapper in self._wrappers:
            _reshard_flat(wrapper, interrupted)
        for module in self._modules:
            _reshard_module(module, interrupted)

    def _distinct_parts(self) -> dict[int, int]:
        """By ``id`` of a parameter, into how many different pieces it is cut; others are whole everywhere."""
        parts: dict[int, int] = {}
        for wrapper in self._wrappers:
            handle = wrapper._handle
            if handle is None or not handle.uses_sharded_strategy:
                continue
            flat = handle.flat_param
            held = (*(flat._params or ()), *(flat._shared_params or ())) if wrapper._use_orig_params else (flat,)
            parts.update((id(parameter), wrapper.process_group.size()) for parameter in held)
        sliced: list[Any] = [parameter for parameter in self.parameters if hasattr(parameter, 'to_local')]
        for parameter in sliced:
            cuts = enumerate(parameter.placements)
            sizes = [parameter.device_mesh.size(axis) for axis, place in cuts if not place.is_replicate()]
            parts[id(parameter)] = math.prod(sizes)
        return parts


@dataclass(frozen=True)
class ShardNorms(Norms):
    """Takes the norms of whole tensors, of which this process has pieces.

    All processes must ask, with pieces or without: one all-reduce gives them all the same, bit for bit.
    """

    # Of the tensors that are to be asked of: by how much to multiply what is summed over processes.
    weights: Sequence[float]
    # Of all parameters that any process may have a gradient of, in the same order in all processes, for the norms of
    # single tensors; of these, the same as ``weights``; and which of these the tensors are that are to be asked of.
    pieces: Sequence[Tensor]
    piece_weights: Sequence[float]
    places: Sequence[int]
    device: torch.device  # where a process without a single tensor has the norms

    def of_all(self, tensors: Sequence[Tensor]) -> Tensor:
        """The 2-norm of all of them together; scalar."""
        total = torch.zeros((), dtype=torch.float64, device=tensors[0].device if tensors else self.device)
        for weight in dict.fromkeys(self.weights):
            members = [t for t, w in zip(tensors, self.weights, strict=True) if w == weight]
            # A piece that several processes hold counts once. In double precision squares do not overflow.
            total += weight * global_norm(members).to(total).square()
        all_reduce(total)
        return _narrow(total.sqrt(), tensors)

    def of_each(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The 2-norms of each of the parameters that any process may have a gradient of, and of those."""
        device = gradients[0].device if gradients else self.device
        # All of the weights, though a process may lack the gradient of a piece.
        pieces = [piece.to(device) for piece in self.pieces]
        for place, parameter in zip(self.places, parameters, strict=True):
            pieces[place] = parameter
        of_gradients: list[Tensor] = [torch.zeros((), dtype=torch.float64, device=device)] * len(pieces)
        if gradients:
            for place, norm in zip(self.places, tensor_norms(gradients).double().unbind(), strict=True):
                of_gradients[place] = norm
        both = [*tensor_norms(pieces).double().unbind(), *of_gradients]
        # Numbers of the host, so that the device is not waited for.
        roots = [weight**0.5 for weight in self.piece_weights]
        squares = torch.stack(torch._foreach_mul(both, roots * 2)).square()
        all_reduce(squares)
        of_weights, of_all_gradients = _narrow(squares.sqrt(), gradients).chunk(2)
        return of_weights, of_all_gradients

    def own(self, values: Tensor) -> Tensor:
        """Of ``values``, one for each norm of :meth:`of_each`, those of this process's pieces."""
        if len(self.places) == len(values):
            return values
        each = values.unbind()
        return torch.stack([each[place] for place in self.places]) if self.places else values[:0]


def _narrow(norms: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Norms in float32, unless tensors are in double precision."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return norms.to(torch.float64 if wide else torch.float32)


def _reshard_flat(wrapper: Any, interrupted: bool) -> None:
    """Reshard FSDP1's wrapper; the outermost one stands for all within it."""
    if not wrapper._is_root:  # None until the first forward
        return
    handles = [handle for handle in wrapper._all_handles if handle.uses_sharded_strategy]
    if interrupted or not all(handle.needs_unshard() for handle in handles):
        from torch.distributed.fsdp._runtime_utils import _post_backward_final_callback

        # What ends every backward pass: frees the whole parameters and gets everything ready for the next forward.
        _post_backward_final_callback(wrapper, wrapper)


def _reshard_module(module: Any, interrupted: bool) -> None:
    """Reshard one of FSDP2's modules."""
    state = module._get_fsdp_state()
    if interrupted and hasattr(module, 'reset_iter_state'):
        if state._is_root:
            module.reset_iter_state()
        return
    if interrupted:  # before torch 2.13
        group, idle = state._fsdp_param_group, type(state._training_state).IDLE
        state._training_state = idle
        state._state_ctx.iter_forward_root, state._state_ctx.post_backward_final_callback_queued = None, False
        if group is not None:
            group.wait_for_unshard()  # weights fetched ahead would be taken for the next pass's
            group._training_state = idle
            group._post_forward_indices.clear()
            group.comm_ctx.post_forward_order.clear()
    module.reshard()
