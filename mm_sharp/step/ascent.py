"""The way from w to w + e, and the exact way back.

:func:`mm_sharp.ops.perturbation.perturb_` has the mathematics; here is what a step keeps in order to call it and to
undo it. Of two passes the second is at ``w + e``. Where there is one alone, ``e`` comes before it: the weights are
``w + e`` in its forward and its backward pass, and ``w`` in between, so that a forward that is never followed by its
update leaves nothing perturbed. Under FSDP, whose forward may leave whole weights gathered for the backward pass, they
stay ``w + e``, and such a forward is undone when the next step begins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mm_sharp.ops.gradients import inner_products
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

    In the order of a step of two passes: :meth:`choose`, the first forward, :meth:`unfreeze`, :meth:`first_backward`,
    :meth:`perturb`, the second pass, :meth:`restore`. Of one pass: :meth:`choose`, :meth:`perturb_ahead`, the forward,
    :meth:`set_aside`, :meth:`take_up`, the backward pass, :meth:`restore`. :meth:`unfreeze` and :meth:`restore` do
    nothing where there is nothing to undo. ``rho``, which may change between steps, is the method's to apply.
    """

    def __init__(self, settings: StepSettings, precision: Precision, parallel: ParallelModel) -> None:
        self._settings = settings
        self._precision = precision
        self._parallel = parallel
        self._perturbed: Sequence[nn.Parameter] = ()
        self._skipped: list[nn.Parameter] = []
        self._frozen: list[nn.Parameter] = []
        self._average_by_hand = False
        self._parts = 1
        self._weights, self._moved = TensorBackup(), TensorBackup()
        self._plain: list[Tensor] = []  # of a step that is measured, the first gradients, which e overwrites
        self._quantized = QuantizedPerturbation()

    def choose(
        self, perturbed: Sequence[nn.Parameter], skip: Sequence[nn.Parameter] = (), *, average_by_hand: bool = False
    ) -> None:
        """Settle what this step perturbs, just before its first forward.

        What of ``skip`` is not perturbed gets no gradient in the first pass, from now on. With ``average_by_hand`` the
        first gradients are averaged by :meth:`average_by_hand`, and not by DDP.
        """
        self._perturbed, self._skipped, self._average_by_hand = perturbed, [], average_by_hand
        if skip:
            kept = set(map(id, perturbed))
            self._skipped = [parameter for parameter in skip if id(parameter) not in kept]
            self._freeze()
        if self._settings.perturb_quantized:
            self._quantized.keep_integers(self._parallel.tree.modules)

    def _freeze(self) -> None:
        """Have autograd compute no gradients of what is skipped; of lazy parameters only once they have a shape."""
        for parameter in self._skipped:
            if parameter.requires_grad and not is_lazy(parameter):
                parameter.requires_grad_(False)
                self._frozen.append(parameter)

    def unfreeze(self) -> None:
        """Have all parameters get gradients again."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

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
        self._freeze()
        # With frozen parameters, nothing may be left that the loss depends on.
        if scaled.requires_grad or not self._frozen:
            scaled.backward()
        self.unfreeze()

    def average_by_hand(self) -> None:
        """Average the first gradients over the processes, if :meth:`choose` was told that DDP does not."""
        if self._average_by_hand:
            self._parallel.average_gradients(self._perturbed)

    @torch.no_grad()
    def perturb(self, method: Method, device: torch.device, *, measures: bool = False) -> Tensor:
        """Perturb the chosen parameters by their gradients, as ``method`` says, after an exact copy was taken.

        ``measures``: whether :meth:`sizes` comes next, for which the gradients are copied.

        Returns the norm, scalar, without loss scaling: of all pieces together, where the model is sharded; 0, on
        ``device``, where nothing has a gradient.
        """
        pairs = [(parameter, parameter.grad) for parameter in self._perturbed if parameter.grad is not None]
        perturbed, given = [parameter for parameter, _ in pairs], [gradient for _, gradient in pairs]
        check_perturbed(self._settings, self._parallel.module, perturbed, given)
        if not perturbed and self._parallel.shards is None:
            return torch.zeros((), device=device)
        gradients = self._parallel.pieces(given)
        inverse = self._inverse_grad_scale()
        self._plain = [gradient.clone() for gradient in gradients] if measures else []
        method.perturbation_gradient(perturbed, gradients, inverse)
        norm = self._move(method, perturbed, gradients, device, inverse)
        if self._settings.perturb_quantized:
            self._quantized.apply(perturbed, dict(self._weights.pairs))
        return norm

    @torch.no_grad()
    def perturb_ahead(self, method: Method, device: torch.device) -> None:
        """The same before the only pass, along what ``method`` gives for each parameter."""
        pairs = zip(self._perturbed, method.perturb_along(self._perturbed), strict=True)
        known = [(parameter, vector) for parameter, vector in pairs if vector is not None]
        parameters, vectors = [parameter for parameter, _ in known], [vector for _, vector in known]
        check_perturbed(self._settings, self._parallel.module, parameters, vectors)
        if known or self._parallel.shards is not None:
            self._move(method, parameters, vectors, device)
            torch.clear_autocast_cache()

    def _move(
        self,
        method: Method,
        parameters: Sequence[nn.Parameter],
        gradients: Sequence[Tensor],
        device: torch.device,
        inverse: Tensor | None = None,
    ) -> Tensor:
        weights = self._parallel.pieces(parameters)
        self._weights.save(weights)
        direction, eps = method.direction(weights, gradients), self._settings.eps
        norms = self._parallel.norms(parameters, device, self._perturbed)
        return perturb_(weights, gradients, direction, eps=eps, inverse_grad_scale=inverse, norms=norms)

    def sizes(self, device: torch.device) -> PerturbationSizes | None:
        """How far :meth:`perturb`, called just before with ``measures``, has moved each tensor; the host does not wait.

        None where nothing has a gradient. Of no meaning where the norm of the first gradient is not finite. Under FSDP
        all processes must ask; ``device`` is where the norms are if this one has no gradient.
        """
        perturbed = [parameter for parameter in self._perturbed if parameter.grad is not None]
        sharded = self._parallel.shards is not None
        if not perturbed and not sharded:
            return None
        copies = [copy for _, copy in self._weights.pairs]
        # The gradients' memory holds e.
        moves = self._parallel.pieces([parameter.grad for parameter in perturbed if parameter.grad is not None])
        of_weights, of_moves = self._parallel.norms(perturbed, device, self._perturbed).of_each(copies, moves)
        slope = self._slope(perturbed, moves)
        return PerturbationSizes(self._perturbed if sharded else perturbed, of_moves, of_weights, slope)

    def _slope(self, perturbed: Sequence[nn.Parameter], moves: Sequence[Tensor]) -> Tensor:
        """<e, g>, scalar; lets go of g."""
        plain, self._plain = self._plain, []
        slope, inverse = self._parallel.total(perturbed, inner_products(plain, moves)), self._inverse_grad_scale()
        return slope if inverse is None else slope * inverse.to(slope)

    def _inverse_grad_scale(self) -> Tensor | None:
        """What undoes, in the first gradient, the loss scale and the division by the micro-batches."""
        inverse = self._precision.inverse_scale()
        if inverse is None:
            return torch.tensor(float(self._parts)) if self._parts > 1 else None
        return inverse / (1.0 / self._parts)

    def set_aside(self) -> None:
        """Have the weights be w until the backward pass of the only pass."""
        if self._weights.saved and self._parallel.shards is None:
            self._moved.save([weight for weight, _ in self._weights.pairs])
            self._weights.write_back(unseen=True)
            torch.clear_autocast_cache()

    def take_up(self) -> None:
        """Have them be what the forward has seen, bit for bit."""
        self._moved.write_back(unseen=True)
        self._moved.discard()

    def restore(self) -> None:
        """Put the weights back, bit for bit, and take off the quantizers what was added to them.

        What was set aside is w already, and whoever has written to it since was right.
        """
        try:
            if self._settings.perturb_quantized:
                self._quantized.remove()
        finally:
            if self._moved.saved:
                self._weights.discard()
                self._moved.discard()
            else:
                self._weights.restore()
                torch.clear_autocast_cache()
