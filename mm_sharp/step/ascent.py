"""The way from w to w + e, and the exact way back.

:func:`mm_sharp.ops.perturbation.perturb_` has the mathematics; here is what a step keeps in order to call it and to
undo it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mm_sharp.ops.frozen_params import FrozenParams
from mm_sharp.ops.fsdp import local_shard
from mm_sharp.ops.perturbation import perturb_
from mm_sharp.ops.precision import Precision
from mm_sharp.ops.quantized_perturbation import QuantizedPerturbation
from mm_sharp.ops.tensor_backup import TensorBackup
from mm_sharp.step.checks import check_perturbed
from mm_sharp.step.method import Method
from mm_sharp.step.parallel import ParallelModel
from mm_sharp.step.settings import StepSettings
from mm_sharp.step.timing import PerturbationSizes


class Ascent:
    """Moves the perturbed parameters from ``w`` to ``w + e``, and back.

    In the order of a step: :meth:`choose`, the first forward, :meth:`unfreeze`, :meth:`first_backward`,
    :meth:`perturb`, the second pass, :meth:`restore`. :meth:`unfreeze` and :meth:`restore` do nothing where there is
    nothing to undo. ``rho``, which may change between steps, is the method's to apply.
    """

    def __init__(self, settings: StepSettings, precision: Precision, parallel: ParallelModel) -> None:
        self._settings = settings
        self._precision = precision
        self._parallel = parallel
        self._perturbed: Sequence[nn.Parameter] = ()
        self._skipped: list[nn.Parameter] = []
        self._average_by_hand = False
        self._parts = 1
        self._frozen = FrozenParams()
        self._weights = TensorBackup()
        self._quantized = QuantizedPerturbation()

    def choose(
        self, perturbed: Sequence[nn.Parameter], skip: Sequence[nn.Parameter] = (), *, average_by_hand: bool = False
    ) -> None:
        """Settle what this step perturbs, just before its first forward.

        What of ``skip`` is not perturbed gets no gradient in the first pass, from now on. With ``average_by_hand`` the
        first gradients are averaged here, since DDP would wait for those that are skipped.
        """
        self._perturbed, self._skipped, self._average_by_hand = perturbed, [], average_by_hand
        if skip:
            kept = set(map(id, perturbed))
            self._skipped = [parameter for parameter in skip if id(parameter) not in kept]
            self._frozen.freeze(self._skipped)
        if self._settings.perturb_quantized:
            self._quantized.keep_integers(self._parallel.tree.modules)

    def unfreeze(self) -> None:
        """Have all parameters get gradients again."""
        self._frozen.unfreeze()

    def first_backward(self, loss: Tensor, micro_batches: int, *, mean: bool = False) -> None:
        """Compute the gradients that the perturbation needs.

        ``mean``: whether they are to be this micro-batch's part of the mean over ``micro_batches``.
        """
        # The loss scale is fitted to the mean.
        self._parts = micro_batches if mean or self._precision.scaler is not None else 1
        if self._parts > 1:
            loss = loss / self._parts
        scaled = self._precision.scale(loss)
        # Checkpointed layers run again in the backward pass.
        self._frozen.freeze(self._skipped)
        # With frozen parameters, nothing may be left that the loss depends on.
        if scaled.requires_grad or not self._frozen.active:
            scaled.backward()
        self._frozen.unfreeze()
        if self._average_by_hand:
            self._parallel.average_gradients(self._perturbed)

    @torch.no_grad()
    def perturb(self, method: Method, device: torch.device) -> Tensor:
        """Perturb the chosen parameters by their gradients, as ``method`` says, after an exact copy was taken.

        Returns the norm, scalar, without loss scaling: of all pieces together, where the model is sharded; 0, on
        ``device``, where nothing has a gradient.
        """
        perturbed = [parameter for parameter in self._perturbed if parameter.grad is not None]
        check_perturbed(self._settings, self._parallel.module, perturbed)
        shards = self._parallel.shards
        if not perturbed and shards is None:
            return torch.zeros((), device=device)
        weights, gradients = self._pieces(perturbed)
        inverse = self._inverse_grad_scale()
        method.perturbation_gradient(perturbed, gradients, inverse)
        self._weights.save(weights)
        norm = perturb_(
            weights,
            gradients,
            method.direction(weights, gradients),
            eps=self._settings.eps,
            inverse_grad_scale=inverse,
            norms=self._parallel.norms(perturbed, device, self._perturbed),
        )
        if self._settings.perturb_quantized:
            self._quantized.apply(perturbed, dict(self._weights.pairs))
        return norm

    def sizes(self, device: torch.device) -> PerturbationSizes | None:
        """How far :meth:`perturb`, which must have come just before, has moved each tensor; the host does not wait.

        None where nothing has a gradient. Of no meaning where the norm of the first gradient is not finite. Under FSDP
        all processes must ask; ``device`` is where the norms are if this one has no gradient.
        """
        perturbed = [parameter for parameter in self._perturbed if parameter.grad is not None]
        sharded = self._parallel.shards is not None
        if not perturbed and not sharded:
            return None
        # The gradients' memory holds e.
        _, moves = self._pieces(perturbed)
        copies = [copy for _, copy in self._weights.pairs]
        of_weights, of_moves = self._parallel.norms(perturbed, device, self._perturbed).of_each(copies, moves)
        return PerturbationSizes(self._perturbed if sharded else perturbed, of_moves, of_weights)

    def _pieces(self, parameters: Sequence[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
        """What this process holds of the parameters, which all have a gradient, and of their gradients."""
        weights: list[Tensor] = list(parameters)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self._parallel.shards is not None:
            weights, gradients = list(map(local_shard, weights)), list(map(local_shard, gradients))
        return weights, gradients

    def _inverse_grad_scale(self) -> Tensor | None:
        """What undoes, in the first gradient, the loss scale and the division by the micro-batches."""
        inverse = self._precision.inverse_scale()
        if inverse is None:
            return torch.tensor(float(self._parts)) if self._parts > 1 else None
        return inverse / (1.0 / self._parts)

    def restore(self) -> None:
        """Put the weights back, bit for bit, and take off the quantizers what was added to them."""
        try:
            self._quantized.remove()
        finally:
            self._weights.restore()
