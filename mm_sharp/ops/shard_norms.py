"""Norms of whole tensors, of which every process holds a piece (FSDP)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mmengine.dist import all_reduce
from torch import Tensor

from mm_sharp.ops.perturbation import Norms, global_norm, tensor_norms


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
