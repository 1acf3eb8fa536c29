"""Parameters that get no gradient for a while (ESAM's stochastic weight perturbation)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.parameter import is_lazy


class FrozenParams:
    """Switches ``requires_grad`` off, so that autograd does not compute the gradients at all, and on again."""

    def __init__(self) -> None:
        self._off: list[nn.Parameter] = []

    @property
    def active(self) -> bool:
        """Whether a parameter is switched off."""
        return bool(self._off)

    def off(self, parameters: Iterable[nn.Parameter]) -> None:
        """Switch off those of ``parameters`` that require a gradient; lazy ones only once they have a shape."""
        for parameter in parameters:
            if parameter.requires_grad and not is_lazy(parameter):
                parameter.requires_grad_(False)
                self._off.append(parameter)

    def on(self) -> None:
        """Switch on what :meth:`off` switched off."""
        for parameter in self._off:
            parameter.requires_grad_(True)
        self._off = []
