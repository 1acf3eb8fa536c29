"""The climb of a step: which parameters it moves, and the exact way back (ours).

:func:`mm_sharp.perturbation.climb` has the mathematics; here is what a step keeps in order to call it and to undo it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mm_sharp.grad_switch import GradSwitch
from mm_sharp.perturbation import TensorBackup, climb, global_norm
from mm_sharp.quantized_perturbation import QuantizedPerturbation
from mm_sharp.shards import Shards, local
from mm_sharp.support import check_perturbed


class Ascent:
    """Moves the perturbed parameters from ``w`` to ``w + e``, and back.

    In the order of a step: :meth:`choose`, the first forward, :meth:`switch_on`, :meth:`backward`, :meth:`climb`, the
    second pass, :meth:`take_back`. The last one and :meth:`switch_on` do nothing where there is nothing to undo.

    Args:
        owner: Class that steps, for messages.
        device: Where the norm is if there is nothing to perturb.

    Attributes:
        perturbed: The parameters that this step perturbs, as far as they get a gradient.
    """

    def __init__(self, owner: str, device: torch.device) -> None:
        self.perturbed: Sequence[nn.Parameter] = ()
        self._owner = owner
        self._device = device
        self._scale = 1.0
        self._skipped: list[nn.Parameter] = []
        self._without_gradient = GradSwitch()
        self._weights = TensorBackup()
        self._quantized = QuantizedPerturbation()

    def choose(self, perturbed: Sequence[nn.Parameter], scale: float, *, skip: Sequence[nn.Parameter]) -> None:
        """Settle what this step perturbs, just before its first forward.

        Args:
            perturbed: The parameters.
            scale: Factor on the perturbation.
            skip: Those of them that are not perturbed get no gradient in the first pass, from now on.
        """
        self.perturbed, self._scale = perturbed, scale
        kept = set(map(id, perturbed))
        self._skipped = [parameter for parameter in skip if id(parameter) not in kept]
        self._without_gradient.off(self._skipped)

    def switch_on(self) -> None:
        """Have all parameters get gradients again."""
        self._without_gradient.on()

    def backward(self, loss: Tensor) -> None:
        """Compute the first pass's gradients; ``loss`` is scaled already."""
        # Checkpointed layers run again in the backward pass.
        self._without_gradient.off(self._skipped)
        # With gradients switched off, nothing may be left that the loss depends on.
        if loss.requires_grad or not self._without_gradient.active:
            loss.backward()
        self._without_gradient.on()

    def climb(
        self,
        model: nn.Module,
        rho: float,
        *,
        adaptive: bool,
        eta: float,
        eps: float,
        quantized: bool,
        inverse_grad_scale: Tensor | None,
        shards: Shards | None,
    ) -> Tensor:
        """Perturb the chosen parameters by their gradients, after an exact copy was taken.

        Args:
            model: Module that holds them.
            rho: As of :func:`mm_sharp.perturbation.climb`, and so are ``adaptive``, ``eta`` and ``eps``.
            adaptive: See there.
            eta: See there.
            eps: See there.
            quantized: Perturb quantized weights themselves, where layers have them.
            inverse_grad_scale: What undoes the scale of the gradients' loss, scalar, or None.
            shards: The model's pieces, where it is sharded.

        Returns:
            The norm, scalar: of all pieces together, where there are some; 0 where nothing has a gradient.

        Raises:
            NotImplementedError: A gradient is sparse.
            ValueError: Quantized weights are to be perturbed, and the model has none.
        """
        perturbed = [parameter for parameter in self.perturbed if parameter.grad is not None]
        check_perturbed(self._owner, model, perturbed, quantized=quantized)
        if not perturbed and shards is None:
            return torch.zeros((), device=self._device)
        weights = [local(parameter) for parameter in perturbed]
        self._weights.save(weights)
        norm = climb(
            weights,
            [local(parameter.grad) for parameter in perturbed if parameter.grad is not None],
            rho,
            adaptive=adaptive,
            eta=eta,
            eps=eps,
            scale=self._scale,
            inverse_grad_scale=inverse_grad_scale,
            norm_of=global_norm if shards is None else shards.norm_of(perturbed, self._device),
        )
        if quantized:
            self._quantized.apply(model, perturbed, self._weights.copies)
        return norm

    def take_back(self) -> None:
        """Put the weights back, bit for bit, and take off the quantizers what was added to them."""
        try:
            self._quantized.remove()
        finally:
            self._weights.restore()
