"""Keep the gradients of the two passes apart, and apart from accumulated ones (ours)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class GradientsAside:
    """Gradients that were accumulated before this step.

    Args:
        parameters: Everything that a backward pass may give a gradient to.
        in_buckets: Whether they may lie in memory that a backward pass of DDP writes to (``gradient_as_bucket_view``).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, in_buckets: bool = False) -> None:
        self._parameters = parameters
        self._gradients: list[Tensor | None] = [parameter.grad for parameter in parameters]
        self._values = [_clone(gradient) for gradient in self._gradients] if in_buckets else self._gradients

    def take_off(self) -> None:
        """Take them off their parameters, for the first pass."""
        for parameter in self._parameters:
            parameter.grad = None

    def resume(self) -> None:
        """Drop the first pass's gradients and let the second pass accumulate onto copies of the earlier ones.

        Copies, because accumulation is in place: :meth:`undo` must find the originals as they were.
        """
        for parameter, value in zip(self._parameters, self._values, strict=True):
            parameter.grad = _clone(value)

    def undo(self) -> None:
        """Put the gradients back as they were before the step."""
        for parameter, gradient, value in zip(self._parameters, self._gradients, self._values, strict=True):
            if gradient is not value and gradient is not None and value is not None:
                gradient.copy_(value)
            parameter.grad = gradient


def _clone(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.clone()
