"""Keep the gradients of the two passes apart, and apart from accumulated ones (ours)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class GradientsAside:
    """Gradients that were accumulated before this step.

    Args:
        parameters: Everything that a backward pass may give a gradient to.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._gradients: list[Tensor | None] = [parameter.grad for parameter in parameters]

    def take_off(self) -> None:
        """Take them off their parameters, for the first pass."""
        for parameter in self._parameters:
            parameter.grad = None

    def resume(self) -> None:
        """Drop the first pass's gradients and let the second pass accumulate onto copies of the earlier ones.

        Copies, because accumulation is in place: :meth:`undo` must find the originals as they were.
        """
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()

    def undo(self) -> None:
        """Put the gradients back as they were before the step."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
