"""Parameters that get no gradient for a while (ESAM's stochastic weight perturbation)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.parameter import is_lazy


class FrozenParams:
    """Freezes parameters, so that autograd does not compute their gradients at all, and unfreezes them again."""

    def __init__(self) -> None:
        self._frozen: list[nn.Parameter] = []

    @property
    def active(self) -> bool:
        """Whether a parameter is frozen."""
        return bool(self._frozen)

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """Freeze those of ``parameters`` that require a gradient; lazy ones only once they have a shape."""
        for parameter in parameters:
            if parameter.requires_grad and not is_lazy(parameter):
                parameter.requires_grad_(False)
                self._frozen.append(parameter)

    def unfreeze(self) -> None:
        """Have them require a gradient again."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []
