"""The climb of a step: which parameters it moves, and the exact way back (ours).

:func:`mm_sharp.ops.perturbation.climb` has the mathematics; here is what a step keeps in order to call it and to undo
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mm_sharp.ops.all_reduce import average_gradients
from mm_sharp.ops.frozen_params import FrozenParams
from mm_sharp.ops.fsdp import local_shard
from mm_sharp.ops.perturbation import TensorBackup, climb, global_norm
from mm_sharp.ops.quantized_perturbation import QuantizedPerturbation
from mm_sharp.step.checks import check_perturbed
from mm_sharp.step.parallel import ParallelModel

if TYPE_CHECKING:
    from mm_sharp.step.two_pass import TwoPassOptimWrapper


class Ascent:
    """Moves the perturbed parameters from ``w`` to ``w + e``, and back.

    In the order of a step: :meth:`choose`, the first forward, :meth:`switch_on`, :meth:`backward`, :meth:`climb`, the
    second pass, :meth:`take_back`. The last one and :meth:`switch_on` do nothing where there is nothing to undo.

    Args:
        parallel: The model that holds the parameters.
    """

    def __init__(self, parallel: ParallelModel) -> None:
        self._parallel = parallel
        self._perturbed: Sequence[nn.Parameter] = ()
        self._scale = 1.0
        self._skipped: list[nn.Parameter] = []
        self._without_gradient = FrozenParams()
        self._weights = TensorBackup()
        self._quantized = QuantizedPerturbation()

    def choose(self, perturbed: Sequence[nn.Parameter], scale: float, *, skip: Sequence[nn.Parameter]) -> None:
        """Settle what this step perturbs, just before its first forward.

        Args:
            perturbed: The parameters.
            scale: Factor on the perturbation.
            skip: Those of them that are not perturbed get no gradient in the first pass, from now on.
        """
        self._perturbed, self._scale = perturbed, scale
        kept = set(map(id, perturbed))
        self._skipped = [parameter for parameter in skip if id(parameter) not in kept]
        self._without_gradient.off(self._skipped)

    def switch_on(self) -> None:
        """Have all parameters get gradients again."""
        self._without_gradient.on()

    def backward(self, wrapper: TwoPassOptimWrapper, loss: Tensor) -> None:
        """Compute the gradients that the climb needs.

        Args:
            wrapper: The optimizer wrapper.
            loss: The first forward's loss.
        """
        # The loss scale is fitted to the second pass's loss, which accumulation divides.
        scaled = wrapper.precision.scale(loss if wrapper.precision.scaler is None else wrapper.scale_loss(loss))
        # Checkpointed layers run again in the backward pass.
        self._without_gradient.off(self._skipped)
        # With gradients switched off, nothing may be left that the loss depends on.
        if scaled.requires_grad or not self._without_gradient.active:
            scaled.backward()
        self._without_gradient.on()
        if self._parallel.averages and wrapper.sync_perturbation and wrapper.skips_gradients:
            average_gradients(self._perturbed)

    def climb(self, wrapper: TwoPassOptimWrapper, model: nn.Module) -> Tensor:
        """Perturb the chosen parameters by their gradients, after an exact copy was taken.

        Args:
            wrapper: The optimizer wrapper, whose arguments say how far and in which way.
            model: Module that holds the parameters.

        Returns:
            The norm, scalar, without loss scaling: of all pieces together, where the model is sharded; 0 where nothing
            has a gradient.

        Raises:
            NotImplementedError: A gradient is sparse.
            ValueError: Quantized weights are to be perturbed, and the model has none.
        """
        perturbed = [parameter for parameter in self._perturbed if parameter.grad is not None]
        check_perturbed(type(wrapper).__name__, model, perturbed, quantized=wrapper.perturb_quantized)
        shards = self._parallel.shards
        if not perturbed and shards is None:
            return torch.zeros((), device=wrapper.device)
        weights = [local_shard(parameter) for parameter in perturbed]
        self._weights.save(weights)
        norm = climb(
            weights,
            [local_shard(parameter.grad) for parameter in perturbed if parameter.grad is not None],
            wrapper.rho,
            adaptive=wrapper.adaptive,
            eta=wrapper.eta,
            eps=wrapper.eps,
            scale=self._scale,
            inverse_grad_scale=_inverse_grad_scale(wrapper),
            norm_of=global_norm if shards is None else shards.norm_of(perturbed, wrapper.device),
        )
        if wrapper.perturb_quantized:
            self._quantized.apply(model, perturbed, dict(self._weights.pairs))
        return norm

    def take_back(self) -> None:
        """Put the weights back, bit for bit, and take off the quantizers what was added to them."""
        try:
            self._quantized.remove()
        finally:
            self._weights.restore()


def _inverse_grad_scale(wrapper: TwoPassOptimWrapper) -> Tensor | None:
    """What undoes, in the first gradient, the loss scale and the division by the accumulated micro-batches."""
    inverse = wrapper.precision.inverse_scale()
    return None if inverse is None else inverse / wrapper.scale_loss(1.0)
